"""How often the loops of a compiled program run."""

import re

from easylm.planning.hlo_text import Computation, Instruction, Module

_SAME_VALUE = ("copy", "bitcast", "convert", "reshape")


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int:
    """How often the body of a `while` of `computation` runs.

    The CPU's and the GPU's compilers write it down. The TPU's does not: there it follows from
    the counter's first value, its step in the body and the bound it is compared with.

    Raises:
      ValueError: the loop is not of that kind; the message names it.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known.group(1))
    try:
        return _counted(module, computation, loop)
    except _Unknown as unknown:
        raise ValueError(
            f"loop {loop.name} of {computation.name}: cannot tell how often it runs: {unknown}"
        ) from None


class _Unknown(Exception):
    """What keeps a loop from being counted."""


def _counted(module: Module, computation: Computation, loop: Instruction) -> int:
    condition = module.computations[loop.attribute("condition")]
    body = module.computations[loop.attribute("body")]
    compare = condition.root
    if compare.opcode != "compare" or compare.attribute("direction") != "LT":
        raise _Unknown(f"its condition is no comparison of a counter, but {compare.opcode}")
    counter, bound = (_same_value(condition, name) for name in compare.operands)
    if counter.opcode != "get-tuple-element":
        raise _Unknown(f"its condition compares {counter.name}, which is not carried by it")
    index = int(counter.attribute("index"))
    start = _constant(_carried(computation, loop.operands[0], index))
    return max(0, -(-(_constant(bound) - start) // _step(body, index)))


def _step(body: Computation, index: int) -> int:
    """What the body adds to the element `index` of the tuple that it carries."""
    add = _carried(body, body.root.name, index)
    terms = [_same_value(body, name) for name in add.operands]
    counters = [
        term
        for term in terms
        if term.opcode == "get-tuple-element" and int(term.attribute("index")) == index
    ]
    if add.opcode != "add" or len(counters) != 1:
        raise _Unknown(f"its body makes the counter by {add.name}, not by adding a constant")
    terms.remove(counters[0])
    return _constant(terms[0])


def _carried(computation: Computation, name: str, index: int) -> Instruction:
    made = computation.instructions[name]
    if made.opcode != "tuple":
        raise _Unknown(f"it carries {made.name}, which is no tuple made on the spot")
    return _same_value(computation, made.operands[index])


def _same_value(computation: Computation, name: str) -> Instruction:
    """The instruction that first gave the value of `name`."""
    instruction = computation.instructions[name]
    while instruction.opcode in _SAME_VALUE:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _constant(instruction: Instruction) -> int:
    if instruction.opcode != "constant":
        raise _Unknown(f"{instruction.name} is no constant")
    return int(instruction.arguments)
