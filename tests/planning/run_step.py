"""Runs two steps of a config and prints by how many bytes the process grew at most.

Run by test_memory.py in a process of its own: this is the run that was planned there.
"""

import ctypes
import dataclasses
import re

import jax
import numpy as np

from easylm.config import from_config_dict, load
from easylm.models.llama.model import init_params
from easylm.models.llama.presets import PRESETS
from easylm.sharding import make_mesh
from easylm.trainers.build import Program, build
from easylm.trainers.config import SftConfig
from easylm.trainers.sft import sft_objective
from easylm.trainers.step import init_state

# 60 million parameters, 240 MB in float32.
MODEL = dataclasses.replace(
    PRESETS["llama2_7b"],
    vocab_size=4096,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=128,
)


def program(mesh: str) -> Program:
    """The step of SFT on 8 devices."""
    config = from_config_dict(SftConfig, load("sft/quickstart").config)
    data = dataclasses.replace(config.data, seq_len=64)
    config = dataclasses.replace(config, mesh=mesh, remat="block", data=data)
    mesh = make_mesh(config.mesh, jax.devices()[:8])
    objective = sft_objective(config, rows=8)
    return build(
        config,
        model=MODEL,
        mesh=mesh,
        loss_fn=objective.loss_fn,
        batch=objective.batch,
        total_steps=10,
    )


def resident(field: str) -> int:
    """VmRSS, bytes of memory of this process, or VmHWM, their peak."""
    with open("/proc/self/status", encoding="ascii") as file:
        return int(re.search(rf"{field}:\s+(\d+) kB", file.read())[1]) * 1024


def main(mesh: str) -> None:
    planned = program(mesh)
    step = planned.jitted().lower(planned.state, planned.batch).compile()
    # What the compiler freed would else serve the run, which would seem to take less.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    make = jax.jit(lambda key: init_params(MODEL, key), out_shardings=planned.shardings.params)
    state = init_state(make(jax.random.key(0)), planned.optimizer, planned.shardings)
    batch = jax.tree.map(
        lambda leaf: jax.device_put(np.ones(leaf.shape, leaf.dtype), leaf.sharding), planned.batch
    )
    jax.block_until_ready(state)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # VmHWM starts again from here: random weights take more than a step
    for _ in range(2):
        state, _ = step(state, batch)
        jax.block_until_ready(state)
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    import sys

    main(sys.argv[1])
