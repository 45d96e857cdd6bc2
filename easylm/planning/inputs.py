"""What is known of a run before any device is asked: sizes of its model, amounts of its data."""

import dataclasses
import tempfile
from typing import NamedTuple

import numpy as np

from easylm import storage
from easylm.command import say
from easylm.converters.sources import download, is_on_hub, read_config
from easylm.converters.weights import Description, describe_on_hub
from easylm.data.batches import BatchStream
from easylm.data.pack import most_in_row
from easylm.data.pair_rows import PAIRS
from easylm.data.rows import CONVERSATIONS
from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.presets import PUBLISHED
from easylm.start import (
    batch_rows,
    model_config,
    open_data,
    open_tokenizer,
    open_weights,
    place_cache,
    prepare_data,
    prepare_preferences,
)
from easylm.trainers.config import DpoConfig, RunConfig

# No sequence of a chat is shorter, where lengths are not known.
_SHORTEST = 32


class Inputs(NamedTuple):
    """What the step of a run depends on, beside its config and its mesh.

    Attributes:
      model: sizes of the model.
      stream: the run's batches without their tokens; rows are those of the config, none added to
        divide a mesh.
      pairs_per_row: that a row can hold; 0 for examples that are no pairs.
      noun: what an example is called.
      origin: where the amounts of data come from, for people.
    """

    model: LlamaConfig
    stream: BatchStream
    pairs_per_row: int
    noun: str
    origin: str

    def segments_of(self, step: int) -> list[list[int]]:
        """The lengths of the segments in each row of batch `step`, from 0."""
        lengths = self.stream.segment_lengths
        return [lengths[ids].ravel().tolist() for ids in self.stream.plan_rows(step)]


def read_inputs(config: RunConfig) -> Inputs:
    """Takes the amounts that the config expects, or else prepares the data as training does.

    Raises:
      InputError: the weights, the tokenizer or the data cannot be read, or do not go together.
    """
    if config.data.expected_examples is None:
        return _prepared(config)
    model = _longer(_sizes(config), config)
    config.check_model(model)
    return _inputs(config, model, _expected_lengths(config), "expected by the config")


def _prepared(config: RunConfig) -> Inputs:
    """Reads and encodes the data; a run that follows finds it encoded."""
    on_pairs = isinstance(config, DpoConfig)
    config = place_cache(config, workdir="")
    rows = open_data(config, PAIRS if on_pairs else CONVERSATIONS)["data"]
    weights = _describe(config)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = open_tokenizer(config, folder, rows, weights, going_on=False)
    model = model_config(config, weights, tokenizer)
    if on_pairs:
        pairs = prepare_preferences(config, rows, tokenizer, model).pairs
        lengths = pairs.sequences.lengths.reshape(-1, 2)
    else:
        lengths = prepare_data(config, rows, tokenizer, model).examples.lengths[:, None]
    return _inputs(config, model, lengths, "counted")


def _sizes(config: RunConfig) -> LlamaConfig:
    """The model that `init_from` means, for which no weights are read."""
    if config.init_from in PUBLISHED and not storage.exists(config.init_from):
        say(f"{config.init_from}: sizes as published, known here")
        return PUBLISHED[config.init_from]
    if _stays_on_hub(config):
        folder = download(config.init_from, ["config.json"])
        say(f"{config.init_from}: sizes by its config.json")
        where = f"{config.init_from}/config.json"
        return LlamaConfig.from_hf(read_config(f"{folder}/config.json"), where)
    if config.init_from != "random":
        return open_weights(config).config
    if config.data.tokenizer_vocab_size is not None:
        return config.model.llama_config(vocab_size=config.data.tokenizer_vocab_size)
    from easylm.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.data.tokenizer, config.data.chat_template)
    return config.model.llama_config(vocab_size=len(tokenizer))


def _describe(config: RunConfig) -> Description | None:
    """What the run starts from, for which no weights are read; None for random ones."""
    if not _stays_on_hub(config):
        return open_weights(config)
    described = describe_on_hub(config.init_from)
    say(f"starting from {config.init_from}: {described.kind}")
    return described


def _stays_on_hub(config: RunConfig) -> bool:
    """Whether the weights are on the hub, where they can stay."""
    # With a config.json from elsewhere it takes the weights to know that they have none.
    return is_on_hub(config.init_from) and not config.model.hf_config


def _longer(model: LlamaConfig, config: RunConfig) -> LlamaConfig:
    longest = config.model.max_position_embeddings or model.max_position_embeddings
    return dataclasses.replace(model, max_position_embeddings=longest)


def _expected_lengths(config: RunConfig) -> np.ndarray:
    """int64 [examples, segments]: quantiles of an exponential distribution with the mean expected.

    Chats are about so distributed: those of Tülu 2 have a mean of 1,097 tokens and quartiles of
    230 and 1,464, where these have 316 and 1,521.
    """
    segments = 2 if isinstance(config, DpoConfig) else 1
    count, mean = config.data.expected_examples, config.data.expected_mean_tokens / segments
    lengths = -mean * np.log1p(-(np.arange(count) + 0.5) / count)
    longest = config.data.seq_len // segments
    lengths = np.clip(lengths.round().astype(np.int64), min(_SHORTEST, longest), longest)
    return np.repeat(lengths[:, None], segments, axis=1)


def _inputs(config: RunConfig, model: LlamaConfig, lengths: np.ndarray, origin: str) -> Inputs:
    noun = "pair" if isinstance(config, DpoConfig) else "example"
    of_examples = lengths.sum(axis=1)
    packing, seq_len = config.data.packing, config.data.seq_len
    stream = BatchStream(
        lengths,
        lambda rows, epochs: {},  # only shapes are asked for
        seq_len=seq_len,
        batch_rows=batch_rows(config, of_examples, noun),
        seed=config.seed,
        packing=packing,
        epochs=config.epochs,
        steps=config.steps,
    )
    in_row = most_in_row(of_examples, seq_len) if packing else 1
    return Inputs(model, stream, in_row if noun == "pair" else 0, noun, origin)
