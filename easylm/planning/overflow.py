"""What fills the memory of a program that the TPU compiler finds too large.

The error gives totals only. Compiled again with a folder to dump to, the compiler leaves behind
which buffers it placed where (buffer-assignment), which of them are alive when most are
(live-range), and the program, whose instructions know the Python lines they come from.
"""

import collections
import functools
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import jax

import easylm

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TOTALS = re.compile(
    r"\((?P<needed>[\d.]+\w?)\) exceeds available HBM \((?P<usable>[\d.]+\w?)\)"
    r"|Used (?P<used>[\d.]+\w?) of (?P<capacity>[\d.]+\w?) hbm"
)
_ALLOCATION = re.compile(r"allocation \d+: size (\d+), (color \d+, )?(?:page \d+, ?)?(.*)")
_VALUE = re.compile(
    r" value: <\d+ (?P<name>[^ {]+)(?P<index>\{[\d,]*\})?(?P<phi> \(phi\))? @\d+> "
    r"\(size=(?P<size>\d+),offset=(?P<offset>\d+)\): (?P<shape>\w+\[[\d,]*\])"
)
_LIVE = re.compile(r"    (\S+?)(?:\{\})?: \d+ bytes \(cumulative")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*)", re.MULTILINE)


class Temporary(NamedTuple):
    """Buffers of one shape that hold intermediate values, alive when the most memory is in use.

    Attributes:
      size: bytes of one, as laid out on the device.
      shape: dtype and sizes, such as bf16[80,1,8192,8192].
      count: how many there are.
      source: the line that makes them, "models/llama/model.py:196 in Block.__call__", or the
        operation where the compiler no longer knows.
      operation: that makes them, as jax calls it; of a copy the compiler added, what it copies,
        such as state.params['embed_tokens']['embedding'].
    """

    size: int
    shape: str
    count: int
    source: str
    operation: str


class Overflow(NamedTuple):
    """Why a program does not fit; all sizes in bytes on one device.

    Attributes:
      needed: by the program, rounded by the compiler to 0.01 GiB.
      usable: by a program, rounded alike.
      largest: of the temporaries, those that take the most together first; at most 16.
      arguments: parameters, optimizer's state and batch; results take their place.
      temporaries: all that lives within a step.
    """

    needed: int
    usable: int
    largest: tuple[Temporary, ...]
    arguments: int
    temporaries: int


class _Buffer(NamedTuple):
    instruction: str
    is_phi: bool
    size: int
    offset: int
    shape: str


def is_overflow(error: Exception) -> bool:
    """Whether compiling ended in `error` because the program does not fit the device's memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and bool(_TOTALS.search(str(error)))


def read_overflow(lowered: jax.stages.Lowered) -> Overflow:
    """Says what fills the memory, for a program whose `compile()` ended in an overflow.

    Compiles it once more; that takes about a second, since it ends before code is made.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            lowered.compile({"xla_dump_to": folder})
        except jax.errors.JaxRuntimeError as error:
            if not is_overflow(error):
                raise
            return _read_dump(folder, _TOTALS.search(str(error)))
    raise AssertionError("the program fits; its memory_analysis() says what it takes")


def _read_dump(folder: str, totals: re.Match) -> Overflow:
    sizes, buffers = _read_assignment(dumped(folder, "buffer-assignment"))
    program = _Program(dumped(folder, "after_optimizations"))
    alive = _alive_at_peak(dumped(folder, "live-range"), buffers)
    counts = collections.Counter(
        (buffer.size, buffer.shape, *_origin(buffer, buffers, program)) for buffer in alive
    )
    temporaries = [
        Temporary(size, shape, count, line or operation, operation)
        for (size, shape, line, operation), count in counts.items()
    ]
    temporaries.sort(key=lambda found: -found.size * found.count)
    return Overflow(
        needed=_bytes(totals["needed"] or totals["used"]),
        usable=_bytes(totals["usable"] or totals["capacity"]),
        arguments=sizes["parameter"],
        temporaries=sizes["preallocated-temp"],
        largest=tuple(temporaries[:16]),
    )


def dumped(folder: str, end: str) -> str:
    """The file of a folder that the compiler dumped to whose name ends so, without its suffix.

    There may be more than one: parts of a program that are compiled by themselves have higher
    numbers.
    """
    path = min(pathlib.Path(folder).glob(f"*{end}.txt"))
    return path.read_text(encoding="utf-8")


def _bytes(text: str) -> int:
    number, unit = re.fullmatch(r"([\d.]+)(\w?)", text).groups()
    return int(float(number) * _UNITS[unit])


def _read_assignment(text: str) -> tuple[dict[str, int], dict[str, _Buffer]]:
    """(bytes of main memory by kind of allocation, temporaries by name)."""
    sizes = dict.fromkeys(("parameter", "preallocated-temp"), 0)
    buffers = {}
    kind = ""
    for line in text.splitlines():
        if allocation := _ALLOCATION.fullmatch(line):
            size, other_memory, description = allocation.groups()
            kind = "" if other_memory else re.match(r"[\w-]*", description)[0]
            if kind in sizes:
                sizes[kind] += int(size)
        elif kind == "preallocated-temp" and (value := _VALUE.match(line)):
            index = value["index"] if value["index"] not in (None, "{}") else ""
            buffers[value["name"] + index] = _Buffer(
                instruction=value["name"],
                is_phi=bool(value["phi"]),
                size=int(value["size"]),
                offset=int(value["offset"]),
                shape=value["shape"],
            )
    return sizes, buffers


def _alive_at_peak(text: str, buffers: dict[str, _Buffer]) -> list[_Buffer]:
    """The temporaries that hold values when the most memory is in use, one for each place."""
    _, _, peak = text.partition("(peak):\n")
    by_offset = {}
    for line in peak.splitlines():
        live = _LIVE.match(line)
        if not live:
            break
        if live[1] in buffers:
            by_offset.setdefault(buffers[live[1]].offset, buffers[live[1]])
    return list(by_offset.values())


def _origin(buffer: _Buffer, buffers: dict[str, _Buffer], program: "_Program") -> tuple[str, str]:
    """(line, operation) of what makes that which `buffer` holds.

    What a loop carries has no line of its own: those of what else is kept in its place do. Zeros
    that a loop is to fill have none either, but what fills others of the same shape.
    """
    place = (buffer.offset, buffer.shape)
    makers = [other for other in buffers.values() if not other.is_phi]
    same_place = [other for other in makers if (other.offset, other.shape) == place]
    same_shape = [other for other in makers if other.shape == buffer.shape]
    origins = [program.origin(other.instruction) for other in (buffer, *same_place, *same_shape)]
    # Loops and calls hand on what something in them makes, and broadcast zeros are to be filled.
    telling = [
        origin for origin in origins if not re.search(r"(while|call|broadcast_in_dim)$", origin[1])
    ]
    with_line = [origin for origin in telling if origin[0]]
    known = [*with_line, *filter(any, telling), *filter(any, origins)]
    return known[0] if known else ("", buffer.instruction)


class _Program:
    """The instructions of a compiled program, and the Python lines that they come from."""

    def __init__(self, text: str):
        self._instructions = dict(_INSTRUCTION.findall(text))
        tables = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
        self._files, self._functions, self._locations, self._frames = (
            _table(text, name) for name in tables
        )

    def origin(self, name: str) -> tuple[str, str]:
        """(innermost line of this package, jax's name of the operation); empty if unknown.

        What writes into a stack of layers is said to come from where the layer's part does, and a
        cast or a copy that the compiler added from where its operand does.
        """
        body = self._instructions.get(name, "")
        operation = re.search(r'op_name="([^"]*)"', body)
        operands = re.findall(r"%([\w.\-]+)", body.split("), ")[0])
        if operation is None:
            is_copy = re.match(r"\S+ (copy|convert|bitcast|reshape|transpose)\(", body)
            return self.origin(operands[0]) if is_copy else ("", "")
        parts = operands[1:] if "dynamic-update-slice" in name else []
        bodies = [body, *(self._instructions.get(part, "") for part in parts)]
        line = max(map(self._line, bodies))[1]
        return line, operation[1].replace("\\'", "'")

    def _line(self, body: str) -> tuple[int, str]:
        """(how many calls deep, the innermost line of this package); 0 if there is none."""
        found = re.search(r"stack_frame_id=(\d+)", body)
        stack = list(self._stack(int(found[1]))) if found else []
        for frame in stack:
            location = _numbers(self._locations[_numbers(self._frames[frame])["file_location_id"]])
            path = _path_here(self._files[location["file_name_id"]].strip('"'))
            if path:
                function = self._functions[location["function_name_id"]].strip('"')
                function = function.split("<locals>.")[-1]
                return len(stack), f"{path}:{location['line']} in {function}"
        return 0, ""

    def _stack(self, frame: int) -> Iterator[int]:
        seen = set()
        # Parents are counted from one higher than frames are: 1 is none.
        while frame > 0 and frame not in seen:
            yield frame
            seen.add(frame)
            frame = _numbers(self._frames[frame])["parent_frame_id"] - 1


def _table(text: str, name: str) -> dict[int, str]:
    found = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
    rows = (line.split(" ", 1) for line in found[1].splitlines()) if found else ()
    return {int(number): row for number, row in rows}


@functools.cache
def _numbers(row: str) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", row)}


@functools.cache
def _path_here(path: str) -> str:
    """`path` below the checkout, or the folder that easylm is installed in; else nothing."""
    package = pathlib.Path(easylm.__file__).parent
    roots = (package.parent, *map(pathlib.Path, easylm.__path__))
    for folder in ("easylm", "models", "trainers"):
        for root in roots:
            if pathlib.Path(path).is_relative_to(root / folder):
                return str(pathlib.Path(path).relative_to(root))
    return ""
