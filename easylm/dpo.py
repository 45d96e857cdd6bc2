"""Direct preference optimization of a LLaMA, and its relatives.

python -m easylm.dpo --config=CONFIG --workdir=DIR [--config.FIELD=VALUE ...]
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from easylm import hosts
from easylm.command import say
from easylm.compilation import use_compilation_cache
from easylm.data.batches import BatchStream
from easylm.data.pair_batches import pair_stream, pairs_per_row
from easylm.data.pair_rows import PAIRS
from easylm.data.pairs import Pairs
from easylm.data.prepare import PreparedPairs
from easylm.data.show import format_pair
from easylm.errors import InputError
from easylm.hosts.command import run_on_hosts
from easylm.models.llama.config import LlamaConfig
from easylm.reference import ReferenceTable
from easylm.start import (
    alone_in_workdir,
    batch_rows,
    load_params,
    model_config,
    open_data,
    open_tokenizer,
    open_weights,
    parse_run,
    prepare_preferences,
)
from easylm.track import check_trackers
from easylm.trainers.config import DpoConfig
from easylm.workdir import holds_same_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from easylm.converters.weights import Weights


def main(argv: Sequence[str]) -> None:
    """Trains, then writes the model as a Hugging Face folder to WORKDIR/hf."""
    config, workdir = parse_run(argv, DpoConfig, __doc__)
    going_on = hosts.on_first(
        "looking for a run to go on with", lambda: holds_same_run(config, workdir)
    )
    with alone_in_workdir(workdir):
        start(config, workdir, going_on)


def start(config: DpoConfig, workdir: str, going_on: bool) -> None:
    """All that comes before the devices, where most that is wrong shows; then trains.

    Args:
      config, workdir: of the run.
      going_on: whether there is a checkpoint to go on from.
    """
    if hosts.is_first():
        check_trackers(tensorboard=config.tensorboard, wandb=config.wandb)
    # The data comes first: it is what is wrong most often, and is checked in seconds.
    rows = open_data(config, PAIRS)
    weights = open_weights(config, workdir if going_on else "")
    tokenizer = open_tokenizer(config, workdir, rows["data"], weights, going_on=going_on)
    model = model_config(config, weights, tokenizer)
    data = {name: prepare_preferences(config, rows[name], tokenizer, model) for name in rows}
    pairs = data["data"].pairs
    for index in range(min(config.data.show, len(pairs))):
        say(format_pair(tokenizer, pairs, index, color=sys.stderr.isatty()))
    reference = None if going_on else open_reference(config, data)
    train(config, workdir, weights, reference, tokenizer, model, data)


def open_reference(config: DpoConfig, data: dict[str, PreparedPairs]) -> "Weights | None":
    """The weights that `dpo.reference` names, not yet read; None where it is the policy itself.

    Raises:
      InputError: they are none, or cannot be asked about these pairs.
    """
    if config.dpo.reference == "policy":
        return None
    from easylm.converters.weights import open_weights as open_any

    path = os.path.expanduser(config.dpo.reference)
    try:
        weights = open_any(path, hf_config=config.model.hf_config)
        # Longer rows are the user's to try, as with the policy.
        longest = config.model.max_position_embeddings or weights.config.max_position_embeddings
        model = dataclasses.replace(weights.config, max_position_embeddings=longest)
        config.check_model(model)
    except InputError as error:
        raise InputError(f"dpo.reference: {error}") from None
    largest = max(prepared.manifest.largest_token for prepared in data.values())
    if largest >= weights.config.vocab_size:
        raise InputError(
            f"dpo.reference: {config.dpo.reference} has vocab_size={weights.config.vocab_size:,}, "
            f"and the pairs hold the id {largest:,}; wanted a model with the policy's tokenizer"
        )
    say(f"the reference is {config.dpo.reference}: {weights.kind}")
    return dataclasses.replace(weights, config=model)


def train(
    config: DpoConfig,
    workdir: str,
    weights: "Weights | None",
    reference: "Weights | None",
    tokenizer: "PreTrainedTokenizerFast",
    model: LlamaConfig,
    data: dict[str, PreparedPairs],
) -> None:
    """All that needs devices; jax loads here, after everything a user can get wrong."""
    from easylm.ask_reference import Model, ask_reference
    from easylm.models.llama.sharding import check_mesh
    from easylm.plots import plot_loss, plot_preferences
    from easylm.run import run
    from easylm.sharding import make_mesh, row_groups
    from easylm.trainers.dpo import dpo_objective

    use_compilation_cache(config.compilation_cache)
    mesh = make_mesh(config.mesh)
    check_mesh(model, mesh)
    pairs = {name: prepared.pairs for name, prepared in data.items()}
    rows = batch_rows(config, pairs["data"].lengths, "pair")
    policy = Model(model, lambda where, dtype: load_params(config, weights, model, where, dtype))
    other = None
    if reference is not None:
        other = Model(reference.config, functools.partial(reference.load, reference.config))
    table = None
    if config.dpo.needs_reference:
        at_once = -(-rows // (row_groups(mesh) * config.micro_batches)) * row_groups(mesh)
        table, load = ask_reference(config, workdir, mesh, policy, other, pairs, at_once)
        policy = policy._replace(load=load)
    stream, eval_stream = open_streams(config, pairs, table, rows, row_groups(mesh))
    width = pairs_per_row(pairs["data"], config.data.seq_len, config.data.packing)
    run(
        config,
        workdir,
        model=model,
        tokenizer=tokenizer,
        mesh=mesh,
        objective=dpo_objective(config, stream.rows_per_batch, width),
        stream=stream,
        eval_stream=eval_stream,
        load_params=policy.load,
        data={
            "content": pairs["data"].fingerprint(),
            "tokens": int(pairs["data"].lengths.sum()),
        },
        lengths=data["data"].row_lengths,
        plots=(plot_loss, plot_preferences),
    )


def open_streams(
    config: DpoConfig,
    pairs: dict[str, Pairs],
    table: ReferenceTable | None,
    rows: int,
    row_groups: int,
) -> tuple[BatchStream, BatchStream | None]:
    """The batches to train on, and those to evaluate on, if any.

    Args:
      config: of the run.
      pairs: `data` and perhaps `eval`.
      table: what the reference says of all of them; None where nobody asks.
      rows: of a step.
      row_groups: the mesh takes a multiple of so many rows at once.
    """

    def stream(name: str, **options) -> BatchStream:
        return pair_stream(
            pairs[name],
            None if table is None else table.lookup(pairs[name].ids),
            seq_len=config.data.seq_len,
            packing=config.data.packing,
            seed=config.seed,
            **options,
        )

    training = stream(
        "data",
        batch_rows=rows,
        row_multiple=row_groups * config.micro_batches,
        epochs=config.epochs,
        steps=config.steps,
    )
    if "eval" not in pairs:
        return training, None
    at_once = training.rows_per_batch // config.micro_batches
    return training, stream("eval", batch_rows=at_once, epochs=1)


if __name__ == "__main__":
    run_on_hosts(main)
