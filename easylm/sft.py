"""Supervised fine-tuning of a LLaMA.

python -m easylm.sft --config=sft/quickstart --workdir=DIR [--config.FIELD=VALUE ...]
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from easylm.command import run_command, say
from easylm.command_line import parse_command_line
from easylm.data.batches import BatchStream
from easylm.data.encode import Examples
from easylm.data.pack import pack
from easylm.data.prepare import Prepared
from easylm.data.show import format_example
from easylm.errors import InputError
from easylm.models.llama.config import LlamaConfig
from easylm.start import (
    load_params,
    model_config,
    open_data,
    open_tokenizer,
    open_weights,
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
    config, workdir = parse_command_line(argv, SftConfig, "python -m easylm.sft", __doc__)
    workdir = workdir.rstrip("/")
    going_on = holds_same_run(config, workdir)
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
    from easylm.checkpoint import make_bundle
    from easylm.finish import Exporter, say_how_to_chat
    from easylm.models.llama.sharding import check_mesh
    from easylm.plots import plot_lengths, plot_loss
    from easylm.sharding import make_mesh, row_groups
    from easylm.tokenizer import tokenizer_files
    from easylm.trainers.fit import fit
    from easylm.trainers.sft import sft_loss

    use_devices(config)
    mesh = make_mesh(config.mesh)
    check_mesh(model, mesh)
    examples = data["data"].examples
    stream, eval_stream = open_streams(config, data, row_groups(mesh))
    files = tokenizer_files(tokenizer)
    bundle = make_bundle(model.to_hf(config.param_dtype), files, dataclasses.asdict(config))
    bundle["data"] = {
        "content": examples.fingerprint(),
        "examples": len(examples),
        "tokens": len(examples.tokens),
        "steps": len(stream),
    }
    export = Exporter(config, workdir, model, files, total_steps=len(stream))
    try:
        params = fit(
            config,
            model=model,
            mesh=mesh,
            stream=stream,
            eval_stream=eval_stream,
            loss_fn=sft_loss(loss_chunk=config.loss_chunk),
            load_params=lambda where, dtype: load_params(config, weights, model, where, dtype),
            export=export,
            bundle=bundle,
            workdir=workdir,
        )
    except FloatingPointError:
        with contextlib.suppress(InputError):  # it shows how the loss got there, if it can
            plot_loss(workdir)
        raise
    folder = export(len(stream), params)
    plot_loss(workdir)
    lengths = data["data"].row_lengths
    plot_lengths(lengths, config.data.seq_len, f"{workdir}/plots/lengths.png")
    say(f"plots are in {workdir}/plots")
    say_how_to_chat(folder)


def use_devices(config: SftConfig) -> None:
    """Makes the virtual devices that the config asks for.

    Raises:
      InputError: this is one of several hosts.
    """
    import jax

    # XLA_FLAGS is the older way to say it, and goes first.
    if config.cpu_devices and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    if jax.process_count() > 1:
        raise InputError(
            f"found {jax.process_count()} hosts; wanted one: runs over several are not there yet"
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
    stream = BatchStream(
        examples,
        seq_len=config.data.seq_len,
        batch_rows=batch_rows(config, examples),
        seed=config.seed,
        packing=config.data.packing,
        loss_weighting=config.loss_weighting,
        loss_group=config.loss_group,
        epochs=config.epochs,
        steps=config.steps,
        row_multiple=row_groups * config.micro_batches,
    )
    if "eval" not in data:
        return stream, None
    eval_stream = BatchStream(
        data["eval"].examples,
        seq_len=config.data.seq_len,
        batch_rows=stream.rows_per_batch // config.micro_batches,
        seed=config.seed,
        packing=config.data.packing,
        epochs=1,
    )
    return stream, eval_stream


def batch_rows(config: SftConfig, examples: Examples) -> int:
    """Rows of a step; where packed, so many that a step sees batch_examples on average."""
    if config.batch_rows is not None:
        return config.batch_rows
    if not config.data.packing:
        return config.batch_examples
    rows = len(pack(examples.lengths, config.data.seq_len, config.seed, epoch=0))
    chosen = max(1, round(config.batch_examples * rows / len(examples)))
    say(
        f"{config.batch_examples} examples fill {chosen} rows on average "
        f"({len(examples) / rows:.2f} a row)"
    )
    return chosen


if __name__ == "__main__":
    run_command(main)
