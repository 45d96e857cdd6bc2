"""Programs compiled for several devices, for what the tests count in them."""

import functools

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Spec = PartitionSpec


@functools.cache
def make_mesh(topology: str, *sizes: int) -> Mesh:
    """A mesh of axes "x", "y" of a TPU that is not there, or ("cpu") of this process."""
    devices = jax.devices("cpu")
    if topology != "cpu":
        pytest.importorskip("libtpu", reason="the TPU's compiler is not installed")
        devices = topologies.get_topology_desc(topology, platform="tpu").devices
    axes = ("x", "y")[: len(sizes)]
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, axes, axis_types=types, devices=devices)


def array(mesh: Mesh, shape, *spec, dtype="float32") -> jax.ShapeDtypeStruct:
    """An argument to compile for."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, Spec(*spec)))


def text(function, *arguments, **options) -> str:
    """The compiled program of a function, for arguments without values."""
    return compiled(function, *arguments, **options).as_text()


def compiled(function, *arguments, **options) -> jax.stages.Compiled:
    """The same before it is written down."""
    # A program for a TPU that is not there cannot be read back from the cache of programs.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return jax.jit(function, **options).lower(*arguments).compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def per_device(mesh: Mesh, function, spec, out, *shapes) -> str:
    """The compiled program of what each device does with its part, all parts placed alike."""
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False)
    return text(mapped, *(array(mesh, shape, *spec) for shape in shapes))
