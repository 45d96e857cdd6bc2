"""The update rules: AdamW and clipping with the arithmetic of torch, Adafactor and Lion by optax.

The state of every rule is float32 whatever the dtype of the parameters, `mu_dtype` apart.
"""

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

# Whether weight decay applies, by the last name of a parameter's path. The number of axes does not
# tell: the norms of stacked layers are [layers, embed].
_DECAYED = {"kernel": True, "embedding": True, "scale": False, "bias": False}


def decay_mask(params: dict) -> dict:
    """The tree of `params` with True where weight decay applies: matrices, not norms or biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _DECAYED[path[-1].key], params)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients by min(1, max_norm / (norm + 1e-6)), as torch's clip_grad_norm_ does.

    optax's own clipping has no 1e-6, which shows in comparisons over many steps.
    """

    def clip(gradients, params):
        del params
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(gradients) + 1e-6))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)

    return optax.stateless(clip)


def adamw(
    learning_rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float | None,
    mu_dtype: DTypeLike = jnp.float32,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, alg. 2) on clipped gradients.

    As in torch, eps is added outside the root, after bias correction, and the decay of a step is
    learning rate * weight_decay * parameter.

    Args:
      learning_rate: of each step, counted from 0.
      b1: decay of the mean of gradients.
      b2: decay of the mean of squared gradients.
      eps: added to the root of the mean of squares.
      weight_decay: of the parameters that `decay_mask` selects.
      clip_norm: largest global norm of the gradients, or None.
      mu_dtype: of the mean of gradients.
    """
    rule = optax.adamw(
        learning_rate, b1, b2, eps, mu_dtype=mu_dtype, weight_decay=weight_decay, mask=decay_mask
    )
    return _clipped(rule, clip_norm)


def lion(
    learning_rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    weight_decay: float,
    clip_norm: float | None,
    mu_dtype: DTypeLike = jnp.float32,
) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023, arXiv:2302.06675, alg. 2) on clipped gradients; arguments as adamw's.

    Its updates are signs: it wants a learning rate 3 to 10 times smaller than AdamW.
    """
    rule = optax.lion(
        learning_rate, b1, b2, mu_dtype=mu_dtype, weight_decay=weight_decay, mask=decay_mask
    )
    return _clipped(rule, clip_norm)


def adafactor(
    learning_rate: optax.Schedule, *, weight_decay: float, clip_norm: float | None
) -> optax.GradientTransformation:
    """Adafactor without momentum (Shazeer and Stern 2018, arXiv:1804.04235, alg. 4).

    The rate of a parameter is learning rate * max(its root mean square, 1e-3), and its update is
    clipped to a root mean square of 1. Squares are factored over the two largest axes where both
    have 128 or more. The layers of a model are stacked in one array, so these root mean squares
    are of all layers together. Decay is decoupled: learning rate * weight_decay * parameter.
    """
    rule = optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return _clipped(rule, clip_norm)


def _clipped(rule: optax.GradientTransformation, clip_norm: float | None):
    """`rule` on clipped gradients, in float32 whatever the dtype of parameters and gradients."""
    if clip_norm is not None:
        rule = optax.chain(clip_by_global_norm(clip_norm), rule)

    def init(params):
        return rule.init(_float32(params))

    def update(gradients, state, params):
        return rule.update(_float32(gradients), state, _float32(params))

    return optax.GradientTransformation(init, update)


def _float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
