"""The fastest way to run a config, and the smallest slice it fits, by compiling few of many ways.

What compiles a candidate is given, so that all this is arithmetic.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from easylm.command import say
from easylm.devices import GIB, DeviceSpec
from easylm.models.llama.config import LlamaConfig
from easylm.planning.candidates import Candidate, candidates, guess, least_bytes, smallest
from easylm.planning.found import Found, Planned, Progress, Search, outcome
from easylm.planning.topology import Topology
from easylm.trainers.config import RunConfig

# Meshes tried on a slice. Wider tensor axes need less memory, so more would rarely help.
_MESHES_A_SLICE = 3

# A mesh is left out if all of it looks so many times slower than what fits: guesses are within a
# fifth of the estimates of compiled steps (LLaMA 2 7B on v3-32, 70B on v3-256).
_HOPELESS = 1.5

Guesses = Mapping[Candidate, tuple[float, float]]


class Budget:
    """Minutes within which compiles may be started.

    Attributes:
      is_stopped: whether no more may be, however much is left.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic):
        self._clock, self._end = clock, clock() + 60 * minutes
        self.is_stopped = False

    def is_over(self) -> bool:
        """Whether no other compile may be started."""
        return self.is_stopped or self._clock() >= self._end

    def left(self) -> str:
        """Minutes and seconds."""
        seconds = max(0, round(self._end - self._clock()))
        return f"{seconds // 60}:{seconds % 60:02}"


def search(
    config: RunConfig,
    model: LlamaConfig,
    *,
    num_devices: int,
    device: DeviceSpec | None,
    batch_rows: Mapping[int, int],
    plan_of: Callable[[Candidate], Planned],
    budget: Budget,
) -> Search:
    """Compiles candidates until the fastest that fits is known for each mesh, or time is up.

    Meshes that look fast come first, and of each its smallest program: where that does not fit,
    nothing of the mesh does. Meshes that look much slower than what fits are left out. Progress is
    told on stderr. Ctrl-C ends the search after the compile that is running.

    Args:
      config: the run's.
      model: sizes of the model.
      num_devices: of the mesh.
      device: what one is like; None: unknown.
      batch_rows: for each seq_len to try, the rows of a step that hold examples.
      plan_of: compiles a candidate.
      budget: once it is over, no compile is started.
    """
    guesses = {
        one: guess(one, config, model, device).key
        for one in candidates(config, model, num_devices, batch_rows)
    }
    result, progress = Search(), Progress(len(guesses))
    meshes: dict[tuple, list[Candidate]] = {}
    for one in sorted(guesses, key=guesses.__getitem__):
        if _state_fits(one, config, model, device):
            meshes.setdefault((one.mesh, one.seq_len), []).append(one)
        else:
            result.pruned += 1

    def compiled(one: Candidate) -> Planned:
        progress.start(one, result.settled, budget.left())
        # Python answers a signal in the main thread alone, and between calls: let it be free.
        with ThreadPoolExecutor(max_workers=1) as thread:
            planned = thread.submit(plan_of, one).result()
        progress.say(outcome(one, planned))
        return planned

    with _stopping(budget, progress):
        for group in meshes.values():
            best = min((guesses[found.candidate][0] for found in result.fitting), default=math.inf)
            if guesses[group[0]][0] > _HOPELESS * best:
                result.slower += len(group)
            else:
                _settle(group, guesses, compiled, budget, result)
    result.is_interrupted = budget.is_stopped
    progress.close(result.settled)
    # All times are known or none is; then, and where they are equal, the guess decides.
    result.fitting.sort(key=lambda fit: (fit.planned.serial_seconds or 0.0, guesses[fit.candidate]))
    return result


@contextlib.contextmanager
def _stopping(budget: Budget, progress: Progress) -> Iterator[None]:
    """In it, Ctrl-C stops the budget and says so, and raises nothing."""

    def stop(signal_number, frame):
        budget.is_stopped = True
        progress.say("interrupted: the search ends after the compile that is running")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _state_fits(one: Candidate, config: RunConfig, model: LlamaConfig, device) -> bool:
    return device is None or least_bytes(config, model, one.mesh) <= device.usable


def _settle(
    group: Sequence[Candidate], guesses: Guesses, plan_of, budget: Budget, result: Search
) -> None:
    """Compiles candidates of one mesh until the fastest that fits is known.

    One that does not fit settles those that take no less; one that fits those that look no faster.
    """
    left, one = list(group), smallest(group)
    while left and not budget.is_over():
        planned = plan_of(one)
        left.remove(one)
        if planned.fits:
            result.fitting.append(Found(one, planned))
            kept = [other for other in left if guesses[other] < guesses[one]]
            result.slower += len(left) - len(kept)
        elif planned.refusal:
            result.refused += 1
            kept = left
        else:
            result.too_large += 1
            kept = [other for other in left if not other.takes_no_less(one)]
            result.pruned += len(left) - len(kept)
        left = kept
        one = max(left, key=lambda other: _settles(other, left, guesses), default=one)
    result.untried += len(left)


def _settles(one: Candidate, others: Sequence[Candidate], guesses: Guesses) -> int:
    """How many of `others` are settled once `one` is compiled, in the worse case."""
    if_it_fits = sum(guesses[other] >= guesses[one] for other in others)
    if_not = sum(other.takes_no_less(one) for other in others)
    return min(if_it_fits, if_not)


class Smallest(NamedTuple):
    """The smallest slice that fits.

    Attributes:
      topology: the slice; None if there is none, or the budget was over before it was found.
      found: a way to run on it, the one that needs the least memory.
      tried: names of the slices that were tried, smallest first.
      is_over: whether the budget ended the search.
    """

    topology: Topology | None
    found: Found | None
    tried: list[str]
    is_over: bool


def smallest_slice(
    config: RunConfig,
    model: LlamaConfig,
    *,
    slices: Sequence[Topology],
    device: DeviceSpec | None,
    batch_rows: Mapping[int, int],
    plan_of: Callable[[Topology, Candidate], Planned],
    budget: Budget,
) -> Smallest:
    """Compiles what needs the least memory on each slice until one fits; arguments as `search`.

    A line on stderr tells of each compile, and of each slice that the state alone is too large for.
    """
    tried = []
    for topology in slices:
        programs = _smallest_programs(config, model, topology, device, batch_rows)
        if programs:
            say(f"{topology.name}:")
        for one in programs:
            if budget.is_over():
                return Smallest(None, None, tried, is_over=True)
            planned = plan_of(topology, one)
            say(f"  {outcome(one, planned)}")
            if planned.fits:
                return Smallest(topology, Found(one, planned), [*tried, topology.name], False)
        tried.append(topology.name)
    return Smallest(None, None, tried, is_over=False)


def _smallest_programs(
    config: RunConfig, model: LlamaConfig, topology: Topology, device, batch_rows
) -> list[Candidate]:
    """The smallest program of the few meshes that need least; says why where there is none."""
    meshes: dict[tuple, list[Candidate]] = {}
    for one in candidates(config, model, topology.device_count, batch_rows):
        meshes.setdefault((-one.mesh[2], one.seq_len), []).append(one)
    programs = [smallest(meshes[key]) for key in sorted(meshes)]
    possible = [one for one in programs if _state_fits(one, config, model, device)]
    if not possible:
        least = min(least_bytes(config, model, one.mesh) for one in programs)
        say(
            f"{topology.name}: parameters, optimizer and gradients alone take {least / GIB:.2f} of "
            f"{device.usable / GIB:.2f} GiB"
        )
    return possible[:_MESHES_A_SLICE]
