"""The preference objective beside transformers and torch: packing, gradients, steps, metrics."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from easylm.config import from_config_dict, to_config_dict
from easylm.data.encode import Examples
from easylm.data.pair_batches import pair_stream, pairs_per_row
from easylm.data.pairs import Pairs
from easylm.models.llama.model import graph_definition
from easylm.models.llama.sharding import execution_on, param_shardings
from easylm.sharding import batch_sharding, make_mesh
from easylm.trainers.build import make_optimizer
from easylm.trainers.config import DpoConfig
from easylm.trainers.dpo import abstract_pairs, check_first_step, dpo_loss, pair_logprobs
from easylm.trainers.evaluate import evaluator
from easylm.trainers.options import DpoOptions, OptimizerConfig
from easylm.trainers.place import batches_on
from easylm.trainers.step import init_state, jit_step, make_train_step, state_shardings
from tests.tiny import hf_llama, native

COUNT = 16
SEQ_LEN = 150
BETA = 0.1


def random_pairs(count: int = COUNT, *, seed: int) -> Pairs:
    """Pairs of random ids: a prompt of 2 to 5 tokens, answers of 2 to 7."""
    rng = np.random.default_rng(seed)
    encoded = []
    for _ in range(count):
        prompt = rng.integers(3, 67, rng.integers(2, 6))
        for _ in range(2):
            answer = rng.integers(3, 67, rng.integers(2, 8))
            mask = np.r_[np.zeros(len(prompt)), np.ones(len(answer))]
            encoded.append((np.r_[prompt, answer].astype(np.int32), mask.astype(np.uint8)))
    nothing = np.full(count, np.nan, np.float32)
    return Pairs(Examples.concatenate(encoded), np.arange(count, dtype=np.uint64), nothing)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    # Of these pairs a rejected answer, and not one of the last batch, has the largest log-ratio.
    return random_pairs(seed=1)


@functools.cache
def graph(**options) -> nnx.GraphDef:
    config, _ = native(hf_llama())
    mesh = make_mesh("1,1,1", jax.devices()[:1])
    return graph_definition(config, execution_on(config, mesh, **options))


def logps_of_torch(model, pairs: Pairs) -> torch.Tensor:
    """Summed log-probabilities [pairs, 2] of chosen and rejected; each sequence in its own row."""
    examples = [pairs.sequences.example(index) for index in range(len(pairs.sequences))]
    ids, masks = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(part) for part in parts], batch_first=True)
        for parts in zip(*examples, strict=True)
    )
    # Padding comes after the tokens, where causal attention does not see it.
    logprobs = model(ids.long()).logits.log_softmax(-1)[:, :-1]
    of_targets = logprobs.gather(2, ids[:, 1:, None].long())[..., 0]
    return (of_targets * masks[:, 1:]).sum(1).reshape(-1, 2)


@functools.cache
def forward(**options):
    @jax.jit
    def run(params, batch):
        return pair_logprobs(nnx.merge(graph(**options), params), batch, 13)

    return run


def logps_of_rows(pairs: Pairs, params, rows: list[list[int]], seq_len: int, **options):
    """The same [pairs, 2] where each row holds the pairs of `rows`."""
    stream = pair_stream(pairs, seq_len=seq_len, packing=True, batch_rows=1, seed=0, epochs=1)
    batch = stream.lay_out([np.array(ids) for ids in rows], [0] * len(rows))
    sums = jax.device_get(forward(**options)(params, batch))
    found = np.full((len(pairs), 2), np.nan, np.float32)
    for row, ids in enumerate(rows):
        for place, index in enumerate(ids):
            found[index] = sums.chosen[row, place], sums.rejected[row, place]
            _, mask = pairs.sequences.example(2 * index)
            assert sums.chosen_tokens[row, place] == mask.sum()
        # Beyond the pairs of a row there is nothing.
        np.testing.assert_array_equal(sums.rejected_tokens[row, len(ids) :], 0)
        np.testing.assert_array_equal(sums.chosen[row, len(ids) :], 0)
    return found


@pytest.mark.parametrize("attention_backend", ["reference", "blockwise"])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_packed_pairs_have_the_log_probabilities_of_separate_forwards(
    pairs, rows, attention_backend
):
    model = hf_llama()
    _, params = native(model)
    with torch.no_grad():
        wanted = logps_of_torch(model, pairs).numpy()
    layout = [list(range(first, min(first + rows, COUNT))) for first in range(0, COUNT, rows)]
    found = logps_of_rows(pairs, params, layout, SEQ_LEN, attention_backend=attention_backend)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_row_may_be_as_long_as_a_pair_or_longer(pairs):
    _, params = native(hf_llama())
    alone = [[index] for index in range(COUNT)]
    short = logps_of_rows(pairs, params, alone, int(pairs.lengths.max()))
    padded = logps_of_rows(pairs, params, alone, SEQ_LEN)
    np.testing.assert_allclose(padded, short, rtol=1e-6)


def reference_by_us(pairs: Pairs, params) -> tuple[np.ndarray, np.ndarray]:
    chosen, rejected = logps_of_rows(pairs, params, [[i] for i in range(len(pairs))], SEQ_LEN).T
    return chosen, rejected


def torch_loss(model, reference: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Rafailov et al. 2023, eq. 7, written out."""
    ratios = logps_of_torch(model, pairs) - reference
    return -torch.nn.functional.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()


def test_gradients_are_those_of_torch(pairs):
    model, other = hf_llama(), hf_llama(seed=1)
    _, params = native(model)
    with torch.no_grad():
        reference = logps_of_torch(other, pairs)
    torch_loss(model, reference, pairs).backward()
    loss_fn = dpo_loss(DpoOptions(beta=BETA), loss_chunk=13)
    arrays = reference.numpy().T
    stream = pair_stream(
        pairs, tuple(arrays), seq_len=90, packing=True, batch_rows=8, seed=0, epochs=1
    )

    @jax.jit
    @jax.grad
    def gradients(params, batch):
        loss, weight, _ = loss_fn(nnx.merge(graph(), params), batch, jax.random.key(0))
        return loss / weight

    found = jax.device_get(gradients(params, stream[0]))  # before the memory they share changes
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    _, wanted = native(model)
    norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(wanted)))
    for leaf, right in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(leaf, right, rtol=0, atol=1e-5 * norm)


@pytest.mark.parametrize("learning_rate, tolerance", [(1e-3, 1e-3), (2e-5, 2e-5)])
def test_steps_have_the_losses_of_torch(pairs, learning_rate, tolerance):
    options = OptimizerConfig(learning_rate=learning_rate, warmup_steps=2)
    model, steps = hf_llama(), 20
    config, params = native(model)
    _, optimizer = make_optimizer(options, steps)
    mesh = make_mesh("1,1,1", jax.devices()[:1])
    shardings = state_shardings(params, param_shardings(config, mesh), optimizer, mesh)
    loss_fn = dpo_loss(DpoOptions(beta=BETA), loss_chunk=13)
    step_fn = make_train_step(graph(), loss_fn, optimizer, micro_batches=2, seed=0)
    step_fn = jit_step(step_fn, shardings, mesh)
    stream = pair_stream(
        pairs,
        reference_by_us(pairs, params),
        seq_len=90,
        packing=True,
        batch_rows=2,
        seed=0,
        steps=steps,
    )
    state, losses = init_state(jax.device_put(params, shardings.params), optimizer, shardings), []
    for step in range(steps):
        state, metrics = step_fn(state, jax.device_put(stream[step], batch_sharding(mesh)))
        losses.append(float(metrics["loss"]))
    with torch.no_grad():
        reference = logps_of_torch(model, pairs)
    adamw = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0)
    schedule = transformers.get_linear_schedule_with_warmup(adamw, 2, steps)
    wanted = []
    for step in range(steps):
        ids = np.concatenate(stream.plan_rows(step))
        loss = torch_loss(model, reference[ids], chosen_pairs(pairs, ids))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        adamw.step()
        schedule.step()
        adamw.zero_grad()
        wanted.append(loss.item())
    np.testing.assert_allclose(losses, wanted, rtol=0, atol=tolerance)
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)


def chosen_pairs(pairs: Pairs, ids) -> Pairs:
    """The pairs `ids`, in their order."""
    sides = [pairs.sequences.example(2 * index + side) for index in ids for side in (0, 1)]
    return Pairs(Examples.concatenate(sides), pairs.ids[ids], pairs.margins[ids])


def metrics_of(pairs: Pairs, *, micro_batches=1, mesh="1,1,1", loss="sigmoid", batch_rows=8):
    """What a step says of the policy beside the reference of another seed."""
    config, params = native(hf_llama())
    _, other = native(hf_llama(seed=1))
    devices = jax.devices() if mesh != "1,1,1" else jax.devices()[:1]
    mesh = make_mesh(mesh, devices)
    _, optimizer = make_optimizer(OptimizerConfig(), 1)
    shardings = state_shardings(params, param_shardings(config, mesh), optimizer, mesh)
    loss_fn = dpo_loss(DpoOptions(beta=BETA, loss=loss), loss_chunk=13)
    model = graph_definition(config, execution_on(config, mesh))
    step_fn = make_train_step(model, loss_fn, optimizer, micro_batches=micro_batches, seed=0)
    stream = pair_stream(
        pairs,
        reference_by_us(pairs, other),
        seq_len=90,
        packing=True,
        batch_rows=batch_rows,
        seed=0,
        epochs=1,
    )
    state = init_state(jax.device_put(params, shardings.params), optimizer, shardings)
    batch = jax.device_put(stream[0], batch_sharding(mesh))
    _, metrics = jit_step(step_fn, shardings, mesh)(state, batch)
    return {name: float(value) for name, value in metrics.items()}


def scored_tokens(pairs: Pairs) -> np.ndarray:
    """Of both answers, [pairs, 2]."""
    masks, starts = pairs.sequences.loss_mask, pairs.sequences.offsets[:-1]
    return np.add.reduceat(masks, starts, dtype=int).reshape(-1, 2)


@pytest.fixture(scope="module")
def whole(pairs):
    return metrics_of(pairs)


def test_metrics_are_those_of_all_pairs(pairs, whole):
    policy, reference = (
        logps_of_rows(pairs, native(hf_llama(seed=seed))[1], [[i] for i in range(COUNT)], SEQ_LEN)
        for seed in (0, 1)
    )
    ratios = (policy - reference).astype(np.float64)
    rewards = BETA * ratios
    tokens = scored_tokens(pairs)
    per_token = np.abs(ratios) / tokens
    assert whole["weight"] == COUNT
    wanted = {
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).mean(),
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean(),
        "logps/chosen": policy[:, 0].mean(),
        "logps/rejected": policy[:, 1].mean(),
        "reference/loss": np.log(2),
        "reference/mean_abs_logratio": per_token.mean(),
        "reference/max_abs_logratio": per_token[:, 1].max(),
        "loss": np.log1p(np.exp(rewards[:, 1] - rewards[:, 0])).mean(),
        "target_tokens": tokens.sum(),
        "tokens": len(pairs.sequences.tokens),
    }
    assert 0 < wanted["rewards/accuracies"] < 1
    for name, value in wanted.items():
        assert whole[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("options", [{"micro_batches": 4}, {"mesh": "2,2,2"}])
def test_metrics_depend_on_no_division_of_the_batch(pairs, whole, options):
    found = metrics_of(pairs, **options)
    assert found == pytest.approx(whole, rel=1e-5)


def test_metrics_without_a_reference(pairs, whole):
    found = metrics_of(pairs, loss="simpo")
    assert {name for name in whole if name not in found} == {
        "reference/loss",
        "reference/mean_abs_logratio",
        "reference/max_abs_logratio",
    }
    policy = logps_of_rows(pairs, native(hf_llama())[1], [[i] for i in range(COUNT)], SEQ_LEN)
    rewards = BETA * policy / scored_tokens(pairs)
    assert found["rewards/chosen"] == pytest.approx(rewards[:, 0].mean(), rel=1e-5)
    assert found["rewards/rejected"] == pytest.approx(rewards[:, 1].mean(), rel=1e-5)
    assert found["logps/chosen"] == pytest.approx(whole["logps/chosen"], rel=1e-6)


def test_held_out_pairs_are_summed_over_batches(pairs, whole):
    """Evaluated in several batches, with rows that stay empty, the means are those of one step."""
    config, params = native(hf_llama())
    _, other = native(hf_llama(seed=1))
    mesh = make_mesh("1,1,1", jax.devices()[:1])
    stream = pair_stream(
        pairs,
        reference_by_us(pairs, other),
        seq_len=90,
        packing=True,
        batch_rows=3,
        seed=3,
        epochs=1,
    )

    shardings = SimpleNamespace(params=param_shardings(config, mesh))
    program = SimpleNamespace(graph=graph(), mesh=mesh, shardings=shardings)
    loss_fn = dpo_loss(DpoOptions(beta=BETA), loss_chunk=13)
    assert len(stream) > 1
    found = evaluator(program, loss_fn, lambda: batches_on(mesh, stream))(params)
    del found["eval/seconds"]
    for name, value in found.items():
        assert value == pytest.approx(whole[name.removeprefix("eval/")], rel=1e-5), name
    assert "eval/reference/max_abs_logratio" in found


def test_shapes_to_compile_for_are_those_of_batches(pairs):
    stream = pair_stream(pairs, seq_len=90, packing=True, batch_rows=3, seed=0, epochs=1)
    shapes = abstract_pairs(3, 90, pairs_per_row(pairs, 90, packing=True))
    real = {name: (array.shape, array.dtype) for name, array in stream[0].items()}
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()} == real


def config_of(**overrides):
    config = to_config_dict(DpoConfig)
    config.update(init_from="somewhere", steps=1, batch_rows=1, **overrides)
    config.data.sources = "pairs.jsonl"
    return from_config_dict(DpoConfig, config)


@pytest.mark.parametrize(
    "compute_dtype, loss, wanted, ratio, passes",
    [
        ("float32", np.log(2) + 9e-6, np.log(2), 2e-5, True),
        ("float32", np.log(2) + 1.1e-5, np.log(2), 2e-5, False),
        ("float32", np.log(2) - 1.1e-5, np.log(2), 2e-5, False),
        ("float32", 24.998, 25.0, 5e-7, True),
        ("float32", 24.998, 25.0, 1.1e-5, False),
        ("bfloat16", 0.75, np.log(2), 0.049, True),
        ("bfloat16", np.log(2), np.log(2), 0.051, False),
    ],
)
def test_the_first_step_must_be_that_of_the_reference(compute_dtype, loss, wanted, ratio, passes):
    check = check_first_step(config_of(compute_dtype=compute_dtype))
    metrics = {"loss": loss, "reference/loss": wanted, "reference/mean_abs_logratio": ratio}
    if passes:
        check(metrics)
    else:
        with pytest.raises(FloatingPointError, match="policy is still the reference"):
            check(metrics)
