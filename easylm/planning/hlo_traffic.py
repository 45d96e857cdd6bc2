"""Bytes of main memory that the instructions of a compiled program read and write.

A count from below, for a bound on time. Left out are: the padding of layouts; arrays in other
memories than the main one; what a kernel reads more than once or keeps to itself, such as the
buffers of a collective; values inside a fusion; and the old content where a slice is updated in
place. What a custom call (a Pallas kernel) is given is taken to be read once, and what it gives
to be written once.
"""

import re
from collections import Counter
from collections.abc import Container

from easylm.planning.hlo_text import Array, Computation, Instruction, Module

_FREE = {
    "add-dependency",
    "after-all",
    "async-done",
    "async-update",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
# Custom calls that give a buffer, as it is or put together from parts that lie in a row.
_FREE_CALLS = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')
_SAME_ELEMENTS = ("bitcast", "convert", "copy", "reshape", "transpose")
# Any part of what these give takes all of what they are given.
_WHOLE = {
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "convolution",
    "custom-call",
    "dot",
    "reduce",
    "reduce-scatter",
    "reduce-window",
    "scatter",
    "sort",
}


def traffic(
    module: Module,
    computation: Computation,
    instruction: Instruction,
    continued: Container[str] = (),
) -> int:
    """Bytes of main memory that an instruction moves, those it calls not counted but fusions.

    Args:
      module: the program.
      computation: the one that `instruction` is of; not a fused one.
      instruction: no loop, conditional or call.
      continued: names of collectives within the fusion that only go on with what another
        fusion has started, and move nothing new.
    """
    opcode = instruction.opcode
    if opcode in _FREE or _FREE_CALLS.search(instruction.attributes):
        return 0
    if opcode.endswith("-done"):
        return _part(instruction, instruction.elements)
    if opcode == "fusion":
        fused = module.computations[instruction.attribute("calls")]
        needed = _fused_reads(module, fused, continued)
        written = _writes(instruction, fused, _fused_makers(instruction, fused))
    else:
        given = [computation.instructions[name] for name in instruction.operands]
        wanted = _wanted(instruction)
        needed = [
            _needs(module, instruction, position, operand.elements, wanted=wanted, in_place=True)
            for position, operand in enumerate(given)
        ]
        makers = [instruction] * len(instruction.arrays)
        written = 0 if opcode.endswith("-start") else _writes(instruction, computation, makers)
    read = {}
    for name, elements in zip(instruction.operands, needed, strict=True):
        bytes_ = _part(computation.instructions[name], elements)
        read[name] = max(bytes_, read.get(name, 0))
    return sum(read.values()) + written


def _part(instruction: Instruction, elements: int) -> int:
    """Bytes of so many elements of a result, of each array of it if there are several."""
    arrays = instruction.arrays
    return sum(array.main_bytes(min(elements, array.elements)) for array in arrays)


def _wanted(instruction: Instruction) -> int:
    """Elements of the result of an instruction outside fusions."""
    if instruction.opcode in ("slice-start", "dynamic-slice-start"):
        # What it gives is (its operands, the slice, its context).
        return instruction.arrays[len(instruction.operands)].elements
    return instruction.elements


def _needs(module, user: Instruction, position: int, size: int, *, wanted: int, in_place) -> int:
    """Elements, of `size`, that `user` needs of an operand to give `wanted` of its own.

    Args:
      module, user, position: the operand is the one at this position of `user`.
      size: elements of the operand.
      wanted: elements of the result that somebody needs.
      in_place: an update of a slice takes the place of its operand, so what stays is not read.
    """
    opcode = user.opcode.removesuffix("-start")
    if 'custom_call_target="AsyncCollectiveDone"' in user.attributes:
        return 0
    if opcode in ("dynamic-update-slice", "scatter") and position == 0 and in_place:
        return 0
    if opcode == "fusion":
        return _fused_reads(module, module.computations[user.attribute("calls")], ())[position]
    return size if opcode in _WHOLE else min(size, wanted)


def _fused_reads(module: Module, fused: Computation, continued: Container[str]) -> list[int]:
    """Elements that a fusion needs of each of its operands; may count some twice."""
    results = _results(fused)
    in_place = {_made(fused, result).name for result in results}
    needed = Counter()
    for result in results:
        needed[result.name] += result.elements
    for user in reversed(fused.instructions.values()):
        if user.name in continued:
            continue
        wanted = min(needed[user.name], user.elements)
        for position, name in enumerate(user.operands):
            needed[name] += _needs(
                module,
                user,
                position,
                fused.instructions[name].elements,
                wanted=wanted,
                in_place=user.name in in_place,
            )
    return [needed[parameter.name] for parameter in fused.parameters]


def _results(fused: Computation) -> list[Instruction]:
    """What a fusion gives, without what it only hands on."""
    if fused.root.opcode != "tuple":
        return [fused.root]
    given = (fused.instructions[name] for name in fused.root.operands)
    return [result for result in given if result.opcode != "parameter"]


def _made(computation: Computation, result: Instruction) -> Instruction:
    """The instruction that made the elements of `result`, if it is only their form that changed."""
    while result.opcode in _SAME_ELEMENTS:
        result = computation.instructions[result.operands[0]]
    return result


def _writes(instruction: Instruction, computation: Computation, made: list[Instruction]) -> int:
    """Bytes of main memory that an instruction writes.

    Args:
      instruction: the one; what of it is an operand updated in place does not count.
      computation, made: the instructions that make each array of its result, and where they are.
    """
    return sum(
        array.main_bytes(_written_elements(computation, result, array))
        for index, (array, result) in enumerate(zip(instruction.arrays, made, strict=True))
        if not _aliased(instruction, index)
    )


def _written_elements(computation: Computation, made: Instruction, array: Array) -> int:
    if made.opcode == "dynamic-update-slice":
        return computation.instructions[made.operands[1]].elements
    if made.opcode == "scatter":
        return computation.instructions[made.operands[-1]].elements
    return array.elements


def _fused_makers(fusion: Instruction, fused: Computation) -> list[Instruction]:
    """The instructions that make the elements of each array that a fusion gives."""
    if fused.root.opcode != "tuple":
        return [_made(fused, fused.root)] * len(fusion.arrays)
    return [_made(fused, fused.instructions[name]) for name in fused.root.operands]


def _aliased(instruction: Instruction, index: int) -> bool:
    """Whether a result is one of the operands, to be updated in place."""
    aliasing = re.search(r"\boutput_to_operand_aliasing=\{(.*?)\)\}", instruction.attributes)
    if aliasing is None:
        return False
    return re.search(rf"\{{(?:{index})?\}}: \(", aliasing.group(1) + ")") is not None
