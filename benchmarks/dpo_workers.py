"""The processes that benchmarks/dpo_step.py times: each takes a step for each line it is sent.

    python -m benchmarks.dpo_workers NAME SIZE [BATCH,BATCH,...]

The step, its optimizer and its packed batches are those that training builds.
"""

import copy
import dataclasses
import itertools
import sys
import tempfile

import numpy as np

from benchmarks.dpo_pairs import (
    END_OF_TURN,
    PAIRS,
    ROW,
    epoch_of_batches,
    padded_batch,
    ultrafeedback_pairs,
)
from benchmarks.process import Clock, answer, forget_peak, memory, say, timed
from benchmarks.sft_workers import LEARNING_RATE, SIZES, Run, run_options
from easylm.data.batches import Batch, BatchStream
from easylm.data.pair_batches import pair_stream, pairs_per_row
from easylm.data.pairs import Pairs
from easylm.models.llama.config import LlamaConfig

PACKED_BATCHES = 2  # in turn: they differ in what their rows hold, not in shape
ROWS = {"58m": ROW, "tiny": 256}
END_WORD = "</s>"


def model_of(size: str) -> LlamaConfig:
    """The model of the benchmark of fine-tuning, with rows as long as pairs need."""
    return dataclasses.replace(SIZES[size], max_position_embeddings=ROWS[size])


def packed_stream(pairs: Pairs, seq_len: int) -> BatchStream:
    """An epoch of packed batches, of so many rows that one holds PAIRS on average."""
    options = {"seq_len": seq_len, "packing": True, "seed": 0, "epochs": 1}
    rows = len(pair_stream(pairs, batch_rows=1, **options))
    return pair_stream(pairs, batch_rows=max(1, round(PAIRS * rows / len(pairs))), **options)


def dpo_run(model: LlamaConfig, rows: int, width: int, loss=None, kind=Run) -> Run:
    """A run of preference optimization with the options of training.

    Args:
      model: sizes.
      rows, width: of a batch, and pairs in each row.
      loss: (options, loss_chunk) -> another loss than that of trainers/dpo.py.
      kind: the class.
    """
    from easylm.trainers.config import DpoConfig
    from easylm.trainers.dpo import dpo_objective
    from easylm.trainers.options import DpoOptions

    config = DpoConfig(batch_rows=rows, dpo=DpoOptions(), **run_options(model))
    objective = dpo_objective(config, rows, width)
    if loss is not None:
        objective = objective._replace(loss_fn=loss(config.dpo, config.loss_chunk))
    return kind(config, model, objective)


def serve_packed(model: LlamaConfig) -> None:
    """Takes steps with a stored reference, and for "reference" the pass that computes it."""
    import jax
    from flax import nnx

    from easylm.trainers.dpo import pair_logprobs

    seq_len = model.max_position_embeddings
    pairs = ultrafeedback_pairs(model)
    stream = packed_stream(pairs, seq_len)
    run = dpo_run(model, stream.batch_rows, pairs_per_row(pairs, seq_len, packing=True))

    def reference_of(params: dict, batch: Batch):
        said = pair_logprobs(nnx.merge(run.program.graph, params), batch, run.config.loss_chunk)
        return said.chosen, said.rejected

    forward = jax.jit(reference_of).lower(run.state.params, stream[0]).compile()

    def with_reference(batch: Batch) -> Batch:
        chosen, rejected = jax.device_get(forward(run.state.params, batch))
        return {**batch, "reference_chosen": chosen, "reference_rejected": rejected}

    batches = [with_reference(stream[step]) for step in range(PACKED_BATCHES)]
    compiled = run.compiled(batches[0])
    turn, before = itertools.cycle(batches), prepared()

    def take(what: str) -> dict:
        if what == "reference":
            return timed(lambda: with_reference(batches[0])["reference_chosen"].sum().item())
        return {**timed(run.step, compiled, next(turn)), "xla": needed(compiled)}

    answer({"before": before, "rows": stream.batch_rows, "fill": stream.fill}, take)


def serve_padded(model: LlamaConfig) -> None:
    """Takes a step on batch B padded to W for "B W", with the reference in memory."""
    pairs = ultrafeedback_pairs(model)
    run = dpo_run(model, 2 * PAIRS, 1, loss_of_padded, LiveRun)
    before = prepared()
    compiled = {}

    def take(what: str) -> dict:
        number, width = map(int, what.split())
        batch = padded_batch(pairs, number, width)
        if width not in compiled:
            compiled[width] = run.compiled(batch)
            prepared()
        return {**timed(run.step, compiled[width], batch), "xla": needed(compiled[width])}

    answer({"before": before}, take)


class LiveRun(Run):
    """A run whose every step asks a second model, which starts as the same one."""

    def __init__(self, config, model: LlamaConfig, objective):
        import jax

        super().__init__(config, model, objective)
        self._reference = jax.tree.map(jax.numpy.copy, self.state.params)

    def compiled(self, batch: Batch):
        """The step for batches of this shape, with the reference's forward pass."""
        import jax
        from flax import nnx

        def step(state, reference: dict, batch: Batch):
            said = padded_logprobs(
                nnx.merge(self.program.graph, reference), batch, self.config.loss_chunk
            )
            known = {"reference_chosen": said.chosen, "reference_rejected": said.rejected}
            return self.program.step(state, {**batch, **known})

        jitted = jax.jit(step, donate_argnums=0)
        return jitted.lower(self.state, self._reference, batch).compile()

    def step(self, compiled, batch: Batch) -> float:
        """Takes a step; returns its loss."""
        self.state, metrics = compiled(self.state, self._reference, batch)
        return float(metrics["loss"])


def loss_of_padded(options, loss_chunk: int):
    """The loss of trainers/dpo.py on the batches of `padded_batch`."""
    import jax.numpy as jnp

    from easylm.trainers.preference_losses import pair_losses
    from easylm.trainers.step import Metrics

    losses = pair_losses(options)

    def loss_fn(model, batch: Batch, rng):
        policy = padded_logprobs(model, batch, loss_chunk)
        of_pairs = losses(policy, batch["reference_chosen"], batch["reference_rejected"], 0.0)
        return jnp.sum(of_pairs), float(PAIRS), Metrics({}, means={}, maxima={})

    return loss_fn


def padded_logprobs(model, batch: Batch, loss_chunk: int):
    """Logprobs of the pairs of `padded_batch`, `[pairs]` each."""
    import jax.numpy as jnp

    from easylm.trainers.dpo import pair_logprobs
    from easylm.trainers.preference_losses import Logprobs

    rows = pair_logprobs(model, batch, loss_chunk)
    return Logprobs(*jnp.split(rows.chosen[:, 0], 2), *jnp.split(rows.chosen_tokens[:, 0], 2))


def prepared() -> int:
    """Bytes held before any step; the peak counts from here."""
    forget_peak()
    return memory("VmRSS")


def needed(compiled) -> int:
    """Bytes that XLA says a program needs at once: arguments, results that are new, the rest."""
    stats = compiled.memory_analysis()
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + new + stats.temp_size_in_bytes


def serve_trl(model: LlamaConfig, batches: str) -> None:
    """Lets the loop of TRL's DPOTrainer take its next step, on these batches one after another."""
    import torch
    import transformers
    from transformers import TrainerCallback

    pairs = ultrafeedback_pairs(model)
    ids = np.concatenate([epoch_of_batches(pairs)[int(batch)] for batch in batches.split(",")])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**model.to_hf("float32"))
    network = transformers.LlamaForCausalLM(config)

    class OneStepALine(TrainerCallback):
        """Waits for a line before each step, and says after it what it took."""

        def on_step_begin(self, args, state, control, **kwargs):
            """Waits."""
            sys.stdin.readline()
            self.clock = Clock()

        def on_step_end(self, args, state, control, **kwargs):
            """Stops the time."""
            self.taken = self.clock.read()

        def on_log(self, args, state, control, logs=None, **kwargs):
            """Answers, now that the loss is known; a summary at the end has none."""
            if "loss" in logs:
                say({"loss": float(logs["loss"]), **self.taken})

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(network, pairs, ids, model, folder)
        trainer.add_callback(OneStepALine)
        say({"before": prepared(), "threads": torch.get_num_threads()})
        trainer.train()


def trl_trainer(network, pairs: Pairs, ids: np.ndarray, model: LlamaConfig, folder: str):
    """A DPOTrainer with its defaults, but float32 and, for the benchmark, pairs in order."""
    import datasets
    import trl
    from transformers.trainer_callback import PrinterCallback

    sides = [
        [pairs.sequences.example(sequence) for sequence in (2 * pair, 2 * pair + 1)] for pair in ids
    ]
    datasets.disable_progress_bars()
    starts = [int(chosen[1].argmax()) for chosen, _ in sides]
    columns = {
        "prompt": [chosen[0][:start] for (chosen, _), start in zip(sides, starts, strict=True)],
        "chosen": [chosen[0][start:] for (chosen, _), start in zip(sides, starts, strict=True)],
        "rejected": [bad[0][start:] for (_, bad), start in zip(sides, starts, strict=True)],
    }
    texts = {name: [spell(tokens) for tokens in column] for name, column in columns.items()}
    trainer = trl.DPOTrainer(
        network,
        ref_model=copy.deepcopy(network),
        args=trl.DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=PAIRS,
            max_length=model.max_position_embeddings,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            use_cpu=True,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_dict(texts),
        processing_class=tokenizer_of_numbers(model.vocab_size),
    )
    trainer.remove_callback(PrinterCallback)  # it prints where the answers go
    for name, column in columns.items():
        seen = trainer.train_dataset[f"{name}_ids"]
        if any(list(map(int, tokens)) != its for tokens, its in zip(column, seen, strict=True)):
            raise RuntimeError(f"TRL reads other ids than were meant as {name}")
    return trainer


def spell(tokens: np.ndarray) -> str:
    """Ids as words, each with a space before it."""
    return "".join(f" {END_WORD if token == END_OF_TURN else token}" for token in tokens)


def tokenizer_of_numbers(vocab_size: int):
    """A tokenizer that reads such words; the end of a turn is its end of text."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {"<pad>": 0, "<unk>": 1, END_WORD: END_OF_TURN}
    ids |= {str(token): token for token in range(len(ids), vocab_size)}
    by_words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    by_words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=by_words, eos_token=END_WORD, pad_token="<pad>", unk_token="<unk>"
    )


WORKERS = {
    "packed": serve_packed,
    "padded to longest": serve_padded,
    "padded to row": serve_padded,
    "trl": serve_trl,
}

if __name__ == "__main__":
    WORKERS[sys.argv[1]](model_of(sys.argv[2]), *sys.argv[3:])
