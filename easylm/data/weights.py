"""What one trained token weighs in the loss: a pure function of the examples, seed and epoch."""

from __future__ import annotations

import numpy as np

from easylm.data.encode import Examples
from easylm.data.pack import shuffled


def target_counts(examples: Examples) -> np.ndarray:
    """The trained tokens of each example, int64 `[examples]`; the first token is never one."""
    starts = examples.offsets[:-1]
    counts = np.add.reduceat(examples.loss_mask, starts, dtype=np.int64)
    return counts - examples.loss_mask[starts]


def token_weights(
    examples: Examples, weighting: str, group: int, seed: int, epoch: int
) -> np.ndarray:
    """The weight of each trained token of each example, float32 `[examples]`.

    The loss of a step is the weighted mean over its trained tokens, so

    - `token`: all weigh 1;
    - `example`: 1 / (trained tokens of the example), the mean of the examples' means;
    - `microbatch`: 1 / (trained tokens of the group), where the examples, in the shuffled order
      of the epoch, form groups of `group`. It is what comes of dividing by the tokens of each
      micro-batch and averaging the micro-batches, as Tulu 2 did with 32 examples. The groups do
      not depend on rows, packing or mesh.

    Args:
        examples: encoded examples.
        weighting: as above.
        group: examples of a group; `microbatch` only.
        seed: of the run.
        epoch: every epoch has its own groups.
    """
    if weighting == "token":
        return np.ones(len(examples), np.float32)
    targets = target_counts(examples)
    if weighting == "microbatch":
        order = shuffled(len(examples), seed, epoch)
        group_of = np.empty(len(examples), np.int64)
        group_of[order] = np.arange(len(examples)) // group
        targets = np.bincount(group_of, weights=targets)[group_of]
    return (1 / targets).astype(np.float32)
