"""Which token comes next."""

import jax
import jax.numpy as jnp


def next_tokens(
    logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_p: jax.Array
) -> jax.Array:
    """The likeliest tokens at temperature 0, tokens drawn by their probabilities above it.

    Args:
      logits: [batch, vocab] float32.
      keys: [batch] random keys; a row's token depends on its own key and logits alone.
      temperature: scalar, 0 or more; divides the logits.
      top_p: scalar, above 0; below 1 tokens are drawn from the nucleus of that mass.
    Returns:
      [batch] int32.
    """

    def draw():
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
        # Sorting a vocabulary takes longer than drawing from it.
        scaled = jax.lax.cond(top_p < 1, lambda: nucleus(scaled, top_p), lambda: scaled)
        return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)

    def likeliest():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, draw, likeliest)


def nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits with -inf outside the nucleus (Holtzman et al. 2020, arXiv:1904.09751, section 3.1).

    The nucleus is the smallest set of likeliest tokens with a total probability of at least top_p;
    tokens exactly as likely as its last one belong to it too.

    Args:
      logits: [batch, vocab] float32.
      top_p: scalar, above 0.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    descending = jnp.sort(probabilities, axis=-1, descending=True)
    before = jnp.cumsum(descending, axis=-1) - descending
    least = jnp.min(descending, axis=-1, keepdims=True, where=before < top_p, initial=1.0)
    return jnp.where(probabilities >= least, logits, -jnp.inf)
