"""Supervised fine-tuning of a LLaMA.

python -m easylm.sft --config=CONFIG --workdir=DIR [--config.FIELD=VALUE ...]
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from easylm import hosts
from easylm.command import say
from easylm.compilation import use_compilation_cache
from easylm.data.batches import BatchStream
from easylm.data.example_batches import example_stream
from easylm.data.prepare import Prepared
from easylm.data.show import format_example
from easylm.hosts.command import run_on_hosts
from easylm.models.llama.config import LlamaConfig
from easylm.start import (
    alone_in_workdir,
    batch_rows,
    load_params,
    model_config,
    open_data,
    open_tokenizer,
    open_weights,
    parse_run,
    prepare_data,
)
from easylm.track import check_trackers
from easylm.trainers.config import SftConfig
from easylm.workdir import holds_same_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from easylm.converters.weights import Weights


def main(argv: Sequence[str]) -> None:
    """Trains, then writes the model as a Hugging Face folder to WORKDIR/hf."""
    config, workdir = parse_run(argv, SftConfig, __doc__)
    going_on = hosts.on_first(
        "looking for a run to go on with", lambda: holds_same_run(config, workdir)
    )
    with alone_in_workdir(workdir):
        start(config, workdir, going_on)


def start(config: SftConfig, workdir: str, going_on: bool) -> None:
    """All that comes before the devices, where most that is wrong shows; then trains.

    Args:
      config, workdir: of the run.
      going_on: whether there is a checkpoint to go on from.
    """
    if hosts.is_first():
        check_trackers(tensorboard=config.tensorboard, wandb=config.wandb)
    # The data comes first: it is what is wrong most often, and is checked in seconds.
    rows = open_data(config)
    weights = open_weights(config, workdir if going_on else "")
    tokenizer = open_tokenizer(config, workdir, rows["data"], weights, going_on=going_on)
    model = model_config(config, weights, tokenizer)
    data = {name: prepare_data(config, rows[name], tokenizer, model) for name in rows}
    examples = data["data"].examples
    for index in range(min(config.data.show, len(examples))):
        say(format_example(tokenizer, *examples.example(index), color=sys.stderr.isatty()))
    train(config, workdir, weights, tokenizer, model, data)


def train(
    config: SftConfig,
    workdir: str,
    weights: "Weights | None",
    tokenizer: "PreTrainedTokenizerFast",
    model: LlamaConfig,
    data: dict[str, Prepared],
) -> None:
    """All that needs devices; jax loads here, after everything a user can get wrong."""
    from easylm.models.llama.sharding import check_mesh
    from easylm.run import run
    from easylm.sharding import make_mesh, row_groups
    from easylm.trainers.sft import sft_objective

    use_compilation_cache(config.compilation_cache)
    mesh = make_mesh(config.mesh)
    check_mesh(model, mesh)
    examples = data["data"].examples
    stream, eval_stream = open_streams(config, data, row_groups(mesh))
    run(
        config,
        workdir,
        model=model,
        tokenizer=tokenizer,
        mesh=mesh,
        objective=sft_objective(config, stream.rows_per_batch),
        stream=stream,
        eval_stream=eval_stream,
        load_params=lambda where, dtype: load_params(config, weights, model, where, dtype),
        data={"content": examples.fingerprint(), "tokens": len(examples.tokens)},
        lengths=data["data"].row_lengths,
    )


def open_streams(
    config: SftConfig, data: dict[str, Prepared], row_groups: int
) -> tuple[BatchStream, BatchStream | None]:
    """The batches to train on, and those to evaluate on, if any.

    Args:
      config: of the run.
      data: `data` and perhaps `eval`.
      row_groups: the mesh takes a multiple of so many rows at once.
    """
    examples = data["data"].examples
    options = {
        "seq_len": config.data.seq_len,
        "seed": config.seed,
        "packing": config.data.packing,
    }
    stream = example_stream(
        examples,
        batch_rows=batch_rows(config, examples.lengths, "example"),
        loss_weighting=config.loss_weighting,
        loss_group=config.loss_group,
        epochs=config.epochs,
        steps=config.steps,
        row_multiple=row_groups * config.micro_batches,
        **options,
    )
    if "eval" not in data:
        return stream, None
    rows = stream.rows_per_batch // config.micro_batches
    return stream, example_stream(data["eval"].examples, batch_rows=rows, epochs=1, **options)


if __name__ == "__main__":
    run_on_hosts(main)
