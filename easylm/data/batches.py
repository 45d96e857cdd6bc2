"""Batches by number: batch k is a pure function of the examples, the seed and k."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from easylm.data.encode import Examples
from easylm.data.pack import Plan, one_per_row, pack

Batch = dict[str, np.ndarray]


def build_rows(
    examples: Examples,
    rows: Sequence[Iterable[int]],
    seq_len: int,
    weights: Sequence[Iterable[float]] | None = None,
) -> Batch:
    """Lays examples out in rows.

    Args:
        examples: encoded examples.
        rows: for each row the ids of its examples, whose lengths sum to at most `seq_len`; a row
            without ids is all padding.
        seq_len: tokens of a row.
        weights: for each row what a trained token of each of its examples weighs; 1 by default.

    Returns:
        Arrays `[rows, seq_len]`: int32 `tokens`, `targets` (the token after each one in its
        segment, else 0), `segment_ids` (1, 2, ... in a row; 0 is padding) and `positions` (from 0
        in each segment; 0 in padding), float32 `loss_weights` (0 where the target is not trained).
    """
    shape = (len(rows), seq_len)
    batch = {
        name: np.zeros(shape, np.int32)
        for name in ("tokens", "targets", "segment_ids", "positions")
    }
    batch["loss_weights"] = np.zeros(shape, np.float32)
    weights = [itertools.repeat(1.0)] * len(rows) if weights is None else weights
    for row, (ids, row_weights) in enumerate(zip(rows, weights, strict=True)):
        start = 0
        for segment, (example, weight) in enumerate(zip(ids, row_weights, strict=False), 1):
            tokens, mask = examples.example(example)
            end = start + len(tokens)
            if end > seq_len:
                raise ValueError(f"row {row} holds {end} tokens; wanted at most {seq_len}")
            batch["tokens"][row, start:end] = tokens
            batch["segment_ids"][row, start:end] = segment
            batch["positions"][row, start:end] = np.arange(len(tokens))
            # The last token of a segment has no target: the next one belongs to another example.
            batch["targets"][row, start : end - 1] = tokens[1:]
            batch["loss_weights"][row, start : end - 1] = mask[1:] * np.float32(weight)
            start = end
    return batch


# (example ids of each row, epoch of each row) -> the arrays of these rows
LayOut = Callable[[Sequence[np.ndarray], Sequence[int]], Batch]


class BatchStream:
    """The batches of a run, by step.

    Batch k holds rows [k * batch_rows, (k + 1) * batch_rows) of the plans of all epochs one after
    another, so a batch may span two epochs. Empty rows fill up the last batch of a run.

    Args:
        segment_lengths: int `[examples, segments]`, tokens of what an example consists of; all of
            it stays in one row, so the sum is at most `seq_len`.
        lay_out: builds rows from the ids of their examples.
        seq_len: tokens of a row.
        batch_rows: rows of a batch.
        seed: with the epoch, decides order and packing.
        packing: whether examples share rows.
        epochs: how often every example is seen; or
        steps: how many batches there are.
        row_multiple: the arrays have the next multiple of it as rows, more than `batch_rows` where
            a mesh needs it. The rows added are empty: the data order does not depend on it.
    """

    def __init__(
        self,
        segment_lengths: np.ndarray,
        lay_out: LayOut,
        *,
        seq_len: int,
        batch_rows: int,
        seed: int,
        packing: bool = False,
        epochs: int | None = None,
        steps: int | None = None,
        row_multiple: int = 1,
    ):
        if (epochs is None) == (steps is None):
            raise ValueError(f"epochs={epochs} and steps={steps}: wanted one of them")
        self.num_examples = len(segment_lengths)
        self.seq_len = seq_len
        self.batch_rows = batch_rows
        self.rows_per_batch = -(-batch_rows // row_multiple) * row_multiple
        self.segment_lengths, self.lay_out = segment_lengths, lay_out
        lengths = segment_lengths.sum(axis=1)
        plans: list[Plan] = []
        rows = 0
        while len(plans) < epochs if steps is None else rows < steps * batch_rows:
            epoch = len(plans)
            plans.append(
                pack(lengths, seq_len, seed, epoch)
                if packing
                else one_per_row(len(lengths), seed, epoch)
            )
            rows += len(plans[-1])
        self._plan = Plan.concatenate(plans)
        self._epoch_ends = np.cumsum([len(plan) for plan in plans])
        self._steps = -(-rows // batch_rows) if steps is None else steps

    def __len__(self) -> int:
        """The number of batches."""
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        """Batch `step`, all of it."""
        return self.batch(step)

    def batch(self, step: int, rows: slice | np.ndarray = slice(None)) -> Batch:
        """Builds one batch.

        Args:
            step: from 0.
            rows: which of the `rows_per_batch` rows to build, a slice or their numbers: what one
                process holds.

        Returns:
            Arrays `[rows, seq_len]` as in `build_rows`.
        """
        numbers = np.arange(self.rows_per_batch)[rows]
        first = step * self.batch_rows
        epochs = np.searchsorted(self._epoch_ends, first + numbers, side="right")
        planned = self.plan_rows(step)
        return self.lay_out([planned[number] for number in numbers], epochs)

    def plan_rows(self, step: int) -> list[np.ndarray]:
        """The example ids of every row of batch `step`, from 0; empty for rows of padding."""
        if not 0 <= step < self._steps:
            raise IndexError(f"step {step} of {self._steps}")
        first = step * self.batch_rows
        starts = self._plan.starts[first : first + self.batch_rows + 1]
        rows = [self._plan.ids[start:end] for start, end in itertools.pairwise(starts)]
        return rows + [self._plan.ids[:0]] * (self.rows_per_batch - len(rows))

    def epoch(self, step: int) -> float:
        """Epochs seen after `step` batches; the fraction counts rows."""
        row = min(step * self.batch_rows, len(self._plan))
        epoch = int(np.searchsorted(self._epoch_ends, row, side="right"))
        if epoch == len(self._epoch_ends):
            return float(epoch)
        start = self._epoch_ends[epoch - 1] if epoch else 0
        return epoch + float((row - start) / (self._epoch_ends[epoch] - start))

    @property
    def seen_lengths(self) -> np.ndarray:
        """Tokens of the segments of all examples that the run sees, as often as it sees them.

        In the order of the run, `[seen, segments]`.
        """
        rows = min(self._steps * self.batch_rows, len(self._plan))
        return self.segment_lengths[self._plan.ids[: self._plan.starts[rows]]]

    @property
    def fill(self) -> float:
        """The share of the run's row space that holds tokens and not padding."""
        rows = min(self._steps * self.batch_rows, len(self._plan))
        return float(self.seen_lengths.sum() / (rows * self.seq_len))


def prefetch(
    stream: BatchStream, steps: Sequence[int], rows: slice | np.ndarray = slice(None)
) -> Iterator[Batch]:
    """Builds batches ahead of their use, in threads, in order.

    Args:
        stream: the run.
        steps: which ones, from 0.
        rows: which rows of each batch this process holds, as of `BatchStream.batch`.
    """
    import grain  # imports jax, which checking data does without

    batches = (
        grain.MapDataset.range(len(steps))
        .map(lambda index: stream.batch(steps[int(index)], rows))
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
    )
    return iter(batches)
