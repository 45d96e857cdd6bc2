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
    # On a torus the rows of one process need not be neighbours.
    own = np.unique(np.concatenate([np.arange(total)[rows] for (rows,) in places]))

    def place(rows: np.ndarray) -> jax.Array:
        def part(index):
            first, last, _ = np.searchsorted(own, index[0].indices(total))
            return rows[first:last]

        return jax.make_array_from_callback((total, *rows.shape[1:]), sharding, part)

    steps = range(len(stream)) if steps is None else steps
    for batch in prefetch(stream, steps, own):
        yield {name: place(rows) for name, rows in batch.items()}
