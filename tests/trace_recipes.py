"""Trace the step of every published recipe on a mesh of its pod's size, with nothing allocated.

Prints a JSON object: recipe -> what was traced. Run by test_recipes.py in a process of its own,
because the tests have 8 virtual devices and a v3-512 has 512.
"""

import json
import math
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=512"

import dataclasses

import jax

from easylm.config import from_config_dict, load
from easylm.models.llama.presets import PRESETS
from easylm.sharding import make_mesh, row_groups
from easylm.trainers.build import build
from easylm.trainers.config import DpoConfig, SftConfig
from easylm.trainers.dpo import dpo_objective
from easylm.trainers.sft import sft_objective

PAIRS_PER_ROW = 16  # of 8,192 tokens; it depends on the data


def traced(name, preset, devices, examples):
    on_pairs = name.startswith("dpo/")
    config = from_config_dict(DpoConfig if on_pairs else SftConfig, load(name).config)
    model = PRESETS[preset]
    positions = config.model.max_position_embeddings or model.max_position_embeddings
    model = dataclasses.replace(model, max_position_embeddings=positions)
    config.check_model(model)
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    groups = row_groups(mesh) * config.micro_batches
    steps = examples * config.epochs // config.batch_examples
    if on_pairs:
        objective = dpo_objective(config, groups, PAIRS_PER_ROW)
    else:
        objective = sft_objective(config, groups)
    program = build(
        config,
        model=model,
        mesh=mesh,
        loss_fn=objective.loss_fn,
        batch=objective.batch,
        total_steps=steps,
    )
    state, metrics = jax.eval_shape(program.step, program.state, program.batch)
    same = jax.tree.map(
        lambda new, old: (new.shape, new.dtype) == (old.shape, old.dtype), state, program.state
    )
    return {
        "mesh": dict(mesh.shape),
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        "state_is_kept": all(jax.tree.leaves(same)),
        "metrics": {metric: [*value.shape] for metric, value in metrics.items()},
        "batch": [*program.batch["tokens"].shape],
        "rates": [float(program.schedule(step)) for step in (0, 300, steps)],
        "steps": steps,
    }


def main():
    recipes = json.loads(sys.argv[1])
    print(json.dumps({name: traced(name, **options) for name, options in recipes.items()}))


if __name__ == "__main__":
    main()
