"""Training on packed rows beside torch and transformers on padded ones; no example sees another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from easylm.attention import attention
from easylm.data.batches import build_rows
from easylm.data.encode import Examples
from easylm.models.llama.model import graph_definition
from easylm.models.llama.sharding import execution_on
from easylm.sharding import make_mesh
from easylm.trainers.build import make_optimizer
from easylm.trainers.options import OptimizerConfig
from easylm.trainers.sft import sft_loss
from easylm.trainers.step import TrainState, make_train_step
from tests.tiny import hf_llama, native

STEPS, PER_STEP, SEQ_LEN = 20, 4, 32


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(STEPS * PER_STEP):
        tokens = rng.integers(3, 67, rng.integers(4, 17)).astype(np.int32)
        mask = (np.arange(len(tokens)) >= rng.integers(1, len(tokens))).astype(np.uint8)
        encoded.append((tokens, mask))
    return Examples.concatenate(encoded)


def torch_losses(model, examples, options, warmup):
    """Losses and gradient norms of a plain loop, one example a row, padded on the right."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=options.learning_rate,
        betas=(options.b1, options.b2),
        eps=options.eps,
        weight_decay=0.0,
    )
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, warmup, STEPS)
    losses = []
    for step in range(STEPS):
        rows = [examples.example(step * PER_STEP + i) for i in range(PER_STEP)]
        longest = max(len(tokens) for tokens, _ in rows)
        ids, labels, mask = (torch.zeros(PER_STEP, longest, dtype=torch.long) for _ in range(3))
        labels.fill_(-100)
        for row, (tokens, trained) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            labels[row, : len(tokens)] = torch.tensor(np.where(trained, tokens, -100))
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "learning_rate, warmup, b2, tolerance",
    [(1e-3, 1, 0.999, 1e-3), (2e-5, 0, 0.95, 2e-5), (2e-5, 6, 0.999, 2e-5)],
)
def test_twenty_steps_have_the_losses_of_torch(examples, learning_rate, warmup, b2, tolerance):
    options = OptimizerConfig(learning_rate=learning_rate, b2=b2, warmup_steps=warmup)
    model = hf_llama()
    config, params = native(model)
    _, optimizer = make_optimizer(options, STEPS)
    execution = execution_on(config, make_mesh("1,1,1", jax.devices()[:1]))
    step_fn = jax.jit(
        make_train_step(
            graph_definition(config, execution),
            sft_loss(loss_chunk=12),
            optimizer,
            micro_batches=1,
            seed=0,
        )
    )
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    losses = []
    for step in range(STEPS):
        a, b, c, d = range(step * PER_STEP, (step + 1) * PER_STEP)
        state, metrics = step_fn(state, build_rows(examples, [[a, b], [c, d]], SEQ_LEN))
        losses.append(float(metrics["loss"]))
    wanted = torch_losses(model.train(), examples, options, warmup)
    np.testing.assert_allclose(losses, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("remat", ["none", "block"])
def test_the_loss_of_an_example_has_no_gradient_in_the_others_of_its_row(backend, remat):
    """Each example has tokens of its own, so rows of the embedding's gradient tell them apart."""
    config, params = native(hf_llama())
    tokens = [np.arange(first, first + 9, dtype=np.int32) for first in (5, 20, 40)]
    encoded = [(ids, np.ones(9, np.uint8)) for ids in tokens]
    examples = Examples.concatenate(encoded)
    mesh = make_mesh("1,1,1", jax.devices()[:1])
    execution = execution_on(config, mesh, attention_backend=backend, remat=remat)
    loss_fn = sft_loss(loss_chunk=5)

    @jax.jit
    def embedding_gradient(batch):
        def loss(table):
            changed = {**params, "embed_tokens": {"embedding": table}}
            model = nnx.merge(graph_definition(config, execution), changed)
            return loss_fn(model, batch, jax.random.key(0))[0]

        return jax.grad(loss)(params["embed_tokens"]["embedding"])

    for scored in range(3):
        weights = [[float(other == scored) for other in range(3)]]
        batch = build_rows(examples, [[0, 1, 2]], SEQ_LEN, weights)
        touched = np.flatnonzero(np.abs(embedding_gradient(batch)).sum(axis=1))
        # The last token of an example predicts nothing.
        assert touched.tolist() == tokens[scored][:-1].tolist()


def test_the_gradient_would_show_a_leak():
    """Without segments the same rows do leak: the test above can fail."""
    q = jax.random.normal(jax.random.key(0), (1, 6, 2, 4))
    positions, segments = jnp.arange(6)[None], jnp.array([[1, 1, 1, 2, 2, 2]])

    def of_second(k, segment_ids):
        out = attention(q, k, k, positions=positions, segment_ids=segment_ids, backend="reference")
        return out[:, 3:].sum()

    leaks = jax.grad(of_second)(q, jnp.ones_like(segments))
    assert np.abs(leaks[:, :3]).sum() > 0
    np.testing.assert_array_equal(jax.grad(of_second)(q, segments)[:, :3], 0)
