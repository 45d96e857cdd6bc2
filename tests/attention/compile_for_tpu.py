"""Compile forward and backward of every TPU backend for real TPUs, without one.

Prints a JSON object: case -> bytes of temporaries on a core. Run by test_compile_tpu.py in a
process of its own, because libtpu and the virtual CPU devices of the tests do not share one.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from easylm.attention import attention

BATCH, SEQ, HEADS, KV_HEADS = 2, 1024, 8, 2
# topology, its extra arguments, mesh shape, backend, dtype, head_dim
CASES = {
    "v4 splash": ("v4:2x2x1", {"chip_config_name": "megacore"}, (1, 2, 2), "auto", "bfloat16", 128),
    "v4 splash 64": (
        "v4:2x2x1",
        {"chip_config_name": "megacore"},
        (1, 2, 2),
        "splash",
        "bfloat16",
        64,
    ),
    "v5e splash": ("v5e:2x2", {}, (2, 1, 2), "auto", "bfloat16", 128),
    "v3 flash": ("v3:2x2", {}, (2, 1, 2), "flash", "bfloat16", 128),
    "v3 flash 64": ("v3:2x2", {}, (2, 1, 2), "flash", "bfloat16", 64),
    "v3 blockwise": ("v3:2x2", {}, (2, 1, 2), "auto", "bfloat16", 128),
}


def compiled(topology, options, mesh_shape, backend, dtype, head_dim):
    description = topologies.get_topology_desc(topology, platform="tpu", **options)
    devices = np.array(description.devices)[: np.prod(mesh_shape)].reshape(mesh_shape)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    attend = functools.partial(attention, backend=backend, mesh=mesh)

    def loss(q, k, v, positions, segment_ids):
        out = attend(q, k, v, positions=positions, segment_ids=segment_ids)
        return out.astype(jnp.float32).sum()

    def abstract(shape, dtype, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), *spec))
        return jax.ShapeDtypeStruct((BATCH, SEQ, *shape), dtype, sharding=sharding)

    q = abstract((HEADS, head_dim), dtype, None, "tensor", None)
    kv = abstract((KV_HEADS, head_dim), dtype, None, "tensor", None)
    tokens = abstract((), jnp.int32)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return gradient.lower(q, kv, kv, tokens, tokens).compile()


def main():
    found = {}
    for name, case in CASES.items():
        program = compiled(*case)
        found[name] = {
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            "kernels": program.as_text().count("tpu_custom_call"),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
