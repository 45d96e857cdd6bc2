"""The sections of a run's config: every option, its default, and the rules it must obey."""

import dataclasses
import re
from typing import Literal

from easylm.config import option
from easylm.errors import InputError
from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.presets import PRESETS


def require(holds: bool, field: str, found: object, wanted: str) -> None:
    """Raises InputError about `field` unless the rule holds."""
    if not holds:
        raise InputError(f"{field}: found {found!r}; wanted {wanted}")


def at_least(config: object, least: int, *fields: str) -> None:
    """Refuses fields of `config` that are set and below `least`."""
    for field in fields:
        value = getattr(config, field)
        require(value is None or value >= least, field, value, f"at least {least}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that init_from=random makes, and the vocabulary of any model."""

    preset: str = option("", "Sizes of a published model, such as llama2_7b; random only.")
    hidden_size: int | None = option(None, "Width of the residual stream.")
    intermediate_size: int | None = option(None, "Width inside the MLP.")
    num_hidden_layers: int | None = option(None, "Number of blocks.")
    num_attention_heads: int | None = option(None, "Query heads; divides hidden_size.")
    num_key_value_heads: int | None = option(None, "Key and value heads; none: one per query head.")
    max_position_embeddings: int | None = option(
        None, "Longest row the model takes; none: as long as it was made for, except at random."
    )
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
        require(self.preset in ("", *PRESETS), "preset", self.preset, f"one of {known}")
        at_least(self, 1, "hidden_size", "intermediate_size", "num_hidden_layers")
        at_least(self, 1, "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        for field in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, field)
            require(value is None or value > 0, field, value, "a number above 0")

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
            require(found is not None, f"model.{field}", found, "a number, or a preset")
        width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        wanted = f"a divisor of hidden_size ({width})"
        require(width % heads == 0, "model.num_attention_heads", heads, wanted)
        sizes.setdefault("num_key_value_heads", heads)
        sizes |= {"head_dim": width // heads, "vocab_size": vocab_size, **token_ids}
        try:
            return LlamaConfig(**sizes)
        except InputError as error:
            raise InputError(f"model.{error}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data and its tokenizer."""

    sources: str = option(
        "",
        "Conversations, or pairs, to train on, comma-separated, each PATH[@count|@fraction]: JSON "
        "lines, JSON or parquet files, local or gs://, folders of save_to_disk, TFDS, or names on "
        "the hub.",
    )
    eval_sources: str = option("", "The same for evaluation; none of it is trained on.")
    tokenizer: str = option("", "Folder or hub name; empty: the one that comes with init_from.")
    tokenizer_vocab_size: int | None = option(
        None, "Train a tokenizer of this many ids on the data, kept in WORKDIR/tokenizer."
    )
    chat_template: str = option(
        "tulu", "How messages become text: tulu, own (the tokenizer's), or a jinja file."
    )
    eos_newline: Literal["keep", "strip"] = option(
        "keep",
        "The newline after the end of a turn: kept, as the chat template writes it, or stripped, "
        "as Tulu 2 was trained (LLaMA's sentencepiece tokenizer only).",
    )
    special_tokens: Literal["text", "parse"] = option(
        "text", "A content that spells a special token: stays text, or becomes that token."
    )
    seq_len: int = option(2048, "Tokens in a row of a batch.")
    packing: bool = option(True, "Several examples share a row; none sees another.")
    too_long: Literal["truncate", "drop", "error"] = option(
        "truncate", "What happens to an example longer than a row; always counted."
    )
    on_bad_row: Literal["refuse", "skip"] = option(
        "refuse", "Stop before training and list bad rows, or count them and go on."
    )
    cache: str = option(
        "",
        "Folder of encoded data, which later runs use; may be gs://. Empty: "
        "~/.cache/easylm/prepared, or WORKDIR/prepared where there are several hosts.",
    )
    processes: int | None = option(None, "Processes that encode; none: one per core.")
    expected_examples: int | None = option(
        None, "Examples that sources hold, by whoever wrote the config; plan then reads none."
    )
    expected_mean_tokens: float | None = option(
        None, "Their mean length, for plan; of a pair, both sequences together."
    )
    show: int = option(0, "Examples printed before training, their trained tokens marked.")

    def __post_init__(self):
        found = self.sources
        require(bool(found.strip()), "sources", found, "files to train on, comma-separated")
        at_least(self, 2, "seq_len")
        at_least(self, 0, "show")
        at_least(self, 1, "processes", "expected_examples", "expected_mean_tokens")
        known = self.expected_examples is None, self.expected_mean_tokens is None
        require(
            known[0] == known[1],
            "expected_examples",
            self.expected_examples,
            f"it beside expected_mean_tokens ({self.expected_mean_tokens}), or neither",
        )
        at_least(self, 300, "tokenizer_vocab_size")  # 256 bytes, special tokens, some pieces
        require(
            not (self.tokenizer and self.tokenizer_vocab_size),
            "tokenizer_vocab_size",
            self.tokenizer_vocab_size,
            f"none, since tokenizer names one to load ({self.tokenizer})",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning rate over the run."""

    name: Literal["adamw", "adafactor", "lion"] = option(
        "adamw", "The update rule. Adafactor's rate is relative to the size of the weights."
    )
    learning_rate: float = option(2e-5, "Peak learning rate.")
    schedule: Literal["linear", "cosine", "constant", "wsd"] = option(
        "linear", "How the rate falls after the warm-up; wsd: at the end only, for decay_ratio."
    )
    warmup_ratio: float = option(0.03, "Share of the steps in which the rate rises from 0.")
    warmup_steps: int | None = option(None, "The same in steps; takes the place of warmup_ratio.")
    decay_ratio: float = option(0.1, "Share of the steps in which wsd's rate falls; wsd only.")
    final_ratio: float = option(0.0, "Rate at the end, as a share of the peak; not for constant.")
    b1: float = option(0.9, "Decay of the mean of gradients (adamw, lion).")
    b2: float = option(0.999, "Decay of the mean of squared gradients (adamw); lion's second.")
    eps: float = option(1e-8, "Added to the root of the mean of squares (adamw).")
    weight_decay: float = option(0.0, "Decoupled decay of matrices; norms and biases have none.")
    clip_norm: float | None = option(1.0, "Largest global norm of a gradient; none: no clipping.")
    mu_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "Of the mean of gradients (adamw, lion). The mean of squares is always float32: what one "
        "step adds to it is below the resolution of bfloat16.",
    )

    def __post_init__(self):
        for field in ("learning_rate", "eps"):
            value = getattr(self, field)
            require(value > 0, field, value, "a number above 0")
        for field in ("b1", "b2", "warmup_ratio", "final_ratio"):
            value = getattr(self, field)
            require(0 <= value < 1, field, value, "a number from 0 to below 1")
        at_least(self, 0, "warmup_steps")
        require(0 < self.decay_ratio <= 1, "decay_ratio", self.decay_ratio, "above 0, at most 1")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        wanted = "float32: adafactor keeps no mean of gradients"
        require(
            self.name != "adafactor" or self.mu_dtype == "float32",
            "mu_dtype",
            self.mu_dtype,
            wanted,
        )
        found = self.clip_norm
        require(found is None or found > 0, "clip_norm", found, "a number above 0, or none")


# Losses of the policy alone: no reference is read or computed for them.
_REFERENCE_FREE = ("simpo", "orpo")
_SMOOTHED = ("sigmoid", "sigmoid_norm", "robust")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoOptions:
    """The preference loss, its reference, and what of a pair counts."""

    beta: float = option(0.1, "How strongly the policy is held to the reference; orpo: lambda.")
    loss: Literal[
        "sigmoid", "robust", "hinge", "ipo", "ipo_sum", "sigmoid_norm", "simpo", "orpo"
    ] = option(
        "sigmoid",
        "sigmoid: DPO. ipo: of means per token, ipo_sum: of sums. sigmoid_norm: DPO of means per "
        "token (Tulu 3). simpo and orpo have no reference.",
    )
    label_smoothing: float = option(
        0.0,
        "Share of pairs whose labels are thought wrong; sigmoid, sigmoid_norm (cDPO) and robust.",
    )
    simpo_gamma: float = option(0.5, "Margin that is asked for; simpo only.")
    sft_weight: float = option(
        0.0, "Weight of the mean negative log-probability of the chosen answer's tokens."
    )
    margin_weight: float = option(
        0.0, "Share of each row's margin that its rewards must differ by; sigmoid only (ODPO)."
    )
    reference: str = option(
        "policy", "The model to compare with: policy, what init_from gives; or weights, as there."
    )
    scored_turns: Literal["last", "all"] = option(
        "last", "Whose log-probabilities count: the last turn of the assistant, or all of them."
    )
    keep_prompt: Literal["end", "start"] = option(
        "end", "The side of the prompt that stays where a pair is longer than a row."
    )

    def __post_init__(self):
        require(self.beta > 0, "beta", self.beta, "a number above 0")
        found = self.label_smoothing
        require(0 <= found < 0.5, "label_smoothing", found, "a number from 0 to below 0.5")
        wanted = f"0 with loss={self.loss}; it is for {', '.join(_SMOOTHED)}"
        require(not found or self.loss in _SMOOTHED, "label_smoothing", found, wanted)
        wanted = "above 0 with loss=robust, which is sigmoid without it"
        require(bool(found) or self.loss != "robust", "label_smoothing", found, wanted)
        default = type(self).simpo_gamma
        wanted = f"{default}, which is not looked at: loss={self.loss}"
        is_used = self.loss == "simpo"
        require(is_used or self.simpo_gamma == default, "simpo_gamma", self.simpo_gamma, wanted)
        for field in ("sft_weight", "margin_weight", "simpo_gamma"):
            value = getattr(self, field)
            require(value >= 0, field, value, "0 or more")
        wanted = f"0 with loss={self.loss}; it is for sigmoid"
        found = self.margin_weight
        require(not found or self.loss == "sigmoid", "margin_weight", found, wanted)
        require(bool(self.reference), "reference", self.reference, "policy, or weights")
        wanted = f"policy: loss={self.loss} has no reference"
        require(
            self.reference == "policy" or self.needs_reference,
            "reference",
            self.reference,
            wanted,
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with a reference."""
        return self.loss not in _REFERENCE_FREE


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of the run is saved under WORKDIR/checkpoints."""

    every: int = option(500, "Steps between checkpoints; the last step is always saved.")
    keep: int = option(2, "Newest checkpoints kept.")
    grace_seconds: float = option(
        30.0,
        "Time between being told to stop and the end of the machine, 30 for spot TPUs; a run whose "
        "saves take longer says so.",
    )

    def __post_init__(self):
        at_least(self, 1, "every", "keep")
        at_least(self, 0, "grace_seconds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The Hugging Face folder WORKDIR/hf, written at the end."""

    dtype: Literal["float32", "bfloat16"] = option("bfloat16", "Of the exported weights.")
    every: int | None = option(
        None, "Steps between exports to WORKDIR/hf/STEP, the last one included; none: one, hf/."
    )

    def __post_init__(self):
        at_least(self, 1, "every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Which steps of the run are traced."""

    steps: str = option(
        "", "Steps to trace into WORKDIR/profile, as FIRST:LAST, both included; empty: none."
    )

    def __post_init__(self):
        wanted = "FIRST:LAST, two steps counted from 1, such as 10:13, or nothing"
        valid = self.steps == "" or re.fullmatch(r"[0-9]{1,9}:[0-9]{1,9}", self.steps)
        require(bool(valid), "steps", self.steps, wanted)
        if self.steps:
            require(1 <= self.first <= self.last, "steps", self.steps, wanted)

    @property
    def first(self) -> int:
        """The first step to trace."""
        return int(self.steps.split(":")[0])

    @property
    def last(self) -> int:
        """The last one."""
        return int(self.steps.split(":")[1])
