"""Preference losses against formulas written apart from them, in float64 numpy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm.trainers.options import DpoOptions
from easylm.trainers.preference_losses import Logprobs, pair_losses, rewards


class Pairs(NamedTuple):
    """pi and ref of chosen (c) and rejected (r) answers, their tokens, and margins."""

    pi_c: np.ndarray
    pi_r: np.ndarray
    ref_c: np.ndarray
    ref_r: np.ndarray
    n_c: np.ndarray
    n_r: np.ndarray
    margin: np.ndarray


def sums(p):
    return p.pi_c - p.ref_c - p.pi_r + p.ref_r


def means(p):
    return (p.pi_c - p.ref_c) / p.n_c - (p.pi_r - p.ref_r) / p.n_r


def nls(x):
    """-log(1 / (1 + exp(-x)))."""
    return np.logaddexp(0.0, -x)


def odds(logprob):
    return np.exp(logprob) / (1 - np.exp(logprob))


def case(formula, **options):
    name = "-".join(f"{key}={value}" for key, value in options.items())
    return pytest.param(options, formula, id=name)


CASES = [
    case(lambda p: nls(0.1 * sums(p)), beta=0.1),
    case(
        lambda p: 0.8 * nls(0.5 * sums(p)) + 0.2 * nls(-0.5 * sums(p)),
        beta=0.5,
        label_smoothing=0.2,
    ),
    case(lambda p: nls(0.3 * sums(p) - 2 * p.margin), beta=0.3, margin_weight=2.0),
    case(lambda p: nls(0.3 * sums(p)) - 0.7 * p.pi_c / p.n_c, beta=0.3, sft_weight=0.7),
    case(
        lambda p: (0.8 * nls(0.5 * sums(p)) - 0.2 * nls(-0.5 * sums(p))) / 0.6,
        loss="robust",
        beta=0.5,
        label_smoothing=0.2,
    ),
    case(lambda p: np.maximum(1 - 0.2 * sums(p), 0), loss="hinge", beta=0.2),
    case(lambda p: (means(p) - 1.25) ** 2, loss="ipo", beta=0.4),
    case(lambda p: (sums(p) - 1.25) ** 2, loss="ipo_sum", beta=0.4),
    case(
        lambda p: 0.9 * nls(5 * means(p)) + 0.1 * nls(-5 * means(p)),
        loss="sigmoid_norm",
        beta=5.0,
        label_smoothing=0.1,
    ),
    case(
        lambda p: nls(2 * p.pi_c / p.n_c - 2 * p.pi_r / p.n_r - 0.8),
        loss="simpo",
        beta=2.0,
        simpo_gamma=0.8,
    ),
    case(
        lambda p: -p.pi_c / p.n_c + 0.6 * np.log1p(odds(p.pi_r / p.n_r) / odds(p.pi_c / p.n_c)),
        loss="orpo",
        beta=0.6,
    ),
    case(
        lambda p: np.log1p(odds(p.pi_r / p.n_r) / odds(p.pi_c / p.n_c)) - 1.5 * p.pi_c / p.n_c,
        loss="orpo",
        beta=1.0,
        sft_weight=0.5,
    ),
]
every_loss = pytest.mark.parametrize(("options", "formula"), CASES)


@pytest.fixture(scope="module")
def pairs():
    """4 x 6 pairs, float32."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 40, (2, 4, 6))
    policy = -tokens * rng.uniform(0.05, 2.5, tokens.shape)
    reference = policy + rng.normal(0, 4, tokens.shape)
    margins = rng.uniform(0, 2, (4, 6))
    return Pairs(*(x.astype(np.float32) for x in (*policy, *reference, *tokens, margins)))


def computed(options, p):
    policy = Logprobs(p.pi_c, p.pi_r, p.n_c, p.n_r)
    return pair_losses(DpoOptions(**options))(policy, p.ref_c, p.ref_r, p.margin)


def gradients(options, p):
    """Of the sum of losses, by pi_c and pi_r."""

    def total(pi_c, pi_r):
        return computed(options, p._replace(pi_c=pi_c, pi_r=pi_r)).sum()

    return jax.grad(total, argnums=(0, 1))(p.pi_c, p.pi_r)


def float64(p):
    return Pairs(*(np.asarray(x, np.float64) for x in p))


@every_loss
def test_values(pairs, options, formula):
    ours = jax.jit(lambda p: computed(options, p))(pairs)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, formula(float64(pairs)), rtol=1e-5, atol=1e-6)


@every_loss
def test_gradients_are_finite_differences(pairs, options, formula):
    p, step = float64(pairs), 1e-5
    for field, ours in zip(("pi_c", "pi_r"), gradients(options, pairs), strict=True):
        up = formula(p._replace(**{field: getattr(p, field) + step}))
        down = formula(p._replace(**{field: getattr(p, field) - step}))
        np.testing.assert_allclose(ours, (up - down) / (2 * step), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "beta", "label_smoothing", "wanted"),
    [
        ("sigmoid", 0.1, 0.0, np.log(2)),
        ("sigmoid", 5.0, 0.3, np.log(2)),
        ("robust", 0.1, 0.3, np.log(2)),
        ("sigmoid_norm", 5.0, 0.0, np.log(2)),
        ("hinge", 0.1, 0.0, 1.0),
        ("ipo", 0.1, 0.0, 25.0),
        ("ipo_sum", 0.5, 0.0, 1.0),
    ],
)
def test_values_where_policy_is_reference(pairs, loss, beta, label_smoothing, wanted):
    options = {"loss": loss, "beta": beta, "label_smoothing": label_smoothing}
    same = pairs._replace(ref_c=pairs.pi_c, ref_r=pairs.pi_r)
    np.testing.assert_allclose(computed(options, same), wanted, rtol=1e-6)


def test_small_differences_of_long_answers_survive_float32():
    # A sum of -4321 is known to 5e-4 only; what it differs by from the reference is exact.
    chosen, reference = np.float32(-123.4567), np.float32(-123.4571)
    rejected = np.float32(-4321.987)
    p = Pairs(chosen, rejected, reference, rejected, 60, 2000, 0)
    wanted = 1 - (float(chosen) - float(reference))
    assert abs(float(computed({"loss": "hinge", "beta": 1.0}, p)) - wanted) < 1e-6


@every_loss
def test_extreme_values_have_finite_losses_and_gradients(options, formula):
    extremes = np.array([1e-6, 0.0, -1e-9, -1e-3, -30.0, -1e4, -1e6], np.float32)
    pi_c, pi_r = (x.ravel() for x in np.meshgrid(extremes, extremes))
    ones = np.ones_like(pi_c)
    p = Pairs(pi_c, pi_r, pi_r[::-1], pi_c[::-1], ones, ones, ones)
    losses = np.asarray(computed(options, p))
    assert np.isfinite(losses).all()
    assert np.isfinite(gradients(options, p)).all()
    # Not all of them are within the reach of the plain formula.
    with np.errstate(all="ignore"):
        wanted = formula(float64(p))
    held = np.isfinite(wanted) & (np.maximum(pi_c, pi_r) <= -1e-3)
    assert held.sum() >= 8
    np.testing.assert_allclose(losses[held], wanted[held], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [case.values[0] for case in CASES], ids=str)
def test_places_without_a_pair_add_nothing(pairs, options):
    weights = np.ones((4, 6), np.float32)
    weights[:, 4:] = 0
    filled = Pairs(*(np.where(weights > 0, x, 0) for x in pairs))

    def weighted(p, weights):
        return jnp.sum(weights * computed(options, p))

    value, gradient = jax.value_and_grad(weighted)(filled, weights)
    present = Pairs(*(x[:, :4] for x in pairs))
    wanted, wanted_gradient = jax.value_and_grad(weighted)(present, weights[:, :4])
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    for ours, theirs in zip(gradient, wanted_gradient, strict=True):
        np.testing.assert_allclose(ours, np.pad(theirs, ((0, 0), (0, 2))), rtol=1e-6)


@pytest.mark.parametrize("options", [case.values[0] for case in CASES], ids=str)
def test_margins_are_read_only_when_weighed(pairs, options):
    missing = pairs._replace(margin=np.full_like(pairs.margin, np.nan))
    finite = np.isfinite(computed(options, missing)).all()
    assert finite == ("margin_weight" not in options)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "sigmoid_norm"])
def test_rewards_are_of_sums(pairs, loss):
    policy = Logprobs(pairs.pi_c, pairs.pi_r, pairs.n_c, pairs.n_r)
    reward = rewards(DpoOptions(beta=0.2, loss=loss))
    chosen, rejected = reward(policy, pairs.ref_c, pairs.ref_r)
    np.testing.assert_allclose(chosen, 0.2 * (pairs.pi_c - pairs.ref_c), rtol=1e-6)
    np.testing.assert_allclose(rejected, 0.2 * (pairs.pi_r - pairs.ref_r), rtol=1e-6)


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_rewards_without_a_reference_are_of_means(pairs, loss):
    policy = Logprobs(pairs.pi_c, pairs.pi_r, pairs.n_c, pairs.n_r)
    reward = rewards(DpoOptions(beta=2.0, loss=loss))
    chosen, rejected = reward(policy, pairs.ref_c, pairs.ref_r)
    np.testing.assert_allclose(chosen, 2 * pairs.pi_c / pairs.n_c, rtol=1e-6)
    np.testing.assert_allclose(rejected, 2 * pairs.pi_r / pairs.n_r, rtol=1e-6)
