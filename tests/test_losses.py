"""Chunked log-probabilities against a float64 log-softmax, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm.losses import cross_entropy, cross_entropy_of_states, token_logprobs

VOCAB, PADDED = 37, 40


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 13, 8)).astype(np.float32)
    head = np.pad(rng.normal(size=(8, VOCAB)).astype(np.float32), ((0, 0), (0, PADDED - VOCAB)))
    return hidden, head, rng.integers(0, VOCAB, (3, 13), dtype=np.int32), rng.normal(size=(3, 13))


def exact(hidden, head, targets):
    logits = hidden.astype(np.float64) @ head[:, :VOCAB].astype(np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logits, targets[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
def test_values_and_gradients(inputs, chunk):
    hidden, head, targets, cotangent = inputs
    ours = token_logprobs(hidden, head, targets, VOCAB, chunk)
    np.testing.assert_allclose(ours, exact(hidden, head, targets), atol=1e-5)

    def weighted(hidden, head):
        return jnp.sum(cotangent * token_logprobs(hidden, head, targets, VOCAB, chunk))

    def plain(hidden, head):
        logprobs = jax.nn.log_softmax(hidden @ head[:, :VOCAB])
        return jnp.sum(cotangent * jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0])

    ours = jax.grad(weighted, argnums=(0, 1))(hidden, head)
    wanted = jax.grad(plain, argnums=(0, 1))(hidden, head)
    for a, b in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("chunk", [4, 13])
def test_gradients_of_the_forward_pass_are_those_of_the_sum(inputs, chunk):
    hidden, head, targets, _ = inputs
    weights = np.random.default_rng(2).uniform(size=targets.shape).astype(np.float32)
    weights[:, :4] = 0.0

    def in_two(hidden, head):
        return cross_entropy(token_logprobs(hidden, head, targets, VOCAB, chunk), weights)[0] * 3

    def in_one(hidden, head):
        return cross_entropy_of_states(hidden, head, targets, weights, VOCAB, chunk) * 3

    wanted, ours = (jax.value_and_grad(f, argnums=(0, 1))(hidden, head) for f in (in_two, in_one))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ours, wanted)
    assert float(in_one(hidden, head)) == float(wanted[0])


def test_logits_are_computed_once():
    hidden, head = jnp.ones((1, 64, 8)), jnp.ones((8, 512))
    targets, weights = jnp.zeros((1, 64), jnp.int32), jnp.ones((1, 64))

    def products(function):
        return str(jax.make_jaxpr(function)(hidden, head)).count("dot_general[")

    def loss(hidden, head):
        return cross_entropy_of_states(hidden, head, targets, weights, 512, 16)

    assert products(loss) == 1
    assert products(jax.grad(loss, argnums=(0, 1))) == 3


def test_bfloat16_states_lose_nothing_in_the_softmax():
    # Sums over 512 tokens within 1e-3 nat of a float64 log-softmax of the same states.
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(1, 512, 32)), jnp.bfloat16)
    head = jnp.asarray(rng.normal(size=(32, VOCAB)), jnp.bfloat16)
    targets = rng.integers(0, VOCAB, (1, 512), dtype=np.int32)
    ours = token_logprobs(hidden, head, targets, VOCAB, 100).sum()
    wanted = exact(np.asarray(hidden, np.float64), np.asarray(head, np.float64), targets).sum()
    assert abs(float(ours) - wanted) < 1e-3


def test_logits_of_a_row_never_exist_at_once():
    hidden, head = jnp.ones((1, 4096, 8)), jnp.ones((8, 512))
    targets = jnp.zeros((1, 4096), jnp.int32)

    def temporaries(chunk):
        def loss(hidden, head):
            return jnp.sum(token_logprobs(hidden, head, targets, 512, chunk))

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    row_of_logits = 4096 * 512 * 4
    assert temporaries(64) < row_of_logits / 4 < row_of_logits < temporaries(4096)


def test_cross_entropy_ignores_positions_without_a_target():
    logprobs = jnp.array([[-1.0, -jnp.inf, -3.0]])
    weights = jnp.array([[1.0, 0.0, 0.5]])
    loss_sum, weight_sum = cross_entropy(logprobs, weights)
    assert (float(loss_sum), float(weight_sum)) == (2.5, 1.5)
    gradient = jax.grad(lambda x: cross_entropy(x, weights)[0])(logprobs)
    np.testing.assert_array_equal(gradient, [[-1.0, 0.0, -0.5]])
