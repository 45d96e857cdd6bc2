"""The optimizer against torch.optim.AdamW and transformers' schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from easylm.optimizer import adafactor, adamw, clip_by_global_norm, decay_mask, lion
from easylm.schedules import (
    constant_schedule,
    cosine_schedule,
    linear_schedule,
    warmup_steps,
    wsd_schedule,
)

STEPS = 20
SHAPES = {
    "embed_tokens": {"embedding": (7, 4)},
    "layers": {
        "input_layernorm": {"scale": (2, 4)},
        "q_proj": {"kernel": (2, 4, 2, 3), "bias": (2, 2, 3)},
    },
    "norm": {"scale": (4,)},
}


def random_tree(rng, scale):
    shapes, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda node: isinstance(node, tuple))
    leaves = [np.asarray(scale * rng.standard_normal(shape), np.float32) for shape in shapes]
    return jax.tree.unflatten(treedef, leaves)


def torch_run(params, gradients, *, warmup, weight_decay, clip_norm, b2):
    """Parameters after each step of torch's AdamW with Hugging Face's linear schedule."""
    leaves = [torch.nn.Parameter(torch.tensor(leaf)) for leaf in jax.tree.leaves(params)]
    groups = [
        {"params": [leaf], "weight_decay": weight_decay * decayed}
        for leaf, decayed in zip(leaves, jax.tree.leaves(decay_mask(params)), strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, b2), eps=1e-8)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, warmup, STEPS)
    states, rates = [], []
    for gradient in gradients:
        for leaf, value in zip(leaves, jax.tree.leaves(gradient), strict=True):
            leaf.grad = torch.tensor(value)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(leaves, clip_norm)
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
        states.append([leaf.detach().numpy().copy() for leaf in leaves])
    return states, rates


@pytest.mark.parametrize(
    "warmup, weight_decay, clip_norm, b2",
    [(0, 0.0, None, 0.999), (1, 0.1, 1.0, 0.95), (6, 0.3, 1000.0, 0.999), (20, 0.0, 0.5, 0.95)],
)
def test_twenty_steps_equal_torch(warmup, weight_decay, clip_norm, b2):
    rng = np.random.default_rng(0)
    params = random_tree(rng, 1.0)
    gradients = [random_tree(rng, 10.0 ** rng.uniform(-3, 1)) for _ in range(STEPS)]
    options = {"weight_decay": weight_decay, "clip_norm": clip_norm, "b2": b2}
    expected, rates = torch_run(params, gradients, warmup=warmup, **options)

    schedule = linear_schedule(1e-3, warmup, STEPS)
    optimizer = adamw(schedule, b1=0.9, eps=1e-8, **options)
    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params)
    for step, gradient in enumerate(gradients):
        assert float(schedule(step)) == pytest.approx(rates[step], rel=1e-6, abs=1e-12)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for found, wanted in zip(jax.tree.leaves(params), expected[step], strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_decay_spares_norms_and_biases_of_stacked_layers():
    mask = decay_mask(jax.tree.map(np.zeros, SHAPES, is_leaf=lambda node: isinstance(node, tuple)))
    assert mask == {
        "embed_tokens": {"embedding": True},
        "layers": {
            "input_layernorm": {"scale": False},
            "q_proj": {"kernel": True, "bias": False},
        },
        "norm": {"scale": False},
    }


def test_a_parameter_of_unknown_kind_is_an_error():
    with pytest.raises(KeyError, match="gate"):
        decay_mask({"layers": {"gate": np.zeros(3)}})


@pytest.mark.parametrize("max_norm", [1e-4, 1.0, 1e4])
def test_clipping_equals_torch(max_norm):
    # Adam forgets the scale of gradients, so clipping is compared by itself; at 1e-4 the 1e-6
    # beside the norm is a hundredth of it.
    gradients = random_tree(np.random.default_rng(1), 1e-4)
    leaves = [torch.nn.Parameter(torch.tensor(leaf)) for leaf in jax.tree.leaves(gradients)]
    for leaf in leaves:
        leaf.grad = leaf.detach().clone()
    torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    clip = clip_by_global_norm(max_norm)
    found, _ = clip.update(gradients, clip.init(gradients))
    for leaf, wanted in zip(jax.tree.leaves(found), leaves, strict=True):
        np.testing.assert_allclose(leaf, wanted.grad.numpy(), rtol=1e-5)


def test_clipping_keeps_the_dtype_and_leaves_small_gradients_alone():
    clip = clip_by_global_norm(1.0)
    small = {"a": jnp.full(3, 0.5, jnp.bfloat16)}
    found, _ = clip.update(small, clip.init(small))
    assert found["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["a"], small["a"])


def test_warmup_rounds_up():
    assert warmup_steps(0.03, 20) == 1
    assert warmup_steps(0.0, 20) == 0
    assert warmup_steps(0.1, 20) == 2


def test_the_first_step_of_a_warmup_and_the_end_are_zero():
    schedule = linear_schedule(2e-5, 3, 30)
    assert float(schedule(0)) == 0.0
    assert float(schedule(3)) == pytest.approx(2e-5)
    assert float(schedule(30)) == 0.0


def rates(schedule):
    return [float(schedule(step)) for step in range(STEPS)]


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_cosine_is_that_of_transformers(warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, STEPS)
    wanted = []
    for _ in range(STEPS):
        wanted.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(rates(cosine_schedule(1e-3, warmup, STEPS)), wanted, atol=1e-9)


def test_constant_and_the_ends_of_those_that_fall():
    np.testing.assert_allclose(rates(constant_schedule(2.0, 4)), [0, 0.5, 1, 1.5] + [2.0] * 16)
    for schedule in (
        linear_schedule(2.0, 4, STEPS, 0.1),
        cosine_schedule(2.0, 4, STEPS, 0.1),
        wsd_schedule(2.0, 4, STEPS, 0.25, 0.1),
    ):
        np.testing.assert_allclose([schedule(4), schedule(STEPS)], [2.0, 0.2], rtol=1e-6)


def test_wsd_stays_at_its_peak_until_the_decay():
    wanted = [0, 1, 2, 3] + [4.0] * 11 + [4.0, 3.2, 2.4, 1.6, 0.8]  # step 20 would be 0
    np.testing.assert_allclose(rates(wsd_schedule(4.0, 4, STEPS, 0.25)), wanted, rtol=1e-6)
    shortened = wsd_schedule(4.0, 18, STEPS, 0.5)
    np.testing.assert_allclose([shortened(18), shortened(19)], [4.0, 2.0], rtol=1e-6)


def one_step(rule, params, gradients):
    updates, _ = rule.update(gradients, rule.init(params), params)
    return optax.apply_updates(params, updates)


def test_the_first_step_of_lion_is_the_sign_of_the_gradient():
    rng = np.random.default_rng(0)
    params, gradients = random_tree(rng, 1.0), random_tree(rng, 1.0)
    rule = lion(optax.constant_schedule(0.1), b1=0.9, b2=0.99, weight_decay=0.5, clip_norm=1.0)
    wanted = jax.tree.map(
        lambda p, g, decayed: p - 0.1 * (np.sign(g) + 0.5 * decayed * p),
        params,
        gradients,
        decay_mask(params),
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        one_step(rule, params, gradients),
        wanted,
    )


def test_the_first_step_of_adafactor_is_relative_to_the_size_of_the_weights():
    params = {"kernel": jnp.full((4, 3), 2.0), "scale": jnp.full(3, 1e-5)}
    gradients = {"kernel": jnp.full((4, 3), -7.0), "scale": jnp.full(3, 5.0)}
    rule = adafactor(optax.constant_schedule(0.1), weight_decay=0.5, clip_norm=None)
    # The gradient over its own root mean square is a sign; the scale is the root mean square of
    # the parameter, at least 1e-3.
    stepped = one_step(rule, params, gradients)
    np.testing.assert_allclose(stepped["kernel"], 2 + 0.1 * 2 - 0.1 * 0.5 * 2, rtol=1e-5)
    np.testing.assert_allclose(stepped["scale"], 1e-5 - 0.1 * 1e-3, rtol=1e-5)


def test_adafactor_keeps_rows_and_columns_of_large_matrices_only():
    params = {"kernel": jnp.zeros((128, 256)), "scale": jnp.zeros(3)}
    rule = adafactor(optax.constant_schedule(0.1), weight_decay=0.0, clip_norm=1.0)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(rule.init(params)))
    assert sizes[-2:] == [128, 256]


@pytest.mark.parametrize("mu_dtype", [jnp.float32, jnp.bfloat16])
def test_moments_have_their_own_dtype_and_parameters_keep_theirs(mu_dtype):
    params = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), random_tree(np.random.default_rng(0), 1)
    )
    options = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0, "mu_dtype": mu_dtype}
    rule = adamw(optax.constant_schedule(0.1), eps=1e-8, **options)
    state = rule.init(params)
    moments = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
    assert {leaf.dtype for leaf in jax.tree.leaves(moments[0])} == {jnp.dtype(mu_dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(moments[1])} == {jnp.dtype(jnp.float32)}
    stepped = one_step(rule, params, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(stepped)} == {jnp.dtype(jnp.bfloat16)}
    lions = lion(optax.constant_schedule(0.1), **options).init(params)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(optax.tree.get(lions, "mu"))}
    assert dtypes == {jnp.dtype(mu_dtype)}


def test_bfloat16_parameters_are_updated_in_float32():
    """The same step as on float32 copies, rounded once."""
    rng = np.random.default_rng(0)
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_tree(rng, 1.0))
    high = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    rule = adamw(
        optax.constant_schedule(0.1), b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1, clip_norm=1.0
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)),
        one_step(rule, low, low),
        one_step(rule, high, high),
    )
