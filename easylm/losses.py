"""Log-probabilities of targets without the logits of a whole row, and losses made of them."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def token_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, vocab_size: int, chunk: int
) -> jax.Array:
    """log softmax(hidden @ head)[targets], for `chunk` positions of each row at a time.

    Logits, softmax and their sums are float32 whatever the dtype of hidden and head; no more
    than [batch, chunk, vocab] of them exist at once, in the forward pass or the backward.

    Args:
      hidden: [batch, seq, embed].
      head: [embed, padded vocab]; columns from vocab_size on take no part.
      targets: [batch, seq] int32, below vocab_size.
      vocab_size: size of the vocabulary.
      chunk: positions of a row whose logits exist at once.
    Returns:
      [batch, seq] float32.
    """
    return _forward(hidden, head, targets, vocab_size, chunk)[0]


def _forward(hidden, head, targets, vocab_size, chunk):
    def of_chunk(_, inputs):
        states, ids = inputs
        return None, _logprobs(_logits(states, head, vocab_size), ids)

    chunks = (_to_chunks(hidden, chunk), _to_chunks(targets, chunk))
    _, (logprobs, normalizers) = jax.lax.scan(of_chunk, None, chunks)
    length = targets.shape[1]
    logprobs, normalizers = (_from_chunks(x, length) for x in (logprobs, normalizers))
    return logprobs, (hidden, head, targets, normalizers)


def _backward(vocab_size, chunk, residuals, cotangent):
    """The gradients, from logits computed a second time."""
    hidden, head, targets, normalizers = residuals

    def of_chunk(head_gradient, inputs):
        states, ids, normalizer, weight = inputs
        logits = _logits(states, head, vocab_size)
        d_head, d_states = _gradients(states, head, logits, ids, normalizer, weight)
        return head_gradient + d_head, d_states

    arrays = (hidden, targets, normalizers, cotangent)
    head_gradient, d_hidden = jax.lax.scan(
        of_chunk, jnp.zeros(head.shape, jnp.float32), tuple(_to_chunks(x, chunk) for x in arrays)
    )
    d_hidden = _from_chunks(d_hidden, targets.shape[1]).astype(hidden.dtype)
    return d_hidden, head_gradient.astype(head.dtype), None


token_logprobs.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy_of_states(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    vocab_size: int,
    chunk: int,
) -> jax.Array:
    """The sum that `cross_entropy` makes of `token_logprobs`, with one product less.

    Since the weights are known, the forward pass of a gradient computes the gradients too, from
    the logits it has: three products with the head instead of four. Without a gradient it is
    one. Arguments are those of the two functions.
    """
    logprobs = token_logprobs(hidden, head, targets, vocab_size, chunk)
    return cross_entropy(logprobs, weights)[0]


def _sum_and_gradients(hidden, head, targets, weights, vocab_size, chunk):
    def of_chunk(head_gradient, inputs):
        states, ids, weight = inputs
        logits = _logits(states, head, vocab_size)
        logprobs, normalizer = _logprobs(logits, ids)
        d_head, d_states = _gradients(states, head, logits, ids, normalizer, -weight)
        return head_gradient + d_head, (logprobs, d_states)

    arrays = tuple(_to_chunks(x, chunk) for x in (hidden, targets, weights))
    start = jnp.zeros(head.shape, jnp.float32)
    head_gradient, (logprobs, d_hidden) = jax.lax.scan(of_chunk, start, arrays)
    logprobs, d_hidden = (_from_chunks(x, targets.shape[1]) for x in (logprobs, d_hidden))
    gradients = d_hidden.astype(hidden.dtype), head_gradient.astype(head.dtype)
    return cross_entropy(logprobs, weights)[0], gradients


def _scale_gradients(vocab_size, chunk, gradients, cotangent):
    del vocab_size, chunk
    return *((cotangent * x).astype(x.dtype) for x in gradients), None, None


cross_entropy_of_states.defvjp(_sum_and_gradients, _scale_gradients)


def _logits(states: jax.Array, head: jax.Array, vocab_size: int) -> jax.Array:
    """[batch, chunk, padded vocab] float32, -inf in the padding."""
    logits = jnp.einsum("bce,ev->bcv", states, head, preferred_element_type=jnp.float32)
    if head.shape[1] == vocab_size:
        return logits
    return jnp.where(_columns(logits) < vocab_size, logits, -jnp.inf)


def _logprobs(logits: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log-probability of each target, log of the softmax's sum), both [batch, chunk]."""
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    # A sum over a mask, not a gather: it stays local where the vocabulary is sharded.
    target_logits = jnp.sum(jnp.where(_is_target(ids, logits), logits, 0.0), axis=-1)
    return target_logits - normalizer, normalizer


def _gradients(states, head, logits, ids, normalizer, weight) -> tuple[jax.Array, jax.Array]:
    """Gradients of sum(weight * logprob) by head, float32, and states.

    d logprob / d logits = one_hot(target) - softmax.
    """
    softmax = jnp.exp(logits - normalizer[..., None])
    d_logits = weight[..., None] * (_is_target(ids, logits) - softmax)
    d_logits = d_logits.astype(head.dtype)
    # Summed over chunks in float32: rounding each chunk to bfloat16 biases the head.
    d_head = jnp.einsum("bce,bcv->ev", states, d_logits, preferred_element_type=jnp.float32)
    return d_head, jnp.einsum("bcv,ev->bce", d_logits, head)


def _is_target(ids: jax.Array, logits: jax.Array) -> jax.Array:
    return ids[..., None] == _columns(logits)


def _columns(logits: jax.Array) -> jax.Array:
    return jnp.arange(logits.shape[-1])[None, None, :]


def _to_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[batch, seq, ...] -> [chunks, batch, size, ...] with size <= chunk, zeros at the end.

    As few chunks as `chunk` allows, all of one size, so that little is filled up.
    """
    chunk = -(-x.shape[1] // -(-x.shape[1] // chunk))
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % chunk)
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _from_chunks(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `_to_chunks`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def cross_entropy(logprobs: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of -weight * logprob, sum of weights), float32: divide once, over the global batch.

    Args:
      logprobs, weights: [batch, seq] float32; weight 0 where there is no target.
    """
    # A position without a target may hold any finite value; it must not reach the sum.
    return -jnp.sum(jnp.where(weights > 0, weights * logprobs, 0.0)), jnp.sum(weights)
