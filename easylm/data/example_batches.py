"""Batches of single examples, for supervised fine-tuning."""

import functools

import numpy as np

from easylm.data.batches import Batch, BatchStream, build_rows
from easylm.data.encode import Examples
from easylm.data.weights import token_weights


def example_stream(
    examples: Examples,
    *,
    seq_len: int,
    seed: int,
    loss_weighting: str = "token",
    loss_group: int = 32,
    **options,
) -> BatchStream:
    """The batches of a run on examples; their arrays are those of `build_rows`.

    Args:
        examples: encoded examples, none longer than `seq_len`.
        seq_len, seed, **options: as of `BatchStream`.
        loss_weighting, loss_group: what a trained token weighs; see easylm/data/weights.py.
    """

    @functools.lru_cache(maxsize=2)  # a batch may span two epochs
    def weights(epoch: int) -> np.ndarray:
        return token_weights(examples, loss_weighting, loss_group, seed, epoch)

    def lay_out(rows, epochs) -> Batch:
        of_rows = [weights(int(epoch))[ids] for ids, epoch in zip(rows, epochs, strict=True)]
        return build_rows(examples, rows, seq_len, of_rows)

    return BatchStream(examples.lengths[:, None], lay_out, seq_len=seq_len, seed=seed, **options)
