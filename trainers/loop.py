"""The one training loop. What a batch holds and what the loss is, others decide."""

import math
import time
from collections.abc import Callable, Iterator

import jax

from easylm.errors import PreemptedError
from easylm.trainers.step import Batch, TrainState


def not_finite(metrics: dict[str, float]) -> list[str]:
    """Which of the numbers that a run cannot go on without are infinite or no numbers."""
    return [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]


def train(
    state: TrainState,
    step_fn: Callable[[TrainState, Batch], tuple[TrainState, dict]],
    batches: Iterator[Batch],
    *,
    last_step: int,
    total_steps: int,
    report: Callable[[int, dict[str, float], float], None],
    save_at: Callable[[int], bool],
    save: Callable[[int, TrainState], None],
    evaluate_at: Callable[[int], bool],
    evaluate: Callable[[dict], dict[str, float]],
    pause_at: Callable[[int], bool],
    pause: Callable[[int], None],
    stopped: Callable[[], bool],
) -> TrainState:
    """Takes the steps after `last_step` up to `total_steps`.

    The numbers of a step are fetched while the next one runs, so the devices never wait for the
    host. A state is evaluated or saved only after its loss is known to be finite.

    Args:
      state: after `last_step`; it is consumed.
      step_fn: the compiled step.
      batches: of the steps from last_step + 1 on, on the mesh.
      last_step: steps done before.
      total_steps: steps of the whole run.
      report: (step, metrics, seconds the step took).
      save_at: whether to save after a step; the last one is always saved.
      save: (step, state).
      evaluate_at: whether to evaluate after a step; before it is saved.
      evaluate: parameters -> metrics, which are reported with those of the step.
      pause_at: whether `pause` is to be called after a step.
      pause: does something that takes idle devices; its time is no step's.
      stopped: whether somebody wants the run to stop: then the step under way is the last.
    Returns:
      The state after `total_steps`.
    Raises:
      FloatingPointError: a loss or gradient is not finite; it has been reported, and the state
        that led to it is not saved.
      PreemptedError: the run was to stop; `save` has been called.
    """
    clock = time.perf_counter()

    def finish(step: int, metrics: dict, evaluated: bool) -> None:
        nonlocal clock
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        seconds = time.perf_counter() - clock
        wrong = not_finite(values)
        if evaluated and not wrong:
            values |= evaluate(state.params)
        clock = time.perf_counter()
        report(step, values, seconds)
        if wrong:
            raise _stopped_by(step, wrong[0], values[wrong[0]])

    unfinished = None
    for step in range(last_step + 1, total_steps + 1):
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = step_fn(state, next(batches))
        if unfinished is not None:
            finish(*unfinished, evaluated=False)
        unfinished = step, metrics
        stopping = stopped()
        saving = stopping or step == total_steps or save_at(step)
        if saving or evaluate_at(step) or pause_at(step):
            finish(*unfinished, evaluated=evaluate_at(step) and not stopping)
            unfinished = None
            if saving:
                save(step, state)
            if pause_at(step):
                pause(step)
            clock = time.perf_counter()
        if stopping and step < total_steps:
            raise PreemptedError(
                f"stopped after step {step} of {total_steps}; the checkpoint is saved, and the "
                "same command goes on from it"
            )
    return state


def _stopped_by(step: int, name: str, value: float) -> FloatingPointError:
    return FloatingPointError(
        f"step {step}: {name} is {value}; the run stops here, and what was saved before stays. "
        "A lower learning rate or a look at the data may help."
    )
