"""The learning rate of step i, counted from 0: a linear warm-up, then one of four ways down."""

import math

import optax


def warmup_steps(ratio: float, total_steps: int) -> int:
    """Steps of warm-up for a share of all steps, rounded up, as the Hugging Face Trainer does."""
    return math.ceil(ratio * total_steps)


def linear_schedule(
    peak: float, warmup: int, total_steps: int, final_ratio: float = 0.0
) -> optax.Schedule:
    """Up from 0 to `peak` in `warmup` steps, then straight down to `final_ratio * peak`.

    peak * i / warmup for i < warmup, so the first step changes nothing where there is a warm-up;
    then, down to 0, peak * (total_steps - i) / (total_steps - warmup), as transformers'
    get_linear_schedule_with_warmup.
    """
    fall = optax.linear_schedule(peak, peak * final_ratio, max(1, total_steps - warmup))
    return _after_warmup(peak, warmup, fall)


def cosine_schedule(
    peak: float, warmup: int, total_steps: int, final_ratio: float = 0.0
) -> optax.Schedule:
    """The warm-up, then half a cosine down to `final_ratio * peak`.

    (1 + cos(pi * t)) / 2 of the way, t from 0 to 1 after the warm-up (Loshchilov and Hutter 2017,
    arXiv:1608.03983, eq. 5, one period), as transformers' get_cosine_schedule_with_warmup.
    """
    fall = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup), alpha=final_ratio)
    return _after_warmup(peak, warmup, fall)


def constant_schedule(peak: float, warmup: int) -> optax.Schedule:
    """The warm-up, then `peak`."""
    return _after_warmup(peak, warmup, optax.constant_schedule(peak))


def wsd_schedule(
    peak: float, warmup: int, total_steps: int, decay_ratio: float, final_ratio: float = 0.0
) -> optax.Schedule:
    """Warm-up, stable, decay: `peak` until the last `decay_ratio` of all steps, then linear.

    Hu et al. 2024, arXiv:2404.06395, section 4; the decay is a straight line to
    `final_ratio * peak`. Warm-up and decay may not overlap: the decay is shortened then.
    """
    decay = max(1, min(math.ceil(decay_ratio * total_steps), total_steps - warmup))
    fall = optax.linear_schedule(
        peak, peak * final_ratio, decay, transition_begin=total_steps - warmup - decay
    )
    return _after_warmup(peak, warmup, fall)


def _after_warmup(peak: float, warmup: int, schedule: optax.Schedule) -> optax.Schedule:
    if warmup == 0:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), schedule], [warmup])
