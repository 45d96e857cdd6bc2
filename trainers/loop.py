"""The one training loop. What a batch holds and what the loss is, others decide."""

import math
import time
from collections.abc import Callable, Iterator

import jax

from easylm.trainers.step import Batch, TrainState


def train(
    state: TrainState,
    step_fn: Callable[[TrainState, Batch], tuple[TrainState, dict]],
    batches: Iterator[Batch],
    *,
    last_step: int,
    total_steps: int,
    save_every: int,
    report: Callable[[int, dict[str, float], float], None],
    save: Callable[[int, TrainState], None],
) -> TrainState:
    """Takes the steps after `last_step` up to `total_steps`.

    The numbers of a step are fetched while the next one runs, so the devices never wait for the
    host. A state is saved only after its loss is known to be finite.

    Args:
      state: after `last_step`; it is consumed.
      step_fn: the compiled step.
      batches: of the steps from last_step + 1 on, on the mesh.
      last_step: steps done before.
      total_steps: steps of the whole run.
      save_every: steps between saves; the last step is always saved.
      report: (step, metrics, seconds the step took).
      save: (step, state).
    Returns:
      The state after `total_steps`.
    Raises:
      FloatingPointError: a loss or gradient is not finite; it has been reported, and the state
        that led to it is not saved.
    """
    clock = time.perf_counter()

    def finish(step: int, metrics: dict) -> None:
        nonlocal clock
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        report(step, values, now - clock)
        clock = now
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise FloatingPointError(
                    f"step {step}: {name} is {values[name]}; the run stops here. Checkpoints "
                    "before it are whole; a lower learning rate or a look at the data may help."
                )

    unfinished = None
    for step in range(last_step + 1, total_steps + 1):
        state, metrics = step_fn(state, next(batches))
        if unfinished is not None:
            finish(*unfinished)
        unfinished = step, metrics
        if step % save_every == 0 or step == total_steps:
            finish(*unfinished)
            unfinished = None
            save(step, state)
            clock = time.perf_counter()
    return state
