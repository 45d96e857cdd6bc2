"""The batches of a stream on the devices of a mesh."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from easylm.data.batches import BatchStream, prefetch
from easylm.sharding import batch_sharding
from easylm.trainers.step import Batch


def batches_on(
    mesh: Mesh, stream: BatchStream, steps: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Batches as global arrays; this process builds only its own rows.

    Args:
      mesh: splits the rows.
      stream: gives the batches.
      steps: which ones, from 0; None: all.
    """
    sharding = batch_sharding(mesh)
    total = stream.rows_per_batch
    places = sharding.addressable_devices_indices_map((total,)).values()
    bounds = [rows.indices(total) for (rows,) in places]
    first, last = min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds)

    def place(rows: np.ndarray) -> jax.Array:
        def part(index):
            start, stop, _ = index[0].indices(total)
            return rows[start - first : stop - first]

        return jax.make_array_from_callback((total, *rows.shape[1:]), sharding, part)

    steps = range(len(stream)) if steps is None else steps
    for batch in prefetch(stream, steps, slice(first, last)):
        yield {name: place(rows) for name, rows in batch.items()}
