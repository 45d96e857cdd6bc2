"""One optimizer step: a pure function (state, batch) -> (state, metrics)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from easylm.sharding import batch_sharding, replicated

Batch = dict[str, jax.Array]  # rows first; see easylm/data/batches.py


class Metrics(NamedTuple):
    """What an objective says of a batch beside its loss: scalars by name.

    Attributes:
      counts: sums over the batch.
      means: sums over the batch too, which are divided by the sum of weights as the loss is.
      maxima: largest values in the batch, 0 or more.
    """

    counts: dict[str, jax.Array]
    means: dict[str, jax.Array]
    maxima: dict[str, jax.Array]


# (model, batch, rng) -> (sum of losses, sum of weights, metrics)
LossFn = Callable[[nnx.Module, Batch, jax.Array], tuple[jax.Array, jax.Array, Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes from step to step.

    Attributes:
      step: [] int32, optimizer steps done.
      params: nested dict of arrays.
      opt_state: of the optimizer, sharded like the parameters it belongs to.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def make_train_step(
    graph: nnx.GraphDef,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    micro_batches: int,
    seed: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    """The step that training runs and that plan compiles.

    Gradients, losses and weights are summed over micro-batches and over the mesh, then divided
    once by the global sum of weights.

    Returns:
      step(state, batch) -> (state, {"loss", "grad_norm", "weight", and the loss's metrics}).
    """

    def sums(params, batch, rng):
        loss_sum, weight_sum, metrics = loss_fn(nnx.merge(graph, params), batch, rng)
        return loss_sum, (weight_sum, metrics)

    def step(state: TrainState, batch: Batch):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        if micro_batches == 1:
            gradient_fn = jax.value_and_grad(sums, has_aux=True)
            (loss_sum, (weight, metrics)), gradients = gradient_fn(state.params, batch, rng)
        else:
            parts = _split_rows(batch, micro_batches)
            loss_sum, weight, metrics, gradients = _sum_over(parts, sums, state.params, rng)
        gradients = jax.tree.map(lambda g: g / weight, gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss_sum / weight,
            "grad_norm": optax.tree.norm(gradients),
            "weight": weight,
            **metrics.counts,
            **{name: value / weight for name, value in metrics.means.items()},
            **metrics.maxima,
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def _split_rows(batch: Batch, parts: int) -> Batch:
    """[rows, ...] -> [parts, rows / parts, ...], every device keeping the rows it has."""
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0),
        batch,
    )


def _sum_over(parts: Batch, sums, params: dict, rng: jax.Array):
    """(sum of losses, sum of weights, metrics, gradients) over parts [parts, rows, ...].

    The gradient of each layer is added to the total as soon as the backward pass has it, so there
    is one array of the parameters' size, not a total and the gradient of a part.
    """
    gradients = jax.tree.map(lambda param: jax.new_ref(jnp.zeros_like(param)), params)

    def add(_, part):
        loss_sum, pull_back, (weight, metrics) = jax.vjp(
            lambda params: sums(params, part, rng), params, has_aux=True
        )
        pull_back.with_refs(gradients)(jnp.ones_like(loss_sum))
        return None, (loss_sum, weight, metrics)

    _, (loss_sums, weights, metrics) = jax.lax.scan(add, None, parts)
    total = functools.partial(jnp.sum, axis=0)
    metrics = Metrics(
        counts=jax.tree.map(total, metrics.counts),
        means=jax.tree.map(total, metrics.means),
        maxima=jax.tree.map(functools.partial(jnp.max, axis=0), metrics.maxima),
    )
    return total(loss_sums), total(weights), metrics, jax.tree.map(jax.freeze, gradients)


def state_shardings(
    abstract_params: dict, shardings: dict, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The TrainState tree with a NamedSharding for each array.

    Moments lie where their parameter lies. What is smaller than its parameter, such as factored
    squares, is replicated, as are counters.
    """
    abstract = jax.eval_shape(optimizer.init, abstract_params)

    def place(moment, param, sharding):
        return sharding if moment.shape == param.shape else replicated(mesh)

    opt_state = optax.tree.map_params(
        optimizer,
        place,
        abstract,
        abstract_params,
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )
    return TrainState(replicated(mesh), shardings, opt_state)


def abstract_batch(rows: int, seq_len: int) -> Batch:
    """The shapes and dtypes of a batch, to compile for; see easylm/data/batches.py."""
    names = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: jax.ShapeDtypeStruct((rows, seq_len), jnp.int32) for name in names}
    return {**batch, "loss_weights": jax.ShapeDtypeStruct((rows, seq_len), jnp.float32)}


def jit_step(step, shardings: TrainState, mesh: Mesh):
    """`step` jitted with its placements; the state it is given is consumed."""
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=COMPILER_OPTIONS.get(mesh.devices.flat[0].platform),
    )


# Else the TPU's compiler keeps a bfloat16 copy of all layers' weights beside them, a sixth of the
# state, to save casting a layer each time it is used.
COMPILER_OPTIONS = {"tpu": {"xla_jf_bf16_propagation": "false"}}


def init_state(params: dict, optimizer, shardings: TrainState) -> TrainState:
    """The state before the first step, around parameters already on the mesh."""
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    return TrainState(step, params, opt_state)
