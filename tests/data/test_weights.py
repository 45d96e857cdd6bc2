"""What a trained token weighs: per token, per example, or per group of shuffled examples."""

import numpy as np
import pytest

from easylm.data.encode import Examples
from easylm.data.example_batches import example_stream
from easylm.data.pack import shuffled
from easylm.data.weights import target_counts, token_weights


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    encoded = []
    for index in range(37):
        mask = rng.integers(0, 2, rng.integers(3, 30)).astype(np.uint8)
        mask[-1] = 1  # every example has a target
        encoded.append((np.full(len(mask), index, np.int32), mask))
    return Examples.concatenate(encoded)


def test_targets_leave_out_the_first_token(examples):
    expected = [int(examples.example(i)[1][1:].sum()) for i in range(len(examples))]
    assert target_counts(examples).tolist() == expected
    assert any(examples.loss_mask[examples.offsets[:-1]])  # or the line above says nothing


def test_an_example_weighs_one(examples):
    weights = token_weights(examples, "example", 32, seed=0, epoch=0)
    np.testing.assert_allclose(weights * target_counts(examples), 1, rtol=1e-6)


def test_a_group_of_shuffled_examples_weighs_one(examples):
    weights = token_weights(examples, "microbatch", 8, seed=3, epoch=1)
    totals = weights * target_counts(examples)
    order = shuffled(len(examples), 3, 1)
    for start in range(0, len(examples), 8):
        group = order[start : start + 8]
        assert len(set(weights[group])) == 1
        np.testing.assert_allclose(totals[group].sum(), 1, rtol=1e-6)
    other = token_weights(examples, "microbatch", 8, seed=3, epoch=2)
    assert (weights != other).any()


def streams(examples, weighting):
    for packing, multiple in ((True, 1), (False, 1), (True, 8)):
        yield example_stream(
            examples,
            seq_len=32,
            batch_rows=4,
            seed=5,
            packing=packing,
            loss_weighting=weighting,
            loss_group=8,
            epochs=2,
            row_multiple=multiple,
        )


@pytest.mark.parametrize("weighting", ["token", "example", "microbatch"])
def test_packed_padded_and_sharded_runs_give_each_token_the_same_weight(examples, weighting):
    """All weights of a run, by example (which the tokens name here) and epoch."""
    seen = []
    for stream in streams(examples, weighting):
        weights = {}
        for step in range(len(stream)):
            batch = stream[step]
            for token, weight in zip(batch["tokens"].flat, batch["loss_weights"].flat, strict=True):
                if weight:
                    weights.setdefault(int(token), []).append(float(weight))
        seen.append({token: sorted(values) for token, values in weights.items()})
    assert seen[0] == seen[1] == seen[2]
    assert sum(map(len, seen[0].values())) == 2 * target_counts(examples).sum()
    if weighting == "microbatch":  # five groups an epoch
        total = sum(sum(values) for values in seen[0].values())
        assert total == pytest.approx(2 * 5, rel=1e-6)
