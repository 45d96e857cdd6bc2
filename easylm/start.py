"""What a run starts from: weights, tokenizer, sizes of the model, data, devices.

Commands share it. jax loads with the weights, after everything that can be wrong with the data.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from easylm import hosts, lock, storage
from easylm.chat import check_eos_newline, stop_tokens
from easylm.command import say
from easylm.command_line import (
    WORKDIR,
    CommandLine,
    choose_class,
    own_options,
    parse_config,
    require_workdir,
)
from easylm.compilation import use_compilation_cache
from easylm.data.pack import pack
from easylm.data.prepare import (
    Prepared,
    PreparedPairs,
    SourceRows,
    open_rows,
    prepare,
    prepare_pairs,
)
from easylm.data.rows import CONVERSATIONS, Form
from easylm.data.store import LOCAL_CACHE
from easylm.errors import InputError
from easylm.hosts.flags import HOST_FLAGS, parse_place
from easylm.lock import alone_in
from easylm.models.llama.config import LlamaConfig
from easylm.tokenizer import load_tokenizer, require_eos, set_chat_template, train_tokenizer
from easylm.trainers.config import DpoConfig, RunConfig, SftConfig
from easylm.workdir import has_checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from easylm.converters.weights import Description, Weights

_Config = TypeVar("_Config", SftConfig, DpoConfig)
_Prepared = TypeVar("_Prepared", Prepared, PreparedPairs)


# What the two kinds of data are called in the config.
SOURCE_FIELDS = {"data": "data.sources", "eval": "data.eval_sources"}
_COMMANDS = {SftConfig: "python -m easylm.sft", DpoConfig: "python -m easylm.dpo"}
_USAGE = "--workdir=DIR [--coordinator=HOST:PORT --processes=N --process=I]"


def parse_run(
    argv: Sequence[str], config_class: type[_Config], description: str
) -> CommandLine[_Config]:
    """Reads the command line of the command that trains by `config_class`, and finds other hosts.

    jax, which loads where there may be other hosts, will have the virtual devices that the config
    asks for.

    Raises:
      InputError: as `parse_config`, the config is another command's, or other hosts have another.
    """
    place = parse_place(own_options(argv, HOST_FLAGS))
    try:
        config, workdir = _parse(argv, config_class, description)
    except InputError as error:
        hosts.meet_to_fail(place, error)
        raise
    # jax reads it when it loads, which may be as soon as a checkpoint is looked into. XLA_FLAGS is
    # the older way to say it, and goes first.
    if config.cpu_devices and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["JAX_NUM_CPU_DEVICES"] = str(config.cpu_devices)
    if hosts.join(place):
        _meet(config, workdir)
    return CommandLine(place_cache(config, workdir), workdir)


def _parse(argv: Sequence[str], config_class: type[_Config], description: str) -> CommandLine:
    command = _COMMANDS[config_class]
    found = choose_class(argv, [config_class, *_COMMANDS])
    if found is not config_class:
        raise InputError(f"--config: found a config of {_COMMANDS[found]}; wanted one of {command}")
    own = {**WORKDIR, **HOST_FLAGS}
    config, named = parse_config(argv, config_class, command, description, usage=_USAGE, own=own)
    return CommandLine(config, require_workdir(named["workdir"]))


def _meet(config: RunConfig, workdir: str) -> None:
    """Goes on with the other hosts, if they run the same."""
    # jax looks for the cache at its first program, which is one of these.
    use_compilation_cache(config.compilation_cache)
    hosts.meet()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    hosts.check_same("versions", {"Python": platform.python_version(), **versions})
    hosts.check_same("config", dataclasses.asdict(config))
    going_on = has_checkpoints(workdir)
    hosts.check_same("--workdir", {"path": workdir, "holds checkpoints": going_on})


@contextlib.contextmanager
def alone_in_workdir(workdir: str) -> Iterator[None]:
    """Within the block no other run is in the workdir, and all hosts of this one see it.

    Raises:
      InputError: another run is there, or a host does not see what the first writes there.
    """
    with alone_in(workdir) if hosts.is_first() else contextlib.nullcontext():
        hosts.wait_for_all("taking the workdir")
        if not storage.exists(f"{workdir}/{lock.NAME}"):
            raise InputError(
                f"--workdir: the first host wrote {workdir}/{lock.NAME}, and this host does not "
                "see it; wanted a folder that all hosts share: gs://BUCKET/FOLDER, or a shared disk"
            )
        yield


def place_cache(config: _Config, workdir: str) -> _Config:
    """`config` with a folder in data.cache, where it had none: one that all hosts see."""
    shared = hosts.count() > 1 and workdir
    cache = config.data.cache or (f"{workdir}/prepared" if shared else LOCAL_CACHE)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, cache=cache))


def open_weights(config: RunConfig, going_on_in: str = "") -> "Weights | None":
    """The weights that `init_from` names, not yet read; None for random ones.

    Args:
      config: of the run.
      going_on_in: the workdir of a run that goes on: its checkpoint holds all that is needed, and
        what it started from may be gone.
    """
    if config.init_from == "random" and not going_on_in:
        return None
    from easylm.converters import weights

    if going_on_in:
        return weights.open_weights(going_on_in)
    opened = weights.open_weights(
        os.path.expanduser(config.init_from), hf_config=config.model.hf_config
    )
    say(f"starting from {config.init_from}: {opened.kind}")
    return opened


def open_tokenizer(
    config: RunConfig,
    workdir: str,
    rows: SourceRows,
    weights: "Description | None",
    *,
    going_on: bool,
) -> "PreTrainedTokenizerFast":
    """The tokenizer of a run that goes on, or of the config, or one trained, or of the weights.

    Args:
      config: of the run.
      workdir: keeps a tokenizer that is trained here, by the first host.
      rows: to train one on.
      weights: what the run starts from.
      going_on: whether `weights` are the checkpoint of this run.
    """
    if going_on:
        return weights.tokenizer()
    if config.data.tokenizer_vocab_size is not None:
        folder = f"{workdir}/tokenizer"
        if hosts.is_first():
            if storage.exists(folder):  # what an earlier start left there may be of other data
                storage.remove_folder(folder)
            texts = (turn["content"] for row in rows.read().rows for turn in row.messages)
            train_tokenizer(texts, config.data.tokenizer_vocab_size, folder)
        hosts.wait_for_all("training the tokenizer")
        tokenizer = load_tokenizer(folder, config.data.chat_template)
    elif config.data.tokenizer:
        tokenizer = load_tokenizer(config.data.tokenizer, config.data.chat_template)
    else:
        tokenizer = weights.tokenizer()
        require_eos(tokenizer, config.init_from)
        set_chat_template(tokenizer, config.data.chat_template, config.init_from)
    check_eos_newline(tokenizer, config.data.eos_newline)
    return tokenizer


def model_config(config: RunConfig, weights: "Description | None", tokenizer) -> LlamaConfig:
    """The model to train, as large as its tokenizer needs.

    Raises:
      InputError: the tokenizer has more ids than the model, or the model cannot be trained so.
    """
    size = len(tokenizer)
    known = None if weights is None else weights.config.eos_token_id
    try:
        stops = stop_tokens(tokenizer, known)
    except InputError as error:
        raise InputError(f"data.chat_template={config.data.chat_template}: {error}") from None
    if weights is not None and stops != known:
        names = tokenizer.convert_ids_to_tokens([stops] if isinstance(stops, int) else [*stops])
        say(f"an answer ends at {' or '.join(names)}; the model's own eos_token_id was {known}")
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stops,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if weights is None:
        model = config.model.llama_config(vocab_size=size, **ids)
    else:
        model = dataclasses.replace(weights.config, **ids)
        longest = config.model.max_position_embeddings or model.max_position_embeddings
        model = dataclasses.replace(model, max_position_embeddings=longest)
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


def open_data(config: RunConfig, form: Form = CONVERSATIONS) -> dict[str, SourceRows]:
    """The rows to train on and those to evaluate on, if any, as `data` and `eval`.

    Args:
      config: of the run.
      form: what a row is.
    Raises:
      InputError: a source or a row is wrong.
    """
    texts = {"data": config.data.sources, "eval": config.data.eval_sources}
    rows = {}
    for name in [name for name, text in texts.items() if text]:
        options = {
            "sources": texts[name],
            "form": form,
            "on_bad_row": config.data.on_bad_row,
            "seed": config.seed,
            "field": SOURCE_FIELDS[name],
        }
        if hosts.is_first():
            rows[name] = open_rows(cache=config.data.cache, **options)
        # The others need not see the sources: they find prepared what the first has read.
        hashes = hosts.on_first(
            "reading the data", lambda name=name: [sha256 for _, sha256 in rows[name].digests]
        )
        if not hosts.is_first():
            rows[name] = SourceRows(hashes=hashes, **options)
    return rows


def prepare_data(config: RunConfig, rows: SourceRows, tokenizer, model: LlamaConfig) -> Prepared:
    """Encodes conversations, and says what became of them.

    Raises:
      InputError: they cannot be encoded for this model.
    """
    with hosts.first_alone("encoding the data"):
        return _said(prepare(rows, tokenizer, **_encoding(config, model)))


def prepare_preferences(
    config: DpoConfig, rows: SourceRows, tokenizer, model: LlamaConfig
) -> PreparedPairs:
    """Encodes pairs, and says what became of them.

    Raises:
      InputError: they cannot be encoded for this model, or lack the margins that the loss asks for.
    """
    options = {
        "keep_prompt": config.dpo.keep_prompt,
        "scored_turns": config.dpo.scored_turns,
        **_encoding(config, model),
    }
    with hosts.first_alone("encoding the data"):
        prepared = _said(prepare_pairs(rows, tokenizer, **options))
    without = int(np.isnan(prepared.pairs.margins).sum())
    if config.dpo.margin_weight and without:
        raise InputError(
            f"dpo.margin_weight: found {without:,} of the {len(prepared.pairs):,} pairs of "
            f"{rows.field} without a margin; wanted a field 'margin' in every row, or a weight of 0"
        )
    return prepared


def _encoding(config: RunConfig, model: LlamaConfig) -> dict:
    data = config.data
    return {
        "cache": data.cache,
        "seq_len": data.seq_len,
        "vocab_size": model.vocab_size,
        "too_long": data.too_long,
        "eos_newline": data.eos_newline,
        "special_tokens": data.special_tokens,
        "processes": data.processes,
    }


def _said(prepared: _Prepared) -> _Prepared:
    say(str(prepared.manifest))
    say(f"{'prepared before' if prepared.reused else 'kept for later runs'} in {prepared.folder}")
    return prepared


def load_params(config: RunConfig, weights: "Weights | None", model, shardings, dtype) -> dict:
    """The parameters before the first step, on the mesh."""
    if weights is not None:
        return weights.load(model, shardings, dtype)
    import jax

    from easylm.models.llama.model import init_params

    make = jax.jit(lambda key: init_params(model, key, dtype), out_shardings=shardings)
    return make(jax.random.key(config.seed))


def batch_rows(config: RunConfig, lengths: np.ndarray, noun: str) -> int:
    """Rows of a step; where packed, so many that a step sees batch_examples on average.

    Args:
      config: of the run.
      lengths: int [examples], tokens of each.
      noun: what an example is called.
    """
    if config.batch_rows is not None:
        return config.batch_rows
    if not config.data.packing:
        return config.batch_examples
    rows = len(pack(lengths, config.data.seq_len, config.seed, epoch=0))
    chosen = max(1, round(config.batch_examples * rows / len(lengths)))
    say(
        f"{config.batch_examples} {noun}s fill {chosen} rows on average "
        f"({len(lengths) / rows:.2f} a row)"
    )
    return chosen
