"""Packing loses nothing, overfills nothing, and depends on lengths, seed and epoch alone."""

import numpy as np
import pytest

from easylm.data.pack import Plan, one_per_row, pack


def tulu_like_lengths(count, rng):
    """Lengths like Tülu 2's: quartiles near 230 and 1,464, at most 8,192."""
    return np.clip(rng.lognormal(6.36, 1.37, count), 10, 8192).astype(np.int64)


def rows_of(plan):
    return [plan.row(i).tolist() for i in range(len(plan))]


def test_every_example_once_and_no_row_too_full():
    rng = np.random.default_rng(0)
    for trial in range(50):
        seq_len = int(rng.integers(1, 200))
        lengths = rng.integers(1, seq_len + 1, rng.integers(0, 300))
        plan = pack(lengths, seq_len, seed=trial, epoch=0)
        assert sorted(plan.ids.tolist()) == list(range(len(lengths)))
        sums = [lengths[row].sum() for row in rows_of(plan)]
        assert all(1 <= total <= seq_len for total in sums)
        assert plan.starts[0] == 0 and plan.starts[-1] == len(lengths)


def test_best_fit_of_known_lengths():
    """Whatever the order, no two rows of a best fit could have been one."""
    rng = np.random.default_rng(1)
    for trial in range(30):
        lengths = rng.integers(1, 33, 200)
        plan = pack(lengths, 32, seed=trial, epoch=1)
        sums = sorted(lengths[row].sum() for row in rows_of(plan))
        assert sums[0] + sums[1] > 32
    assert rows_of(pack(np.array([4, 4, 4]), 4, 0, 0)) != [[0, 1, 2]]
    assert len(pack(np.array([2, 2, 2, 2]), 4, 0, 0)) == 2


def test_a_new_example_goes_to_the_fullest_row_with_room():
    """Replays the plan against a search through all rows."""
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, 65, 400)
    plan = pack(lengths, 64, seed=3, epoch=2)
    order = np.random.default_rng([3, 2]).permutation(400)
    rows = []
    for example in order:
        fitting = [row for row in rows if lengths[row].sum() + lengths[example] <= 64]
        fullest = max((lengths[row].sum() for row in fitting), default=None)
        candidates = [row for row in fitting if lengths[row].sum() == fullest]
        (candidates[-1] if candidates else rows.append([]) or rows[-1]).append(example)
    # Equally full rows may be chosen in any order, so their fillings are compared.
    assert len(plan) == len(rows)
    filled = sorted(int(lengths[row].sum()) for row in rows_of(plan))
    assert filled == sorted(int(lengths[row].sum()) for row in rows)


def test_pure_function_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(1, 50, 500)
    first = rows_of(pack(lengths, 64, seed=1, epoch=2))
    assert first == rows_of(pack(lengths.copy(), 64, seed=1, epoch=2))
    assert first != rows_of(pack(lengths, 64, seed=1, epoch=3))
    assert first != rows_of(pack(lengths, 64, seed=2, epoch=2))
    # Another company in the rows, not only another order of the rows.
    assert set(map(frozenset, first)).isdisjoint(
        frozenset(row) for row in rows_of(pack(lengths, 64, seed=1, epoch=3)) if len(row) > 2
    )


def test_the_row_opened_last_and_left_emptiest_stands_anywhere():
    rng = np.random.default_rng(0)
    places = []
    for trial in range(40):
        lengths = rng.integers(1, 6, 500)
        plan = pack(lengths, 100, seed=trial, epoch=0)
        filled = [lengths[row].sum() for row in rows_of(plan)]
        places.append(np.argmin(filled) / (len(plan) - 1))
    assert 0.3 < np.mean(places) < 0.7


def test_rows_are_filled_for_real_lengths():
    lengths = tulu_like_lengths(326_154, np.random.default_rng(0))
    plan = pack(lengths, 8192, seed=0, epoch=0)
    assert lengths.sum() / (len(plan) * 8192) > 0.995


def test_one_per_row_is_a_shuffle():
    plan = one_per_row(100, seed=0, epoch=0)
    assert len(plan) == 100 and sorted(plan.ids) == list(range(100))
    assert all(len(row) == 1 for row in rows_of(plan))
    assert rows_of(plan) == rows_of(one_per_row(100, 0, 0)) != rows_of(one_per_row(100, 0, 1))
    assert plan.ids.tolist() != list(range(100))


def test_concatenated_plans_keep_their_rows():
    lengths = np.array([3, 1, 2, 2, 4])
    plans = [pack(lengths, 4, 0, epoch) for epoch in range(3)]
    assert rows_of(Plan.concatenate(plans)) == [row for plan in plans for row in rows_of(plan)]


@pytest.mark.parametrize("lengths", [[0, 3], [3, 9]])
def test_lengths_that_cannot_be_packed(lengths):
    with pytest.raises(ValueError, match="wanted 1 to 8"):
        pack(np.array(lengths), 8, 0, 0)
