"""The device mesh, and the way from names of array axes to places on it."""

import math
import re
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from easylm.config import parse_mesh
from easylm.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")  # rows of a batch are split over both

MeshAxes = str | tuple[str, ...] | None


def make_mesh(shape: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices, with axes data, fsdp, tensor.

    Args:
      shape: "data,fsdp,tensor", three integers, at most one of them -1 (whatever is left).
      devices: by default all devices of all processes.
    Raises:
      InputError: the shape does not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _fill_in(parse_mesh(shape), len(devices), shape)
    # An axis may go around a part of a torus: meshes of any sizes are laid out on any slice.
    layout = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(layout, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _fill_in(sizes: tuple[int, int, int], count: int, shape: str) -> tuple[int, int, int]:
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and count % known == 0:
        return tuple(count // known if size == -1 else size for size in sizes)
    if known == count and -1 not in sizes:
        return sizes
    divisors = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
    raise InputError(
        f"mesh: found '{shape}' on {count} devices; wanted data * fsdp * tensor = {count} "
        f"(sizes that work are divisors of it: {divisors}; one may be -1)"
    )


def row_groups(mesh: Mesh) -> int:
    """Number of device groups that hold different rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def rows_on(groups: int, batch_rows: int, micro_batches: int) -> int:
    """Rows of a step as they lie on a mesh, the empty ones that fill it included.

    Args:
      groups: of devices that hold different rows.
      batch_rows: that hold examples.
      micro_batches: that a group's rows are computed in.
    """
    multiple = groups * micro_batches
    return -(-batch_rows // multiple) * multiple


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [batch, ...]: rows split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def partition_spec(axes: Sequence[str | None], rules: Mapping[str, MeshAxes]) -> PartitionSpec:
    """Mesh axes of an array whose axes have these logical names; None is not split."""
    return PartitionSpec(*(None if name is None else rules[name] for name in axes))


def logical_axes(path: str, table: Mapping[str, tuple[str | None, ...]]) -> tuple[str | None, ...]:
    """The axes of the parameter at `path`, from the one pattern of `table` that matches it.

    Raises:
      ValueError: no pattern matches, or more than one.
    """
    matches = [pattern for pattern in table if re.fullmatch(pattern, path)]
    if len(matches) != 1:
        found = "no rule" if not matches else f"{len(matches)} rules {matches}"
        raise ValueError(f"parameter {path} matches {found} of the sharding table; wanted one")
    return table[matches[0]]


def tree_axes(params: dict, table: Mapping[str, tuple[str | None, ...]]) -> dict:
    """The tree of `params` (anything with .shape at its leaves) with logical axes as leaves.

    Raises:
      ValueError: a parameter matches no rule or several, or has another number of axes.
    """

    def axes_of(path, leaf):
        name = "/".join(str(key.key) for key in path)
        axes = logical_axes(name, table)
        if len(axes) != len(leaf.shape):
            raise ValueError(f"parameter {name} has shape {leaf.shape}; the table says {axes}")
        return axes

    return jax.tree_util.tree_map_with_path(axes_of, params)


def tree_shardings(params: dict, table, rules: Mapping[str, MeshAxes], mesh: Mesh) -> dict:
    """The tree of `params` with a NamedSharding for each leaf; raises as `tree_axes`."""
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, partition_spec(axes, rules)),
        tree_axes(params, table),
        is_leaf=lambda node: isinstance(node, tuple),
    )
