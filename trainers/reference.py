"""One pass of the reference model over the pairs: what it says of them, once and for all."""

import contextlib
import functools
import hashlib
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
import tqdm
from flax import nnx
from jax.sharding import Mesh

from easylm import hosts
from easylm.data.batches import BatchStream
from easylm.data.pair_batches import pair_stream
from easylm.data.pairs import Pairs
from easylm.errors import PreemptedError
from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.sharding import param_shardings
from easylm.reference import ReferenceParts, ReferenceTable
from easylm.sharding import batch_sharding, replicated
from easylm.trainers.build import model_graph
from easylm.trainers.config import DpoConfig
from easylm.trainers.dpo import pair_logprobs
from easylm.trainers.place import batches_on
from easylm.trainers.step import Batch

# How much work a crash can cost at most, about.
SECONDS_BETWEEN_PARTS = 60.0


def reference_pass(
    config: DpoConfig,
    model: LlamaConfig,
    mesh: Mesh,
    params: dict,
    pairs: Pairs,
    known: ReferenceTable,
    parts: ReferenceParts,
    *,
    batch_rows: int,
) -> ReferenceTable:
    """Computes what is not known of the pairs, and adds it to `parts` on the way.

    The pairs are packed as for training, in batches that depend on data and options alone; one
    whose pairs are all known is left out. So a pass that was interrupted ends with the same bits.

    Args:
      config: of the run.
      model: sizes of the reference.
      mesh: where it runs.
      params: of the reference, on the mesh.
      pairs: of one source.
      known: of these parameters; what `parts` holds, read before.
      parts: where it is kept.
      batch_rows: rows of a batch, as many as the mesh takes.
    Returns:
      `known` and what is new, all `pairs` among it.
    Raises:
      FloatingPointError: one is not finite.
      PreemptedError: somebody wants the run to stop; what was computed is kept.
    """
    stream = pair_stream(
        pairs,
        seq_len=config.data.seq_len,
        packing=config.data.packing,
        batch_rows=batch_rows,
        seed=config.seed,
        epochs=1,
    )
    held = [np.concatenate(stream.plan_rows(step)) for step in range(len(stream))]
    todo = [step for step, indices in enumerate(held) if not known.has(pairs.ids[indices]).all()]
    if not todo:
        return known
    done = len(pairs) - sum(len(held[step]) for step in todo)
    results = _computed(config, model, mesh, params, stream, pairs, todo)
    with (
        hosts.stop_noticed() as stopped,
        contextlib.closing(results),
        _bar(len(pairs), done) as bar,
    ):
        written = time.monotonic()
        fresh = []

        def keep() -> None:
            nonlocal known, fresh, written
            part = ReferenceTable.union(fresh).without(known)
            if hosts.is_first() and len(part):
                # Named by what it holds: a run in another order must not overwrite it.
                parts.add(hashlib.sha256(part.ids).hexdigest()[:32], part)
            known, fresh, written = known.merge(part), [], time.monotonic()

        for step, table in results:
            fresh.append(table)
            bar.update(len(held[step]))
            if time.monotonic() - written > SECONDS_BETWEEN_PARTS or step == todo[-1]:
                keep()
            if stopped():  # asked equally often on all hosts, each of which has its own clock
                keep()
                raise PreemptedError(
                    f"stopped in the pass of the reference, after {bar.n:,} of {len(pairs):,} "
                    "pairs; they are kept, and the same command goes on from there"
                )
    return known


def _computed(
    config: DpoConfig,
    model: LlamaConfig,
    mesh: Mesh,
    params: dict,
    stream: BatchStream,
    pairs: Pairs,
    todo: list[int],
) -> Iterator[tuple[int, ReferenceTable]]:
    """(step, what the reference says of its pairs), fetched while the next step is computed."""
    graph = model_graph(config, model, mesh)

    @functools.partial(
        jax.jit,
        in_shardings=(param_shardings(model, mesh), batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )
    def logprobs(params: dict, batch: Batch):
        policy = pair_logprobs(nnx.merge(graph, params), batch, config.loss_chunk)
        return policy.chosen, policy.rejected

    def fetched(step: int, output) -> tuple[int, ReferenceTable]:
        rows = stream.plan_rows(step)
        chosen, rejected = (
            np.concatenate([of_row[: len(ids)] for of_row, ids in zip(values, rows, strict=True)])
            for values in jax.device_get(output)
        )
        return step, ReferenceTable(pairs.ids[np.concatenate(rows)], chosen, rejected)

    running = None
    for step, batch in zip(todo, batches_on(mesh, stream, todo), strict=True):
        if running is not None:
            yield fetched(*running)
        running = step, logprobs(params, batch)
    yield fetched(*running)


def _bar(total: int, done: int) -> tqdm.tqdm:
    return tqdm.tqdm(
        total=total,
        initial=done,
        desc="reference",
        unit=" pairs",
        ncols=80,
        mininterval=0.2 if sys.stderr.isatty() else 30.0,
    )
