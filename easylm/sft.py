"""Supervised fine-tuning of a LLaMA.

python -m easylm.sft --config=sft/quickstart --workdir=DIR [--config.FIELD=VALUE ...]
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from easylm import storage
from easylm.command import run_command, say
from easylm.command_line import parse_command_line
from easylm.config import difference, read_json, write_json
from easylm.data.batches import BatchStream
from easylm.data.encode import Examples, encode_rows
from easylm.data.pack import pack
from easylm.data.show import format_example
from easylm.data.sources import Rows, read_rows
from easylm.errors import InputError
from easylm.models.llama.config import LlamaConfig
from easylm.tokenizer import load_tokenizer, set_chat_template, train_tokenizer
from easylm.trainers.config import SftConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from easylm.converters.weights import Weights

# What may change between two starts of one run: where and in what pieces it computes, and what it
# leaves behind, not what.
FREE_FIELDS = (
    "config.attention",
    "config.checkpoint.",
    "config.data.show",
    "config.data.workers",
    "config.export.",
    "config.log_every",
    "config.loss_chunk",
    "config.mesh",
    "config.micro_batches",
    "config.remat",
)


def main(argv: Sequence[str]) -> None:
    """Trains, then writes the model as a Hugging Face folder to WORKDIR/hf."""
    config, workdir = parse_command_line(argv, SftConfig, "python -m easylm.sft", __doc__)
    workdir = workdir.rstrip("/")
    going_on = has_checkpoints(workdir)
    if going_on:
        check_same_run(config, workdir)
    elif storage.exists(f"{workdir}/hf"):
        raise InputError(
            f"{workdir}/hf: found a model, but {workdir}/checkpoints has none of the run that made "
            "it; wanted a new folder for this run, or that model moved away"
        )
    # The data comes first: it is what is wrong most often, and is checked in seconds.
    rows = read_rows(config.data.sources, config.data.on_bad_row, config.seed)
    say_rows(rows)
    weights = open_start(config)
    tokenizer = open_tokenizer(config, workdir, rows, weights, going_on)
    model = model_config(config, weights, tokenizer)
    examples, counts = encode_rows(
        tokenizer,
        rows.rows,
        seq_len=config.data.seq_len,
        vocab_size=model.vocab_size,
        too_long=config.data.too_long,
    )
    say(str(counts))
    for index in range(min(config.data.show, len(examples))):
        say(format_example(tokenizer, *examples.example(index), color=sys.stderr.isatty()))
    train(config, workdir, weights, tokenizer, model, examples)


def train(
    config: SftConfig,
    workdir: str,
    weights: "Weights | None",
    tokenizer: "PreTrainedTokenizerFast",
    model: LlamaConfig,
    examples: Examples,
) -> None:
    """All that needs devices; jax loads here, after everything a user can get wrong."""
    from easylm.checkpoint import make_bundle
    from easylm.models.llama.sharding import check_mesh
    from easylm.sharding import make_mesh, row_groups
    from easylm.tokenizer import tokenizer_files
    from easylm.trainers.fit import fit
    from easylm.trainers.sft import sft_loss

    mesh = make_mesh(config.mesh)
    check_mesh(model, mesh)
    rows = batch_rows(config, examples)
    stream = BatchStream(
        examples,
        seq_len=config.data.seq_len,
        batch_rows=rows,
        seed=config.seed,
        packing=config.data.packing,
        epochs=config.epochs,
        steps=config.steps,
        row_multiple=row_groups(mesh) * config.micro_batches,
    )
    empty = stream.rows_per_batch - rows
    say(
        f"{len(stream):,} steps of {rows} rows of {stream.seq_len:,} tokens, {stream.fill:.1%} "
        f"filled{f', and {empty} empty rows for the mesh' if empty else ''}; mesh "
        + ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    )
    files = tokenizer_files(tokenizer)
    bundle = make_bundle(model.to_hf(config.param_dtype), files, dataclasses.asdict(config))
    bundle["data"] = {"examples": examples.fingerprint(), "steps": len(stream)}
    write_json(config, f"{workdir}/config.json")
    params = fit(
        config,
        model=model,
        mesh=mesh,
        stream=stream,
        loss_fn=sft_loss(loss_chunk=config.loss_chunk),
        load_params=lambda shardings, dtype: load_start(config, weights, model, shardings, dtype),
        bundle=bundle,
        workdir=workdir,
    )
    export(config, f"{workdir}/hf", params, model, files, len(stream))


def export(config: SftConfig, target: str, params: dict, model: LlamaConfig, files, steps: int):
    """Writes the trained model as a Hugging Face folder, unless it is there already."""
    from easylm.converters.export import export_hf

    if storage.exists(f"{target}/{storage.COMPLETE}"):
        dtype = json.loads(storage.read_bytes(f"{target}/config.json"))["torch_dtype"]
        say(f"{target} is there already, in {dtype}; easylm.convert writes it in another dtype")
        return
    if storage.exists(target):
        say(f"{target} was not finished; it is written again")
        storage.remove_folder(target)
    card = model_card(config, steps)
    dtype = config.export.dtype
    export_hf(params, model, target, dtype=dtype, tokenizer_files=files, model_card=card)
    say(f"exported to {target}")


def has_checkpoints(workdir: str) -> bool:
    """Whether there is a run to go on with.

    Raises:
      InputError: the workdir is a file.
    """
    if storage.exists(workdir) and not storage.is_folder(workdir):
        raise InputError(f"--workdir: {workdir} is a file; wanted a folder, or a new name for one")
    folder = f"{workdir}/checkpoints"
    return storage.is_folder(folder) and any(map(str.isdigit, storage.list_folders(folder)))


def check_same_run(config: SftConfig, workdir: str) -> None:
    """Refuses a workdir that holds checkpoints of another config.

    Raises:
      InputError: with the fields that differ.
    """
    old = read_json(SftConfig, f"{workdir}/config.json")
    changed = difference(dataclasses.asdict(old), dataclasses.asdict(config))
    changed = [line for line in changed if not line.startswith(FREE_FIELDS)]
    if changed:
        raise InputError(
            f"{workdir}: holds a run of another config; wanted the same one, to go on with it, "
            "or a new folder:\n" + "\n".join(f"  {line}" for line in changed)
        )


def open_start(config: SftConfig) -> "Weights | None":
    """The weights that `init_from` names, not yet read; None for random ones."""
    if config.init_from == "random":
        return None
    from easylm.converters.weights import open_weights

    weights = open_weights(os.path.expanduser(config.init_from), hf_config=config.model.hf_config)
    say(f"starting from {config.init_from}: {weights.kind}")
    return weights


def open_tokenizer(
    config: SftConfig, workdir: str, rows: Rows, weights: "Weights | None", going_on: bool
) -> "PreTrainedTokenizerFast":
    """The tokenizer of the config, or one trained on the data, or that of the weights."""
    if config.data.tokenizer_vocab_size is not None:
        folder = f"{workdir}/tokenizer"
        if not going_on:  # what an earlier start left there may be of other data
            if storage.exists(folder):
                storage.remove_folder(folder)
            texts = (turn["content"] for row in rows.rows for turn in row.messages)
            train_tokenizer(texts, config.data.tokenizer_vocab_size, folder)
        return load_tokenizer(folder, config.data.chat_template)
    if config.data.tokenizer:
        return load_tokenizer(config.data.tokenizer, config.data.chat_template)
    tokenizer = weights.tokenizer()
    set_chat_template(tokenizer, config.data.chat_template, config.init_from)
    return tokenizer


def model_config(config: SftConfig, weights: "Weights | None", tokenizer) -> LlamaConfig:
    """The model to train, as large as its tokenizer needs.

    Raises:
      InputError: the tokenizer has more ids than the model, or the model cannot be trained so.
    """
    size = len(tokenizer)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if weights is None:
        model = config.model.llama_config(vocab_size=size, **ids)
    else:
        model = dataclasses.replace(weights.config, **ids)
    if size > model.vocab_size:
        if not config.model.resize_vocab:
            raise InputError(
                f"data.tokenizer: found {size:,} ids; the model has vocab_size="
                f"{model.vocab_size:,}. Use the model's own tokenizer, or set "
                "model.resize_vocab=True to add rows (the mean of the old ones)"
            )
        model = dataclasses.replace(model, vocab_size=size)
    config.check_model(model)
    return model


def load_start(config: SftConfig, weights: "Weights | None", model, shardings, dtype):
    """The parameters before the first step, on the mesh."""
    if weights is not None:
        return weights.load(model, shardings, dtype)
    import jax

    from easylm.models.llama.model import init_params

    make = jax.jit(lambda key: init_params(model, key, dtype), out_shardings=shardings)
    return make(jax.random.key(config.seed))


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


def model_card(config: SftConfig, steps: int) -> str:
    """README.md of the exported folder."""
    options = config.optimizer
    return (
        "# A LLaMA fine-tuned with easylm\n\n"
        f"- started from: {config.init_from}\n"
        f"- data: {config.data.sources}\n"
        f"- {steps:,} steps, rows of {config.data.seq_len:,} tokens, peak learning rate "
        f"{options.learning_rate:g}, warm-up {options.warmup_ratio:.0%}, linear decay\n"
        f"- chat template ({config.data.chat_template}): in the tokenizer\n"
    )


def say_rows(rows: Rows) -> None:
    for source, count in rows.counts.items():
        say(f"{count:,} rows of {source}")
    for reason, count in rows.skipped.items():
        say(f"{count:,} rows skipped: {reason}")


if __name__ == "__main__":
    run_command(main)
