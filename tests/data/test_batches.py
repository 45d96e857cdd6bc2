"""Every target weight is in its place, and batch k depends on nothing but k."""

import numpy as np
import pytest

from easylm.data.batches import build_rows, prefetch
from easylm.data.encode import Examples
from easylm.data.example_batches import example_stream


def random_examples(count, longest, seed=0):
    """Examples whose tokens say where they are from: 1000 * (example + 1) + position."""
    rng = np.random.default_rng(seed)
    return Examples.concatenate(
        [
            (1000 * (i + 1) + np.arange(n), rng.integers(0, 2, n))
            for i, n in enumerate(rng.integers(1, longest + 1, count))
        ]
    )


def test_known_rows():
    examples = Examples.concatenate(
        [(np.array([11, 12, 13]), np.array([0, 1, 1])), (np.array([21, 22]), np.array([1, 1]))]
    )
    batch = build_rows(examples, [[0, 1], [], [1]], seq_len=6)
    expected = {
        "tokens": [[11, 12, 13, 21, 22, 0], [0] * 6, [21, 22, 0, 0, 0, 0]],
        "targets": [[12, 13, 0, 22, 0, 0], [0] * 6, [22, 0, 0, 0, 0, 0]],
        "loss_weights": [[1, 1, 0, 1, 0, 0], [0] * 6, [1, 0, 0, 0, 0, 0]],
        "segment_ids": [[1, 1, 1, 2, 2, 0], [0] * 6, [1, 1, 0, 0, 0, 0]],
        "positions": [[0, 1, 2, 0, 1, 0], [0] * 6, [0, 1, 0, 0, 0, 0]],
    }
    assert {name: array.tolist() for name, array in batch.items()} == expected
    dtypes = {name: array.dtype for name, array in batch.items()}
    assert dtypes.pop("loss_weights") == np.float32 and set(dtypes.values()) == {np.dtype("int32")}


def test_row_too_full_is_refused():
    examples = Examples.concatenate([(np.ones(3), np.ones(3))])
    with pytest.raises(ValueError, match="row 0 holds 6 tokens; wanted at most 5"):
        build_rows(examples, [[0, 0]], seq_len=5)


def check_weights(examples, batch):
    """Every weight stands before a trained token of the same example; returns their number."""
    for row in range(len(batch["tokens"])):
        tokens, segments = batch["tokens"][row], batch["segment_ids"][row]
        for place, weight in enumerate(batch["loss_weights"][row]):
            following = place + 1 < len(tokens) and segments[place + 1] == segments[place] != 0
            example, position = divmod(int(tokens[place]), 1000)
            trained = following and examples.example(example - 1)[1][position + 1]
            assert weight == (1 if trained else 0)
            if trained:
                assert batch["targets"][row, place] == tokens[place] + 1
            if segments[place]:
                assert batch["positions"][row, place] == position
    return batch["loss_weights"].sum()


@pytest.mark.parametrize("packing", [False, True])
def test_every_target_of_every_epoch_once(packing):
    examples = random_examples(60, 12)
    stream = example_stream(examples, seq_len=16, batch_rows=7, seed=5, packing=packing, epochs=3)
    tokens, targets = [], 0
    for step in range(len(stream)):
        batch = stream.batch(step)
        assert batch["tokens"].shape == (7, 16)
        targets += check_weights(examples, batch)
        tokens += batch["tokens"][batch["segment_ids"] > 0].tolist()
    assert sorted(tokens) == sorted(examples.tokens.tolist() * 3)
    first = examples.loss_mask[examples.offsets[:-1]].sum()
    assert targets == 3 * (examples.loss_mask.sum() - first)


def test_batches_are_slices_of_the_epochs_rows():
    examples = random_examples(50, 12)
    options = {"seq_len": 16, "seed": 5, "packing": True, "epochs": 3}
    one = example_stream(examples, batch_rows=1, **options)
    for rows in (3, 8):
        stream = example_stream(examples, batch_rows=rows, **options)
        assert len(stream) == -(-len(one) // rows)
        together = [row.tolist() for k in range(len(stream)) for row in stream.plan_rows(k)]
        assert together[: len(one)] == [one.plan_rows(k)[0].tolist() for k in range(len(one))]
        assert together[len(one) :] == [[]] * (len(stream) * rows - len(one))


def test_batch_is_a_function_of_the_step_alone():
    examples = random_examples(50, 12)
    options = {"seq_len": 16, "batch_rows": 4, "seed": 5, "packing": True}
    stream = example_stream(examples, epochs=4, **options)
    backwards = {k: stream.batch(k) for k in reversed(range(len(stream)))}
    # More steps, or another machine, change no batch; neither does what came before it.
    other = example_stream(examples, steps=40, **options)
    for step in range(len(stream) - 1):
        for name, array in other.batch(step).items():
            assert (array == backwards[step][name]).all()


def test_processes_hold_slices_of_the_batch():
    stream = example_stream(random_examples(50, 12), seq_len=16, batch_rows=6, seed=0, epochs=1)
    whole = stream.batch(2)
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        for name, array in stream.batch(2, rows).items():
            assert (array == whole[name][rows]).all()


def test_row_multiple_adds_empty_rows_and_keeps_the_order():
    examples = random_examples(40, 12)
    options = {"seq_len": 16, "batch_rows": 6, "seed": 0, "steps": 5}
    plain, padded = (
        example_stream(examples, **options),
        example_stream(examples, **options, row_multiple=4),
    )
    assert (plain.rows_per_batch, padded.rows_per_batch) == (6, 8)
    for step in range(5):
        batch = padded.batch(step)
        assert (batch["tokens"][:6] == plain.batch(step)["tokens"]).all()
        assert not batch["segment_ids"][6:].any() and not batch["loss_weights"][6:].any()


def test_last_batch_of_a_run_is_filled_with_empty_rows():
    stream = example_stream(random_examples(10, 12), seq_len=12, batch_rows=4, seed=0, epochs=1)
    assert len(stream) == 3
    last = stream.batch(2)
    assert last["segment_ids"].any(axis=1).tolist() == [True, True, False, False]
    assert last["loss_weights"][2:].sum() == 0
    # A run of a number of steps goes on into the next epoch instead.
    longer = example_stream(random_examples(10, 12), seq_len=12, batch_rows=4, seed=0, steps=3)
    assert longer.batch(2)["segment_ids"].any(axis=1).all()
    assert all(len(row) for row in longer.plan_rows(2))


def test_epoch_and_fill():
    examples = random_examples(10, 12)
    stream = example_stream(examples, seq_len=12, batch_rows=4, seed=0, epochs=2)
    assert [stream.epoch(k) for k in range(6)] == [0, 0.4, 0.8, 1.2, 1.6, 2.0]
    assert stream.fill == pytest.approx(len(examples.tokens) / 120)


def test_steps_out_of_range_and_both_lengths():
    examples = random_examples(10, 12)
    stream = example_stream(examples, seq_len=12, batch_rows=4, seed=0, epochs=1)
    for step in (-1, 3):
        with pytest.raises(IndexError, match=f"step {step} of 3"):
            stream.batch(step)
    for lengths in ({}, {"epochs": 1, "steps": 1}):
        with pytest.raises(ValueError, match="wanted one of them"):
            example_stream(examples, seq_len=12, batch_rows=4, seed=0, **lengths)


def test_prefetch_gives_the_batches_in_order():
    stream = example_stream(
        random_examples(80, 12), seq_len=16, batch_rows=4, seed=0, packing=True, epochs=2
    )
    batches = list(prefetch(stream, range(3, len(stream)), rows=slice(1, 3)))
    assert len(batches) == len(stream) - 3
    for step, batch in enumerate(batches, 3):
        expected = stream.batch(step, slice(1, 3))
        assert batch.keys() == expected.keys()
        for name, array in batch.items():
            assert (array == expected[name]).all()
