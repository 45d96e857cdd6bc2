"""Both sequences of a pair share a row, and its numbers stand where its segments say."""

import numpy as np
import pytest

from easylm.data.encode import Examples
from easylm.data.pair_batches import PAIR_ARRAYS, pair_stream, pairs_per_row
from easylm.data.pairs import Pairs


def make_pairs(lengths, margins=None):
    """Pairs of (chosen, rejected) lengths; tokens say where they are from: 1000 s + position.

    s counts sequences from 1: the chosen one of pair i is 2i + 1. The last two tokens are scored.
    """
    sequences = [
        (1000 * s + np.arange(n), np.arange(n) >= n - 2)
        for s, n in enumerate(np.ravel(lengths), start=1)
    ]
    ids = np.arange(len(lengths), dtype=np.uint64) + 7
    if margins is None:
        margins = np.full(len(lengths), np.nan)
    return Pairs(Examples.concatenate(sequences), ids, np.asarray(margins, np.float32))


def random_pairs(count, longest, seed=0):
    return make_pairs(np.random.default_rng(seed).integers(3, longest // 2 + 1, (count, 2)))


def stream_of(pairs, reference=None, **options):
    options = {"seq_len": 40, "packing": True, "batch_rows": 3, "seed": 1, "epochs": 1, **options}
    return pair_stream(pairs, reference, **options)


def test_known_rows():
    pairs = make_pairs([(4, 3), (3, 3)], margins=[0.5, np.nan])
    reference = np.array([-1.0, -2.0], np.float32), np.array([-3.0, -4.0], np.float32)
    (batch,) = [stream_of(pairs, reference, batch_rows=1, seq_len=14, row_multiple=2).batch(0)]
    first, second = (0, 1) if batch["tokens"][0, 0] == 1000 else (1, 0)
    expected = [
        [1000, 1001, 1002, 1003, 2000, 2001, 2002],
        [3000, 3001, 3002, 4000, 4001, 4002],
    ]
    tokens = [*expected[first], *expected[second], 0]
    assert batch["tokens"].tolist() == [tokens, [0] * 14]
    sizes = [[4, 3], [3, 3]]
    segments = np.repeat([1, 2, 3, 4, 0], [*sizes[first], *sizes[second], 1])
    assert batch["segment_ids"].tolist() == [segments.tolist(), [0] * 14]
    # A target is predicted one place before it stands; each answer has two.
    assert batch["loss_weights"].sum(1).tolist() == [8, 0]
    order = [first, second]
    assert batch["pair_weights"].tolist() == [[1, 1], [0, 0]]
    assert batch["reference_chosen"].tolist() == [reference[0][order].tolist(), [0, 0]]
    assert batch["reference_rejected"].tolist() == [reference[1][order].tolist(), [0, 0]]
    assert batch["margins"].tolist() == [np.array([0.5, 0.0])[order].tolist(), [0, 0]]
    assert {batch[name].dtype for name in PAIR_ARRAYS} == {np.dtype(np.float32)}


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_number_stands_by_its_pair(packing, seed):
    pairs = random_pairs(50, 40, seed)
    numbers = np.random.default_rng(seed).normal(size=(2, 50)).astype(np.float32)
    stream = stream_of(pairs, tuple(numbers), packing=packing, seed=seed, epochs=2, row_multiple=4)
    seen = []
    for step in range(len(stream)):
        batch = stream.batch(step)
        assert {batch[name].shape for name in PAIR_ARRAYS} == {
            (4, pairs_per_row(pairs, 40, packing))
        }
        for row in range(4):
            held = int(batch["pair_weights"][row].sum())
            assert batch["pair_weights"][row].tolist() == sorted(
                batch["pair_weights"][row], reverse=True
            )
            assert batch["segment_ids"][row].max() == 2 * held
            for j in range(held):
                starts = [
                    batch["tokens"][row][batch["segment_ids"][row] == segment][0]
                    for segment in (2 * j + 1, 2 * j + 2)
                ]
                pair = starts[0] // 2000
                assert starts == [2000 * pair + 1000, 2000 * pair + 2000]
                assert batch["reference_chosen"][row, j] == numbers[0, pair]
                assert batch["reference_rejected"][row, j] == numbers[1, pair]
                seen.append(pair)
            for name in PAIR_ARRAYS:
                assert not batch[name][row, held:].any()
    assert sorted(seen) == sorted([*range(50)] * 2)


def test_rows_hold_as_many_pairs_as_fit():
    assert pairs_per_row(make_pairs([(3, 3)] * 20), 40, packing=True) == 6
    assert pairs_per_row(make_pairs([(3, 3)] * 4), 40, packing=True) == 4
    assert pairs_per_row(make_pairs([(20, 20)] * 3), 40, packing=True) == 1
    assert pairs_per_row(make_pairs([(3, 3)] * 20), 40, packing=False) == 1
    batch = stream_of(make_pairs([(3, 3)] * 7), batch_rows=1, seq_len=42).batch(0)
    assert batch["pair_weights"].tolist() == [[1] * 7]
    assert batch["segment_ids"].max() == 14


def test_a_pair_is_one_example_and_without_a_reference_its_numbers_are_zero():
    pairs = random_pairs(20, 40)
    stream = stream_of(pairs, batch_rows=4, packing=False)
    assert (stream.num_examples, len(stream)) == (20, 5)
    assert stream.epoch(5) == 1
    batch = stream.batch(0)
    assert not batch["reference_chosen"].any() and not batch["reference_rejected"].any()
    assert not batch["margins"].any()
    np.testing.assert_array_equal(batch["pair_weights"], np.ones((4, 1)))


def test_the_rows_do_not_depend_on_the_reference_or_on_other_calls():
    pairs = random_pairs(30, 40)
    numbers = np.ones(30, np.float32), np.zeros(30, np.float32)
    with_numbers, without = stream_of(pairs, numbers), stream_of(pairs)
    for step in reversed(range(len(without))):
        for name, array in without.batch(step).items():
            if not name.startswith("reference"):
                np.testing.assert_array_equal(array, with_numbers.batch(step)[name])
    whole, part = without.batch(1), without.batch(1, slice(1, 3))
    for name, array in part.items():
        np.testing.assert_array_equal(array, whole[name][1:3], err_msg=name)
