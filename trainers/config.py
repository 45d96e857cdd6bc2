"""The config of a training run: every option, its default, and the rules it must obey."""

import dataclasses
from typing import Literal

from easylm.config import option, parse_mesh
from easylm.errors import InputError
from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.presets import PRESETS


def _require(holds: bool, field: str, found: object, wanted: str) -> None:
    if not holds:
        raise InputError(f"{field}: found {found!r}; wanted {wanted}")


def _at_least(config: object, least: int, *fields: str) -> None:
    """Refuses fields of `config` that are set and below `least`."""
    for field in fields:
        value = getattr(config, field)
        _require(value is None or value >= least, field, value, f"at least {least}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that init_from=random makes, and the vocabulary of any model."""

    preset: str = option("", "Sizes of a published model, such as llama2_7b; random only.")
    hidden_size: int | None = option(None, "Width of the residual stream.")
    intermediate_size: int | None = option(None, "Width inside the MLP.")
    num_hidden_layers: int | None = option(None, "Number of blocks.")
    num_attention_heads: int | None = option(None, "Query heads; divides hidden_size.")
    num_key_value_heads: int | None = option(None, "Key and value heads; none: one per query head.")
    max_position_embeddings: int | None = option(None, "Longest row the model is made for.")
    rope_theta: float | None = option(None, "Base of the rotary angles; none: 10000.")
    rms_norm_eps: float | None = option(None, "Added to the mean square; none: 1e-5.")
    tie_word_embeddings: bool | None = option(None, "Head = embedding table; none: no.")
    hf_config: str = option(
        "", "The config.json, or the folder with it, of an EasyLM stream, which holds no sizes."
    )
    resize_vocab: bool = option(
        False,
        "Give the model a row for each id of a larger tokenizer: new rows are the mean of the old.",
    )

    def __post_init__(self):
        known = ", ".join(PRESETS)
        _require(self.preset in ("", *PRESETS), "preset", self.preset, f"one of {known}")
        _at_least(self, 1, "hidden_size", "intermediate_size", "num_hidden_layers")
        _at_least(self, 1, "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        for field in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, field)
            _require(value is None or value > 0, field, value, "a number above 0")

    def given(self) -> dict:
        """The sizes and constants that are set, by the names of LlamaConfig."""
        values = dataclasses.asdict(self)
        del values["preset"], values["hf_config"], values["resize_vocab"]
        return {name: value for name, value in values.items() if value is not None}

    def llama_config(self, *, vocab_size: int, **token_ids: int | tuple[int, ...] | None):
        """The model to initialise at random: the preset's sizes, and those given here over them.

        Args:
          vocab_size: of the tokenizer.
          **token_ids: bos_token_id, eos_token_id, pad_token_id of the tokenizer.
        Raises:
          InputError: a size is missing, or sizes do not go together.
        """
        sizes = dict(vars(PRESETS[self.preset])) if self.preset else {}
        sizes |= self.given()
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for field in (*needed, "max_position_embeddings"):
            found = sizes.get(field)
            _require(found is not None, f"model.{field}", found, "a number, or a preset")
        width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        wanted = f"a divisor of hidden_size ({width})"
        _require(width % heads == 0, "model.num_attention_heads", heads, wanted)
        sizes.setdefault("num_key_value_heads", heads)
        sizes |= {"head_dim": width // heads, "vocab_size": vocab_size, **token_ids}
        try:
            return LlamaConfig(**sizes)
        except InputError as error:
            raise InputError(f"model.{error}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data and its tokenizer."""

    sources: str = option("", "JSON-lines files of conversations, comma-separated; may be gs://.")
    tokenizer: str = option("", "Folder or hub name; empty: the one that comes with init_from.")
    tokenizer_vocab_size: int | None = option(
        None, "Train a tokenizer of this many ids on the data, kept in WORKDIR/tokenizer."
    )
    chat_template: str = option(
        "tulu", "How messages become text: tulu, own (the tokenizer's), or a jinja file."
    )
    seq_len: int = option(2048, "Tokens in a row of a batch.")
    packing: bool = option(True, "Several examples share a row; none sees another.")
    too_long: Literal["truncate", "drop", "error"] = option(
        "truncate", "What happens to an example longer than a row; always counted."
    )
    on_bad_row: Literal["refuse", "skip"] = option(
        "refuse", "Stop before training and list bad rows, or count them and go on."
    )
    workers: int = option(0, "Processes that make batches; 0: threads of the training process.")
    show: int = option(0, "Examples printed before training, their trained tokens marked.")

    def __post_init__(self):
        found = self.sources
        _require(bool(found.strip()), "sources", found, "files to train on, comma-separated")
        _at_least(self, 2, "seq_len")
        _at_least(self, 0, "workers", "show")
        _at_least(self, 300, "tokenizer_vocab_size")  # 256 bytes, special tokens, some pieces
        _require(
            not (self.tokenizer and self.tokenizer_vocab_size),
            "tokenizer_vocab_size",
            self.tokenizer_vocab_size,
            f"none, since tokenizer names one to load ({self.tokenizer})",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and decay to 0."""

    learning_rate: float = option(2e-5, "Peak learning rate.")
    warmup_ratio: float = option(0.03, "Share of the steps in which the rate rises from 0.")
    b1: float = option(0.9, "Decay of the mean of gradients.")
    b2: float = option(0.999, "Decay of the mean of squared gradients.")
    eps: float = option(1e-8, "Added to the root of the mean of squares.")
    weight_decay: float = option(0.0, "Decoupled decay of matrices; norms and biases have none.")
    clip_norm: float | None = option(1.0, "Largest global norm of a gradient; none: no clipping.")

    def __post_init__(self):
        for field in ("learning_rate", "eps"):
            value = getattr(self, field)
            _require(value > 0, field, value, "a number above 0")
        for field in ("b1", "b2", "warmup_ratio"):
            value = getattr(self, field)
            _require(0 <= value < 1, field, value, "a number from 0 to below 1")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        found = self.clip_norm
        _require(found is None or found > 0, "clip_norm", found, "a number above 0, or none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of the run is saved under WORKDIR/checkpoints."""

    every: int = option(500, "Steps between checkpoints; the last step is always saved.")
    keep: int = option(2, "Newest checkpoints kept.")

    def __post_init__(self):
        _at_least(self, 1, "every", "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The Hugging Face folder WORKDIR/hf, written at the end."""

    dtype: Literal["float32", "bfloat16"] = option("bfloat16", "Of the exported weights.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning: a model learns to say what the assistant of each example says."""

    init_from: str = option(
        "",
        "Where the weights come from: a Hugging Face folder or hub name, a native checkpoint, an "
        "EasyLM stream, or random.",
    )
    seed: int = option(42, "Of the data order and of random weights.")
    mesh: str = option("1,-1,1", "Devices along data,fsdp,tensor; one may be -1 (what is left).")
    steps: int | None = option(None, "Optimizer steps; either this or epochs.")
    epochs: int | None = option(None, "Passes over the data; either this or steps.")
    batch_examples: int | None = option(None, "Examples in a step; either this or batch_rows.")
    batch_rows: int | None = option(None, "Rows of seq_len in a step; or batch_examples.")
    micro_batches: int = option(1, "Parts a step's rows are computed in; divides the rows.")
    log_every: int = option(1, "Steps between lines of metrics.jsonl.")
    loss_chunk: int = option(512, "Tokens of a row whose logits exist at the same time.")
    remat: Literal["none", "dots", "block", "block_sharded"] = option(
        "block", "What the backward pass computes again to save memory."
    )
    attention: Literal["auto", "reference", "blockwise", "splash", "flash", "cudnn"] = option(
        "auto", "Kernel of attention; auto: by kind of device."
    )
    param_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "Of the trained weights and the optimizer's state."
    )
    compute_dtype: Literal["float32", "bfloat16"] = option(
        "bfloat16", "Of activations and matrix products."
    )
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    export: ExportConfig

    def __post_init__(self):
        _require(bool(self.init_from), "init_from", self.init_from, "weights to start from")
        parse_mesh(self.mesh)
        self._check_amounts()
        self._check_model_options()

    def _check_amounts(self) -> None:
        _at_least(self, 1, "steps", "epochs", "batch_examples", "batch_rows", "micro_batches")
        _at_least(self, 1, "log_every", "loss_chunk")
        _at_least(self, 0, "seed")
        for first, second in (("steps", "epochs"), ("batch_examples", "batch_rows")):
            found = getattr(self, first), getattr(self, second)
            if (found[0] is None) == (found[1] is None):
                raise InputError(
                    f"{first}: found {first}={found[0]} and {second}={found[1]}; wanted exactly "
                    "one of the two (set the other to none)"
                )
        rows, parts = self.batch_rows, self.micro_batches
        wanted = f"a divisor of batch_rows ({rows})"
        _require(rows is None or rows % parts == 0, "micro_batches", parts, wanted)

    def _check_model_options(self) -> None:
        if self.init_from != "random":
            given = self.model.given() | (
                {"preset": self.model.preset} if self.model.preset else {}
            )
            for field, value in given.items():
                wanted = f"none: {self.init_from} has its own (only init_from=random takes sizes)"
                _require(False, f"model.{field}", value, wanted)
            found = self.data.tokenizer_vocab_size
            wanted = f"none: the ids of a new tokenizer mean nothing to {self.init_from}"
            _require(found is None, "data.tokenizer_vocab_size", found, wanted)
            return
        for field in ("hf_config", "resize_vocab"):
            found = getattr(self.model, field)
            _require(not found, f"model.{field}", found, "none of it with init_from=random")
        wanted = "a tokenizer: random weights come with none (or set data.tokenizer_vocab_size)"
        has_tokenizer = self.data.tokenizer or self.data.tokenizer_vocab_size
        _require(bool(has_tokenizer), "data.tokenizer", self.data.tokenizer, wanted)
        # The real vocabulary is known with the tokenizer; the sizes can be judged before it.
        self.check_model(self.model.llama_config(vocab_size=1))

    def check_model(self, model: LlamaConfig) -> None:
        """Refuses a model that cannot be trained with this config.

        Raises:
          InputError: rows longer than the model's positions, or rope scaling that depends on
            the length of a text, which a packed row does not have.
        """
        longest = model.max_position_embeddings
        wanted = f"at most {longest}, the max_position_embeddings of the model"
        _require(self.data.seq_len <= longest, "data.seq_len", self.data.seq_len, wanted)
        if model.rope_scaling is not None:
            found = model.rope_scaling.rope_type
            wanted = "linear or llama3: training packs rows, and dynamic needs one text a row"
            _require(found != "dynamic", "init_from: rope_scaling.rope_type", found, wanted)
