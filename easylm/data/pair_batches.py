"""Batches of preference pairs: both sequences of a pair are segments of one row."""

import numpy as np

from easylm.data.batches import Batch, BatchStream, build_rows
from easylm.data.pack import most_in_row
from easylm.data.pairs import Pairs

# Arrays `[rows, pairs in a row]` that a batch has beside those of `build_rows`.
PAIR_ARRAYS = ("pair_weights", "reference_chosen", "reference_rejected", "margins")


def pair_stream(
    pairs: Pairs,
    reference: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    seq_len: int,
    packing: bool,
    **options,
) -> BatchStream:
    """The batches of a run on pairs.

    Pair j of a row, from 0, is segments 2j + 1 (chosen) and 2j + 2 (rejected). Beside the arrays of
    `build_rows` a batch has float32 `[rows, pairs]`: `pair_weights` (1, or 0 where a row has fewer
    pairs), `reference_chosen` and `reference_rejected`, and `margins` (0 where a pair has none).

    Args:
        pairs: encoded pairs, none longer than `seq_len`.
        reference: the reference's log-probabilities of the chosen and the rejected answers, float32
            `[pairs]` in the order of `pairs`; None: 0, for a loss that does not look at them.
        seq_len, packing, **options: as of `BatchStream`.
    """
    zeros = np.zeros(len(pairs), np.float32)
    chosen, rejected = (zeros, zeros) if reference is None else reference
    # In the order of PAIR_ARRAYS.
    columns = np.stack([zeros + 1, chosen, rejected, np.nan_to_num(pairs.margins)])
    lengths = pairs.sequences.lengths.reshape(-1, 2)
    width = pairs_per_row(pairs, seq_len, packing)

    def lay_out(rows, epochs) -> Batch:
        del epochs
        sequences = [np.stack([2 * ids, 2 * ids + 1], axis=1).ravel() for ids in rows]
        batch = build_rows(pairs.sequences, sequences, seq_len)
        table = np.zeros((len(PAIR_ARRAYS), len(rows), width), np.float32)
        for row, ids in enumerate(rows):
            table[:, row, : len(ids)] = columns[:, ids]
        return {**batch, **dict(zip(PAIR_ARRAYS, table, strict=True))}

    return BatchStream(lengths, lay_out, seq_len=seq_len, packing=packing, **options)


def pairs_per_row(pairs: Pairs, seq_len: int, packing: bool) -> int:
    """The second axis of the arrays of pairs: no row of any epoch or seed holds more."""
    return most_in_row(pairs.lengths, seq_len) if packing else 1
