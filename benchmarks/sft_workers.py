"""The processes that benchmarks/sft_step.py times: each takes a step for each line it is sent.

    python -m benchmarks.sft_workers NAME SIZE

The step, its optimizer and its batches are those that training builds.
"""

import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.prepare import TULU2, tulu2_lengths
from benchmarks.process import answer, forget_peak, memory, timed
from easylm.data.batches import Batch, BatchStream
from easylm.data.encode import Examples
from easylm.data.example_batches import example_stream
from easylm.models.llama.config import LlamaConfig

_58M = LlamaConfig(
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=512,
)
_SMALLER = {"vocab_size": 2000, "hidden_size": 128, "intermediate_size": 344, "head_dim": 16}
_SMALLER |= {"num_hidden_layers": 2, "max_position_embeddings": 128}
SIZES = {"58m": _58M, "tiny": dataclasses.replace(_58M, **_SMALLER)}
LARGE_VOCABULARY = 128_256  # of Llama 3
ROWS = 8
LEARNING_RATE = 1e-4


class Run:
    """The state of a run, and the program that training builds for it.

    Args:
      config: of the run.
      model: sizes.
      objective: what it trains for.
    """

    def __init__(self, config, model: LlamaConfig, objective):
        import jax

        from easylm.models.llama.model import init_params
        from easylm.sharding import make_mesh
        from easylm.trainers.build import build
        from easylm.trainers.step import init_state

        self.config = config
        self.program = build(
            config,
            model=model,
            mesh=make_mesh(config.mesh),
            loss_fn=objective.loss_fn,
            batch=objective.batch,
            total_steps=config.steps,
        )
        shardings = self.program.shardings
        make = jax.jit(lambda key: init_params(model, key), out_shardings=shardings.params)
        self.state = init_state(make(jax.random.key(0)), self.program.optimizer, shardings)

    def compiled(self, batch: Batch):
        """The step for batches of this shape."""
        return self.program.jitted().lower(self.state, batch).compile()

    def step(self, compiled, batch: Batch) -> float:
        """Takes a step; returns its loss."""
        self.state, metrics = compiled(self.state, batch)
        return float(metrics["loss"])


def sft_run(model: LlamaConfig, loss_fn=None, **options) -> Run:
    """A run of fine-tuning; a row is as long as the model's positions reach.

    Args:
      model: sizes.
      loss_fn: another than that of trainers/sft.py.
      **options: of SftConfig.
    """
    from easylm.trainers.config import SftConfig
    from easylm.trainers.sft import sft_objective

    config = SftConfig(batch_rows=ROWS, **run_options(model), **options)
    objective = sft_objective(config, ROWS)
    return Run(config, model, objective._replace(loss_fn=loss_fn or objective.loss_fn))


def run_options(model: LlamaConfig) -> dict:
    """Options of a run in float32 on one device, with one learning rate for all steps."""
    from easylm.trainers import options

    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    positions = model.max_position_embeddings
    return {
        "init_from": "random",
        "mesh": "1,1,1",
        "steps": 1000,
        "compute_dtype": "float32",
        "model": options.ModelConfig(
            max_position_embeddings=positions, **{name: getattr(model, name) for name in sizes}
        ),
        "data": options.DataConfig(sources="random ids", tokenizer="none", seq_len=positions),
        "optimizer": options.OptimizerConfig(
            learning_rate=LEARNING_RATE, schedule="constant", warmup_steps=0
        ),
        "checkpoint": options.CheckpointConfig(),
        "export": options.ExportConfig(),
        "profile": options.ProfileConfig(),
    }


def full_rows(model: LlamaConfig) -> BatchStream:
    """Batches whose rows are one example each, as long as the row."""
    seq_len = model.max_position_embeddings
    return stream(random_examples([seq_len] * ROWS * 16, model), seq_len, packing=False)


def tulu2_examples(model: LlamaConfig) -> Examples:
    """Examples whose lengths are to a row what Tülu 2's are to its rows of 8,192 tokens."""
    # Every 40th of the lengths, which are sorted, has their distribution.
    lengths = tulu2_lengths()[::40] * model.max_position_embeddings // TULU2["max"]
    return random_examples(np.maximum(lengths, 2), model)


def random_examples(lengths: Sequence[int], model: LlamaConfig) -> Examples:
    """Random ids; the first quarter of an example is a prompt, on which nothing is trained."""
    ids = np.random.default_rng(0)
    return Examples.concatenate(
        [
            (
                ids.integers(0, model.vocab_size, length, np.int32),
                (np.arange(length) >= length // 4).astype(np.uint8),
            )
            for length in lengths
        ]
    )


def stream(examples: Examples, seq_len: int, *, packing: bool) -> BatchStream:
    """The batches of an epoch."""
    return example_stream(
        examples, seq_len=seq_len, batch_rows=ROWS, seed=0, packing=packing, epochs=1
    )


def cycle(batches: BatchStream) -> Iterator[Batch]:
    """Batches without end."""
    return (batches[step] for step in itertools.cycle(range(len(batches))))


def serve_easylm(model: LlamaConfig, **options) -> None:
    """Takes steps of training on full rows."""
    batches = cycle(full_rows(model))
    run = sft_run(model, **options)
    compiled = run.compiled(next(batches))
    tokens = ROWS * model.max_position_embeddings
    threads = len(os.sched_getaffinity(0))
    answer(
        {"tokens": tokens, "threads": threads}, lambda _: timed(run.step, compiled, next(batches))
    )


def serve_torch(model: LlamaConfig) -> None:
    """Takes steps of the loop that a user of torch and transformers writes, on the same rows."""
    import torch
    import transformers

    config = transformers.LlamaConfig(**model.to_hf("float32"))
    network = transformers.LlamaForCausalLM(config).train()
    adamw = torch.optim.AdamW(
        network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=0.0, fused=True
    )

    def step(batch: Batch) -> float:
        tokens = torch.from_numpy(batch["tokens"]).long()
        # A token is the target of the place before it; transformers shifts labels itself.
        trained = torch.from_numpy(np.roll(batch["loss_weights"] > 0, 1, axis=1))
        loss = network(input_ids=tokens, labels=tokens.where(trained, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        return loss.item()

    batches = cycle(full_rows(model))
    tokens, threads = ROWS * model.max_position_embeddings, torch.get_num_threads()
    first = {"tokens": tokens, "threads": threads}
    answer(first, lambda _: timed(step, next(batches)))


def serve_packing(model: LlamaConfig) -> None:
    """Takes a step on packed rows for "packed", on rows of so many tokens for a number."""
    run = sft_run(model, remat="none")
    packed = cycle(stream(tulu2_examples(model), model.max_position_embeddings, packing=True))
    full = cycle(full_rows(model))
    compiled = {}

    def take(what: str) -> dict:
        batch = next(packed) if what == "packed" else cut(next(full), int(what))
        shape = batch["tokens"].shape
        if shape not in compiled:
            compiled[shape] = run.compiled(batch)
        return timed(run.step, compiled[shape], batch)

    answer({}, take)


def cut(batch: Batch, width: int) -> Batch:
    """The first `width` tokens of every row."""
    return {name: np.ascontiguousarray(values[:, :width]) for name, values in batch.items()}


def serve_memory(model: LlamaConfig, **options) -> None:
    """Takes steps with a large vocabulary; first says what is held before any."""
    model = dataclasses.replace(model, vocab_size=LARGE_VOCABULARY)
    run = sft_run(model, remat="block", **options)
    batches = cycle(full_rows(model))
    compiled = run.compiled(next(batches))
    before = memory("VmRSS")
    forget_peak()
    first = {"before": before, "temporary": compiled.memory_analysis().temp_size_in_bytes}
    answer(first, lambda _: timed(run.step, compiled, next(batches)))


def loss_of_all_logits(model, batch: Batch, rng):
    """The loss of trainers/sft.py as one writes it without chunks."""
    import jax
    import jax.numpy as jnp

    from easylm.losses import cross_entropy
    from easylm.trainers.sft import token_counts
    from easylm.trainers.step import Metrics

    logits = model(batch["tokens"], batch["positions"], batch["segment_ids"])
    targets = batch["targets"][..., None]
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1)[..., 0]
    metrics = Metrics(token_counts(batch), means={}, maxima={})
    return *cross_entropy(logprobs, batch["loss_weights"]), metrics


WORKERS = {
    "easylm": functools.partial(serve_easylm, remat="none"),
    "easylm, lean": functools.partial(serve_easylm, remat="block", loss_chunk=64),
    "torch": serve_torch,
    "packing": serve_packing,
    "all logits": functools.partial(serve_memory, loss_fn=loss_of_all_logits),
    "chunked": functools.partial(serve_memory, loss_chunk=64),
}

if __name__ == "__main__":
    WORKERS[sys.argv[1]](SIZES[sys.argv[2]])
