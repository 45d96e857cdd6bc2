"""What one kind of training has of its own; loop, step and all else are shared."""

from collections.abc import Callable
from typing import NamedTuple

from easylm.trainers.step import Batch, LossFn


def nothing_to_check(metrics: dict[str, float]) -> None:
    """For an objective that knows nothing of its first step beforehand."""


class Objective(NamedTuple):
    """What a run is trained for.

    Attributes:
      loss_fn: see trainers/step.py.
      batch: the shapes of a batch, of jax.ShapeDtypeStruct.
      noun: what an example is called.
      description: of the loss, in a line.
      check_first: takes the metrics of the first step, of the model that training starts from, and
        raises FloatingPointError if they cannot be.
    """

    loss_fn: LossFn
    batch: Batch
    noun: str
    description: str
    check_first: Callable[[dict[str, float]], None] = nothing_to_check
