"""AdamW, its learning-rate schedule and gradient clipping, with the arithmetic of torch."""

import math

import jax
import jax.numpy as jnp
import optax

# Whether weight decay applies, by the last name of a parameter's path. The number of axes does not
# tell: the norms of stacked layers are [layers, embed].
_DECAYED = {"kernel": True, "embedding": True, "scale": False, "bias": False}


def warmup_steps(ratio: float, total_steps: int) -> int:
    """Steps of warm-up for a share of all steps, rounded up, as the Hugging Face Trainer does."""
    return math.ceil(ratio * total_steps)


def linear_schedule(peak: float, warmup: int, total_steps: int) -> optax.Schedule:
    """Learning rate of step i, counted from 0: up from 0 to `peak`, then down to 0.

    peak * i / warmup for i < warmup, so the first step changes nothing where there is a warm-up;
    then peak * (total_steps - i) / (total_steps - warmup), as transformers'
    get_linear_schedule_with_warmup.
    """
    if warmup == 0:
        return optax.linear_schedule(peak, 0.0, total_steps)
    rise = optax.linear_schedule(0.0, peak, warmup)
    if warmup == total_steps:
        return rise
    fall = optax.linear_schedule(peak, 0.0, total_steps - warmup)
    return optax.join_schedules([rise, fall], [warmup])


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
    """
    optimizer = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decay_mask)
    if clip_norm is None:
        return optimizer
    return optax.chain(clip_by_global_norm(clip_norm), optimizer)
