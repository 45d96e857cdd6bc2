"""The text of a compiled XLA program, read into computations and instructions.

The text is what `jax.stages.Compiled.as_text()` gives; its grammar is described at
openxla.org/xla/operation_semantics and by xla/hlo/parser/hlo_parser.cc.
"""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

_HEADER = re.compile(r"(?:ENTRY )?%?(\S+) \(.*\{$")
_END = re.compile(r"\}(, execution_thread=.*)?$")
_START = re.compile(r"\s+(?:ROOT )?%?\S+ = ")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)[a-z0-9]*\[([\d,<=]*)\](?:\{([^}]*)\})?")
# An element of a tuple may be named where it is used, by its index, such as %while.72#3.
_NAME = re.compile(r"%([\w.-]+(?:#\d+)*)")

# Types without a width in their name; what holds no data has none.
_BITS = {"pred": 8, "token": 0, "opaque": 0}


class Array(NamedTuple):
    """An array that an instruction gives.

    Attributes:
      elements: their number, padding of the layout left out.
      bits: of one element.
      space: of its memory: 0 main memory, others on the chip (1 VMEM, 2 semaphores, 3 CMEM,
        6 SMEM) or on the host (5).
    """

    elements: int
    bits: int
    space: int

    @property
    def bytes(self) -> int:
        """Bytes of all elements, in whatever memory."""
        return self.elements * self.bits // 8

    def main_bytes(self, elements: int) -> int:
        """Bytes of so many of its elements; 0 where they are not in main memory."""
        return 0 if self.space else elements * self.bits // 8


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a computation: `name = arrays opcode(arguments), attributes`.

    Attributes:
      name: without the percent sign.
      opcode: as XLA spells it.
      arrays: of the result, those of nested tuples in order.
      operands: names of instructions of the same computation.
      arguments: the text between the parentheses: a constant's value, a parameter's number.
      attributes: the rest of the line.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    @property
    def elements(self) -> int:
        """Elements of all arrays."""
        return sum(array.elements for array in self.arrays)

    def attribute(self, key: str) -> str:
        """The first word of an attribute, such as a computation's name or a number.

        Raises:
          ValueError: the instruction has no such attribute.
        """
        found = re.search(rf"\b{key}=%?([\w.-]+)", self.attributes)
        if found is None:
            raise ValueError(f"{self.opcode} {self.name} has no {key}")
        return found.group(1)

    def branches(self) -> list[str]:
        """Names of the computations that a conditional chooses from."""
        several = re.search(r"\bbranch_computations=\{([^}]*)\}", self.attributes)
        if several:
            return _NAME.findall(several.group(1))
        return [self.attribute("true_computation"), self.attribute("false_computation")]


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the program.

    Attributes:
      name: without the percent sign.
      instructions: by name, operands before their users.
      root: the instruction whose result is the function's.
    """

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """In the order of the caller's operands."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda parameter: int(parameter.arguments))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that take another's result, by its name."""
        users = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users


@dataclasses.dataclass(frozen=True)
class Module:
    """A program as one device runs it.

    Attributes:
      computations: by name.
      entry: name of the one that runs first.
      devices: that run the program together.
    """

    computations: dict[str, Computation]
    entry: str
    devices: int


def parse_module(text: str) -> Module:
    """Reads `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: the text holds no program.
    """
    computations, entry, name, lines = {}, None, None, []
    for line in text.splitlines():
        if name is not None and _END.match(line):
            computations[name] = _computation(name, lines)
            name = None
        elif name is not None and (_START.match(line) or not lines):
            lines.append(line)
        elif name is not None:  # what a Pallas kernel says of itself is JSON of several lines
            lines[-1] += line
        elif line.endswith("{") and (header := _HEADER.match(line)):
            name, lines = header.group(1), []
            entry = name if line.startswith("ENTRY ") else entry
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of a compiled program")
    first = text.partition("\n")[0]
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", first)
    return Module(computations, entry, math.prod(map(int, counts)))


def _computation(name: str, lines: list[str]) -> Computation:
    instructions, root = {}, None
    shapes = {}
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match is None:
            raise ValueError(f"computation {name}: not an instruction: {line.strip()[:200]}")
        is_root, label, shape, opcode, rest = match.groups()
        end = _closing(rest)
        arguments = rest[:end]
        operands = tuple(_NAME.findall(arguments))
        for operand in operands:
            _take_element(operand, instructions, shapes)
        shapes[label] = shape
        instruction = Instruction(
            name=label,
            opcode=opcode,
            arrays=_arrays(shape),
            operands=operands,
            arguments=arguments,
            attributes=rest[end:],
        )
        instructions[label] = instruction
        root = instruction if is_root else root
    return Computation(name, instructions, root)


def _take_element(name: str, instructions: dict[str, Instruction], shapes: dict[str, str]) -> None:
    """Adds the instruction that an operand such as while.72#3 stands for, if it is one of these."""
    of, is_element, index = name.rpartition("#")
    if not is_element or name in instructions:
        return
    _take_element(of, instructions, shapes)
    shapes[name] = _elements(shapes[of])[int(index)]
    instructions[name] = Instruction(
        name=name,
        opcode="get-tuple-element",
        arrays=_arrays(shapes[name]),
        operands=(of,),
        arguments=f"%{of}",
        attributes=f"), index={index}",
    )


def _elements(shape: str) -> list[str]:
    """The shapes that a tuple's consists of."""
    elements, depth = [""], 0
    for character in shape[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            elements.append("")
        else:
            elements[-1] += character
    return elements


def _closing(text: str) -> int:
    """Where the parenthesis that was opened before `text` closes."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"a parenthesis does not close: {text[:200]}")


@functools.lru_cache(maxsize=4096)
def _arrays(shape: str) -> tuple[Array, ...]:
    arrays = []
    for kind, bits, sizes, layout in _ARRAY.findall(shape):
        # A dimension of dynamic size is written as its bound, <=N.
        elements = math.prod(int(n.removeprefix("<=")) for n in sizes.split(",") if n)
        space = re.search(r"S\((\d+)\)", layout)
        width = int(bits) if bits else _BITS[kind]
        arrays.append(Array(elements, width, int(space.group(1)) if space else 0))
    return tuple(arrays)
