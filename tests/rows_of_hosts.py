"""One of several hosts: notes the rows that it gets of a stream of batches, on several meshes.

    python -m tests.rows_of_hosts FOLDER --coordinator=HOST:PORT --processes=N --process=I

Writes FOLDER/I.npz. Of each mesh it has "MESH laid out" (rows that were built, of all batches) and
for each batch and each of its arrays "MESH STEP NAME", int32 or float32 [rows, seq], with the
numbers of these rows as "MESH STEP NAME rows". A row that is on several devices is there as often.
"""

import sys

import jax
import numpy as np
from jax.sharding import Mesh

from easylm import hosts
from easylm.data.batches import BatchStream
from easylm.data.encode import Examples
from easylm.data.example_batches import example_stream
from easylm.hosts.flags import parse_place
from easylm.sharding import MESH_AXES, make_mesh, row_groups
from easylm.trainers.place import batches_on

MESHES = ("1,8,1", "2,2,2", "1,2,4", "1,1,8")


def stream_for(groups: int) -> BatchStream:
    """Batches of six rows, or more where so many groups of devices do not divide them."""
    rng = np.random.default_rng(0)
    examples = Examples.concatenate(
        [(rng.integers(1, 1000, n), rng.integers(0, 2, n)) for n in rng.integers(2, 20, 30)]
    )
    options = {"seq_len": 24, "seed": 0, "packing": True, "epochs": 2}
    return example_stream(examples, batch_rows=6, row_multiple=groups, **options)


def meshes() -> dict[str, Mesh]:
    """Of all devices; "torus" has those of a process apart from one another."""
    found = {shape: make_mesh(shape) for shape in MESHES}
    apart = np.array(jax.devices()).reshape(jax.process_count(), -1).T.reshape(1, 8, 1)
    return {**found, "torus": Mesh(apart, MESH_AXES)}


def rows_on(mesh: Mesh) -> dict[str, np.ndarray]:
    """What this process gets there, by the names that follow the mesh's."""
    stream = stream_for(row_groups(mesh))
    laid_out, lay_out = [], stream.lay_out

    def noted(rows, epochs):
        laid_out.append(len(rows))
        return lay_out(rows, epochs)

    stream.lay_out = noted
    found = {}
    for step, batch in enumerate(batches_on(mesh, stream)):
        for name, array in batch.items():
            shards, numbers = array.addressable_shards, np.arange(len(array))
            found[f"{step} {name}"] = np.concatenate([shard.data for shard in shards])
            rows = [numbers[shard.index[0]] for shard in shards]
            found[f"{step} {name} rows"] = np.concatenate(rows)
    return {**found, "laid out": np.array(sum(laid_out))}


def main(folder: str, *flags: str) -> None:
    hosts.join(parse_place(dict(flag.removeprefix("--").split("=") for flag in flags)))
    found = {}
    for shape, mesh in meshes().items():
        for key, array in rows_on(mesh).items():
            found[f"{shape} {key}"] = array
    np.savez(f"{folder}/{hosts.index()}.npz", **found)
    hosts.wait_for_all("the rows")


if __name__ == "__main__":
    main(*sys.argv[1:])
