"""From a config to the step of a run, with the shapes and places of all it takes.

Training compiles what is built here; nothing is allocated yet, so it can be traced and compiled
for machines that are not there.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.model import abstract_params, graph_definition
from easylm.models.llama.sharding import execution_on, param_shardings
from easylm.optimizer import adafactor, adamw, lion
from easylm.schedules import (
    constant_schedule,
    cosine_schedule,
    linear_schedule,
    warmup_steps,
    wsd_schedule,
)
from easylm.sharding import batch_sharding
from easylm.trainers.config import RunConfig
from easylm.trainers.options import OptimizerConfig
from easylm.trainers.step import (
    Batch,
    LossFn,
    TrainState,
    jit_step,
    make_train_step,
    state_shardings,
)


@dataclasses.dataclass(frozen=True)
class Program:
    """The step of a run.

    Attributes:
      step: (state, batch) -> (state, metrics), to be jitted.
      state: TrainState of jax.ShapeDtypeStruct, with shardings.
      batch: of jax.ShapeDtypeStruct, with shardings.
      graph: the static half of the model, which `nnx.merge` joins with params.
      optimizer: its update rule.
      schedule: learning rate of step i, counted from 0.
      mesh: where it runs.
    """

    step: Callable[[TrainState, Batch], tuple[TrainState, dict]]
    state: TrainState
    batch: Batch
    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    mesh: Mesh

    @property
    def shardings(self) -> TrainState:
        """The NamedSharding of each array of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)

    def jitted(self):
        """The step jitted with its placements; the state it is given is consumed."""
        return jit_step(self.step, self.shardings, self.mesh)


def build(
    config: RunConfig,
    *,
    model: LlamaConfig,
    mesh: Mesh,
    loss_fn: LossFn,
    batch: Batch,
    total_steps: int,
) -> Program:
    """Builds the step of a run.

    Args:
      config: the run's.
      model: sizes of the model.
      mesh: where it runs.
      loss_fn: the objective, see trainers/step.py.
      batch: of jax.ShapeDtypeStruct, rows as they lie on the mesh, empty ones included.
      total_steps: of the run; the learning rate depends on it.
    """
    graph = model_graph(config, model, mesh)
    schedule, optimizer = make_optimizer(config.optimizer, total_steps)
    params = abstract_params(model, jnp.dtype(config.param_dtype))
    shardings = state_shardings(params, param_shardings(model, mesh), optimizer, mesh)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params)
    )
    return Program(
        step=make_train_step(
            graph, loss_fn, optimizer, micro_batches=config.micro_batches, seed=config.seed
        ),
        state=jax.tree.map(_placed, state, shardings),
        batch=jax.tree.map(lambda leaf: _placed(leaf, batch_sharding(mesh)), batch),
        graph=graph,
        optimizer=optimizer,
        schedule=schedule,
        mesh=mesh,
    )


def model_graph(config: RunConfig, model: LlamaConfig, mesh: Mesh) -> nnx.GraphDef:
    """The static half of a model that computes as the config says; see `graph_definition`."""
    execution = execution_on(
        model,
        mesh,
        compute_dtype=jnp.dtype(config.compute_dtype),
        remat=config.remat,
        attention_backend=config.attention,
    )
    return graph_definition(model, execution)


def _placed(leaf, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def make_optimizer(
    options: OptimizerConfig, total_steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """(learning rate of step i, counted from 0; the update rule that follows it)."""
    schedule = make_schedule(options, total_steps)
    common = {"weight_decay": options.weight_decay, "clip_norm": options.clip_norm}
    if options.name == "adafactor":
        return schedule, adafactor(schedule, **common)
    common |= {"b1": options.b1, "b2": options.b2, "mu_dtype": jnp.dtype(options.mu_dtype)}
    if options.name == "lion":
        return schedule, lion(schedule, **common)
    return schedule, adamw(schedule, eps=options.eps, **common)


def make_schedule(options: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of step i, counted from 0."""
    peak, final = options.learning_rate, options.final_ratio
    warmup = warmup_count(options, total_steps)
    if options.schedule == "constant":
        return constant_schedule(peak, warmup)
    if options.schedule == "wsd":
        return wsd_schedule(peak, warmup, total_steps, options.decay_ratio, final)
    falling = {"linear": linear_schedule, "cosine": cosine_schedule}[options.schedule]
    return falling(peak, warmup, total_steps, final)


def warmup_count(options: OptimizerConfig, total_steps: int) -> int:
    """Steps in which the learning rate rises."""
    if options.warmup_steps is not None:
        return min(options.warmup_steps, total_steps)
    return warmup_steps(options.warmup_ratio, total_steps)
