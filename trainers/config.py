"""The configs of runs, and the rules that hold between their options."""

import dataclasses
from typing import Literal

from easylm.compilation import CACHE
from easylm.config import option, parse_mesh
from easylm.errors import InputError
from easylm.models.llama.config import LlamaConfig
from easylm.trainers.options import (
    CheckpointConfig,
    DataConfig,
    DpoOptions,
    ExportConfig,
    ModelConfig,
    OptimizerConfig,
    ProfileConfig,
    at_least,
    require,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run has, whatever its objective."""

    init_from: str = option(
        "",
        "Where the weights come from: a Hugging Face folder or hub name, a native checkpoint, an "
        "EasyLM stream, or random.",
    )
    seed: int = option(42, "Of the data order and of random weights.")
    mesh: str = option("1,-1,1", "Devices along data,fsdp,tensor; one may be -1 (what is left).")
    pod: str = option(
        "", "The slice it is meant for, such as v3-256: what plan compiles for; runs anywhere."
    )
    cpu_devices: int | None = option(
        None, "Virtual devices to make where jax runs on a CPU; none: one, or XLA_FLAGS decides."
    )
    steps: int | None = option(None, "Optimizer steps; either this or epochs.")
    epochs: int | None = option(None, "Passes over the data; either this or steps.")
    batch_examples: int | None = option(None, "Examples in a step; either this or batch_rows.")
    batch_rows: int | None = option(None, "Rows of seq_len in a step; or batch_examples.")
    micro_batches: int = option(1, "Parts a step's rows are computed in; divides the rows.")
    eval_every: int = option(100, "Steps between evaluations on data.eval_sources.")
    log_every: int = option(1, "Steps between lines of metrics.jsonl.")
    tensorboard: bool = option(False, "Also write the metrics to WORKDIR/tensorboard.")
    wandb: str = option("", "Also send the metrics to this project of Weights & Biases.")
    loss_chunk: int = option(512, "Tokens of a row whose logits exist at the same time.")
    remat: Literal["none", "dots", "block", "block_sharded"] = option(
        "block", "What the backward pass computes again to save memory."
    )
    attention: Literal["auto", "reference", "blockwise", "splash", "flash", "cudnn"] = option(
        "auto", "Kernel of attention; auto: by kind of device."
    )
    param_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "Of the trained weights; the optimizer's state has its own."
    )
    compute_dtype: Literal["float32", "bfloat16"] = option(
        "bfloat16", "Of activations and matrix products."
    )
    compilation_cache: str = option(
        CACHE, "Folder of compiled steps, which later starts use; empty: none."
    )
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    export: ExportConfig
    profile: ProfileConfig

    def __post_init__(self):
        require(bool(self.init_from), "init_from", self.init_from, "weights to start from")
        parse_mesh(self.mesh)
        self._check_amounts()
        self._check_model_options()

    def _check_amounts(self) -> None:
        at_least(self, 1, "steps", "epochs", "batch_examples", "batch_rows", "micro_batches")
        at_least(self, 1, "log_every", "loss_chunk", "eval_every", "cpu_devices")
        at_least(self, 0, "seed")
        for first, second in (("steps", "epochs"), ("batch_examples", "batch_rows")):
            found = getattr(self, first), getattr(self, second)
            if (found[0] is None) == (found[1] is None):
                raise InputError(
                    f"{first}: found {first}={found[0]} and {second}={found[1]}; wanted exactly "
                    "one of the two (set the other to none)"
                )
        warmup, steps = self.optimizer.warmup_steps, self.steps
        wanted = f"at most steps ({steps})"
        require(not (warmup and steps and warmup > steps), "optimizer.warmup_steps", warmup, wanted)
        rows, parts = self.batch_rows, self.micro_batches
        wanted = f"a divisor of batch_rows ({rows})"
        require(rows is None or rows % parts == 0, "micro_batches", parts, wanted)

    def _check_model_options(self) -> None:
        if self.init_from != "random":
            given = self.model.given() | (
                {"preset": self.model.preset} if self.model.preset else {}
            )
            given.pop("max_position_embeddings", None)  # longer rows are the user's to try
            for field, value in given.items():
                wanted = f"none: {self.init_from} has its own (only init_from=random takes sizes)"
                require(False, f"model.{field}", value, wanted)
            found = self.data.tokenizer_vocab_size
            wanted = f"none: the ids of a new tokenizer mean nothing to {self.init_from}"
            require(found is None, "data.tokenizer_vocab_size", found, wanted)
            return
        for field in ("hf_config", "resize_vocab"):
            found = getattr(self.model, field)
            require(not found, f"model.{field}", found, "none of it with init_from=random")
        wanted = "a tokenizer: random weights come with none (or set data.tokenizer_vocab_size)"
        has_tokenizer = self.data.tokenizer or self.data.tokenizer_vocab_size
        require(bool(has_tokenizer), "data.tokenizer", self.data.tokenizer, wanted)
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
        require(self.data.seq_len <= longest, "data.seq_len", self.data.seq_len, wanted)
        if model.rope_scaling is not None:
            found = model.rope_scaling.rope_type
            wanted = "linear or llama3: training packs rows, and dynamic needs one text a row"
            require(found != "dynamic", "init_from: rope_scaling.rope_type", found, wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig(RunConfig):
    """Supervised fine-tuning: a model learns to say what the assistant of each example says."""

    loss_weighting: Literal["token", "example", "microbatch"] = option(
        "token",
        "What weighs the same in the loss of a step: each trained token, each example, or each "
        "group of loss_group examples (what Tulu 1 and 2 did).",
    )
    loss_group: int = option(32, "Examples in a group; loss_weighting=microbatch only.")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "loss_group")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoConfig(RunConfig):
    """Preference optimization: a model learns to prefer the chosen answer of each pair.

    An example is a pair here: batch_examples counts pairs.
    """

    dpo: DpoOptions
