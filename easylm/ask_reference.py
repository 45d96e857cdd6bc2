"""What the reference says of the pairs of a run: read where known, computed where not."""

import os
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from easylm import hosts
from easylm.command import say
from easylm.data.pairs import Pairs
from easylm.data.store import content_key
from easylm.errors import InputError
from easylm.fingerprint import params_fingerprint
from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.sharding import check_mesh, param_shardings
from easylm.reference import ReferenceParts, ReferenceTable
from easylm.start import SOURCE_FIELDS
from easylm.trainers.config import DpoConfig
from easylm.trainers.fit import LoadParams
from easylm.trainers.reference import reference_pass
from easylm.workdir import has_checkpoints


class Model(NamedTuple):
    """A model that has not been read: its sizes, and how to put its parameters on a mesh."""

    config: LlamaConfig
    load: LoadParams


def ask_reference(
    config: DpoConfig,
    workdir: str,
    mesh: Mesh,
    policy: Model,
    reference: Model | None,
    pairs: Mapping[str, Pairs],
    batch_rows: int,
) -> tuple[ReferenceTable, LoadParams]:
    """The log-probabilities of all pairs, and how to load the policy that is trained on them.

    WORKDIR/reference.npz holds them from then on, for a run that goes on. Below data.cache they are
    kept for other runs, named by the parameters and by what else decides the numbers.

    Args:
      config, workdir: of the run.
      mesh: where it runs.
      policy: that will be trained.
      reference: another model to compare with; None: the policy as it starts.
      pairs: `data` and perhaps `eval`.
      batch_rows: rows that the mesh takes at once.
    Raises:
      FloatingPointError: the reference gives a number that is not finite.
      InputError: a run goes on, but its table is missing or of other pairs.
      PreemptedError: somebody wants the run to stop; what was computed is kept.
    """
    path = f"{workdir}/reference.npz"
    ids = np.concatenate([of_source.ids for of_source in pairs.values()])
    if hosts.on_first("looking for checkpoints", lambda: has_checkpoints(workdir)):
        return _table_of_the_run(path, pairs), policy.load
    asked = reference or policy
    check_mesh(asked.config, mesh)
    params = asked.load(param_shardings(asked.config, mesh), jnp.dtype(config.param_dtype))
    known = _known_or_computed(config, asked.config, mesh, params, pairs, batch_rows)
    table = ReferenceTable(ids, *known.lookup(ids))
    if hosts.is_first():
        table.save(path)
    if reference is not None:
        return table, policy.load
    return table, lambda shardings, dtype: params  # they are there already


def _table_of_the_run(path: str, pairs: Mapping[str, Pairs]) -> ReferenceTable:
    where = ""
    try:
        table = ReferenceTable.load(path)
        for name, of_source in pairs.items():
            where = f"{SOURCE_FIELDS[name]}: "
            table.lookup(of_source.ids)
    except InputError as error:
        raise InputError(
            f"{where}{error}. A run that goes on needs {path} and the pairs it started with: the "
            "policy has changed, and is not asked again. Without them, start in another folder"
        ) from None
    return table


def _known_or_computed(
    config: DpoConfig, model: LlamaConfig, mesh: Mesh, params: dict, pairs, batch_rows: int
) -> ReferenceTable:
    name = content_key(
        {
            "parameters": params_fingerprint(params),
            "model": model.to_hf(config.param_dtype),
            "compute_dtype": config.compute_dtype,
        }
    )
    folder = os.path.join(os.path.expanduser(config.data.cache), "reference", name)
    parts = ReferenceParts(folder)
    # Others may add to the folder meanwhile: all hosts must know of the same pairs.
    known = before = ReferenceTable.from_bytes(
        hosts.on_first("reading the reference", lambda: parts.load().to_bytes()), folder
    )
    for of_source in pairs.values():
        known = reference_pass(
            config, model, mesh, params, of_source, known, parts, batch_rows=batch_rows
        )
    ids = np.unique(np.concatenate([of_source.ids for of_source in pairs.values()]))
    say(
        f"reference log-probabilities of {len(ids):,} pairs, {before.has(ids).sum():,} of them "
        f"computed before, are in\n{folder}"
    )
    return known
