"""What the compiler says of a step, kept on disk so that it is asked once."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import tempfile
import time
from importlib.metadata import version

import jax

from easylm import storage
from easylm.config import read_json, write_json
from easylm.planning.hlo_costs import Collective, program_costs
from easylm.planning.overflow import (
    Overflow,
    Temporary,
    dumped,
    is_overflow,
    read_overflow,
)
from easylm.planning.topology import Topology
from easylm.trainers.build import Program
from easylm.trainers.step import COMPILER_OPTIONS

CACHE = "~/.cache/easylm/plans"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step; everything in it is of one device, and of one step.

    Attributes:
      arguments: bytes of the state and the batch, as the compiler lays them out.
      temporaries: bytes that exist during a step only.
      code: bytes of the program.
      overflow: what did not fit; then the other fields are 0 or empty, and so with
      refusal: why the compiler could not compile it; empty where it could.
      collectives: what is sent between devices, by kind.
      traffic: bytes of main memory read and written, at least.
      seconds: that compiling took when it was done.
    """

    arguments: int = 0
    temporaries: int = 0
    code: int = 0
    overflow: Overflow | None = None
    refusal: str = ""
    collectives: tuple[Collective, ...] = ()
    traffic: int = 0
    seconds: float = 0.0

    @property
    def total(self) -> int:
        """Bytes of memory that the step takes, or would take."""
        if self.overflow is not None:
            return self.overflow.needed
        return self.arguments + self.temporaries + self.code


def compile_step(program: Program, topology: Topology, cache: str = CACHE) -> tuple[Compiled, bool]:
    """Compiles a step with the compiler of its devices, unless that has been done before.

    Args:
      program: the step.
      topology: where it is compiled for.
      cache: folder of what was compiled before.
    Returns:
      (what was found, whether it was known).
    Raises:
      JaxRuntimeError: the compiler ran out of something, in words that are not understood: neither
        is the program known to be too large, nor that there is no way to compile it.
    """
    lowered = program.jitted().lower(program.state, program.batch)
    path = f"{os.path.expanduser(cache)}/{_key(program, lowered, topology)}.json"
    if storage.exists(path):
        return _load(path), True
    started = time.perf_counter()
    try:
        executable, text = _compile(lowered)
    except jax.errors.JaxRuntimeError as error:
        overflow = read_overflow(lowered) if is_overflow(error) else None
        if overflow is None and "RESOURCE_EXHAUSTED" in str(error):
            raise
        refusal = "" if overflow else str(error).splitlines()[0]
        seconds = time.perf_counter() - started
        found = Compiled(overflow=overflow, refusal=refusal, seconds=seconds)
    else:
        seconds = time.perf_counter() - started
        memory, costs = executable.memory_analysis(), program_costs(text)
        found = Compiled(
            # What comes out lies where the donated state lay; only the metrics do not.
            arguments=memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            code=memory.generated_code_size_in_bytes,
            collectives=costs.collectives,
            traffic=costs.traffic,
            seconds=seconds,
        )
    write_json(found, path)
    return found, False


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """(the compiled program, its text).

    The text is that which the compiler writes itself: jax cannot print some of the asynchronous
    collectives of newer TPUs.
    """
    with tempfile.TemporaryDirectory() as folder:
        executable = lowered.compile({"xla_dump_to": folder})
        return executable, dumped(folder, "after_optimizations")


def _key(program: Program, lowered: jax.stages.Lowered, topology: Topology) -> str:
    """Of the program and all that compiles it; the lines of source are no part of it."""
    versions = ("jax " + version("jax"), compiler(topology))
    kind = program.mesh.devices.flat[0].device_kind
    options = str(COMPILER_OPTIONS.get(topology.platform))
    text = "\n".join((*versions, kind, topology.shape, options, _counting(), lowered.as_text()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def compiler(topology: Topology) -> str:
    """What compiles for these machines, and its version: others place buffers otherwise."""
    package = "libtpu" if topology.platform == "tpu" else "jaxlib"
    return f"{package} {version(package)}"


@functools.cache
def _counting() -> str:
    """A hash of what makes a `Compiled` of a program: another version may count otherwise."""
    folder = pathlib.Path(__file__).parent
    files = [folder / "compiled.py", folder / "overflow.py", *sorted(folder.glob("hlo_*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _load(path: str) -> Compiled:
    fields = read_json(path)
    overflow = fields["overflow"]
    if overflow is not None:
        needed, usable, largest, *totals = overflow
        fields["overflow"] = Overflow(
            needed, usable, tuple(Temporary(*of) for of in largest), *totals
        )
    fields["collectives"] = tuple(Collective(*of) for of in fields["collectives"])
    return Compiled(**fields)
