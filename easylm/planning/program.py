"""The step of a run on a mesh: the very program that training compiles, with nothing allocated."""

import dataclasses
import math

import jax

from easylm.models.llama.sharding import check_mesh
from easylm.planning.inputs import Inputs
from easylm.sharding import make_mesh, row_groups, rows_on
from easylm.trainers.build import Program, build
from easylm.trainers.config import DpoConfig, RunConfig
from easylm.trainers.dpo import dpo_objective
from easylm.trainers.sft import sft_objective


def build_program(config: RunConfig, inputs: Inputs, devices: list[jax.Device]) -> Program:
    """The step of a run on these devices, which need not be there.

    Raises:
      InputError: the mesh does not go with the devices or the model.
    """
    mesh = make_mesh(config.mesh, devices)
    check_mesh(inputs.model, mesh)
    rows = rows_on(row_groups(mesh), inputs.stream.batch_rows, config.micro_batches)
    if isinstance(config, DpoConfig):
        objective = dpo_objective(config, rows, inputs.pairs_per_row)
    else:
        objective = sft_objective(config, rows)
    return build(
        config,
        model=inputs.model,
        mesh=mesh,
        loss_fn=objective.loss_fn,
        batch=objective.batch,
        total_steps=len(inputs.stream),
    )


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes that a device holds from step to step, by their shapes."""

    params: int
    opt_state: int
    batch: int


def state_bytes(program: Program) -> StateBytes:
    """What the arguments of a step take on a device, before the compiler lays them out."""
    state = program.state
    return StateBytes(*map(_device_bytes, (state.params, state.opt_state, program.batch)))


def _device_bytes(tree) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
