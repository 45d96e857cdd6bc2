"""What a run is going to do, said before it starts."""

import time
from datetime import timedelta

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easylm.data.batches import BatchStream
from easylm.devices import peak_flops
from easylm.metrics import model_flops
from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.model import count_parameters
from easylm.trainers.build import warmup_count
from easylm.trainers.config import RunConfig
from easylm.trainers.memory import format_bytes
from easylm.trainers.objective import Objective


def overview(
    config: RunConfig,
    model: LlamaConfig,
    mesh: Mesh,
    objective: Objective,
    stream: BatchStream,
    memory,
    last_step: int,
) -> str:
    """A few lines of at most 80 columns on model, data, steps, memory and time.

    Args:
      config: the run's.
      model: sizes of the model.
      mesh: where it runs.
      objective: what is trained for.
      stream: the run's batches.
      memory: what the compiled step's memory_analysis() gives; None where it gives nothing.
      last_step: the step the run goes on from, 0 for a new one.
    """
    options, steps = config.optimizer, len(stream)
    lengths = stream.seen_lengths
    rate = f"{options.name}, {options.schedule}, peak {options.learning_rate:g} after "
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    rows = stream.rows_per_batch - stream.batch_rows
    lines = {
        "model": f"{count_parameters(model):,} parameters in {config.param_dtype}",
        "data": f"{stream.num_examples:,} {objective.noun}s, seen {stream.epoch(steps):.3g} times: "
        f"{lengths.sum():,} tokens",
        "steps": f"{steps:,} of {stream.batch_rows:,} rows of {stream.seq_len:,} tokens, "
        f"{stream.fill:.1%} filled",
        "a step": f"{len(lengths) / steps:,.1f} {objective.noun}s, "
        f"{lengths.sum() / steps:,.0f} tokens",
        "loss": objective.description,
        "optimizer": f"{rate}{warmup_count(options, steps):,} steps of warm-up",
        "mesh": f"{axes}; {mesh.devices.flat[0].device_kind}"
        + (f"; {rows} empty rows a step to divide it" if rows else ""),
    }
    if memory is not None:
        lines["memory"] = (
            f"{format_bytes(memory.argument_size_in_bytes)} state and batch + "
            f"{format_bytes(memory.temp_size_in_bytes)} temporaries a device (compiler)"
        )
    lines["time"] = _time(model, mesh, lengths, jnp.dtype(config.compute_dtype), last_step / steps)
    return "\n".join(f"  {name:<10}{text}" for name, text in lines.items())


def _time(model: LlamaConfig, mesh: Mesh, lengths: np.ndarray, dtype, done: float) -> str:
    """The least time that is left: model FLOPs at the speed of bare matrix products."""
    flops = flops_of_segments(model, lengths)
    peak = peak_flops(mesh.devices.flat[0].device_kind, mesh.size)
    how = "the devices' peak" if peak else "measured here"
    speed = peak or _measured_flops(mesh, dtype)
    least = timedelta(seconds=round(flops * (1 - done) / speed))
    return f"at least {least}: {flops:.2g} FLOPs, {speed:.2g} a second ({how})"


def flops_of_segments(model: LlamaConfig, lengths: np.ndarray) -> float:
    """What training on segments of these lengths asks of the model; see `model_flops`."""
    lengths = lengths.astype(np.float64)
    return model_flops(
        parameters=count_parameters(model),
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        head_dim=model.head_dim,
        tokens=lengths.sum(),
        causal_pairs=(lengths * (lengths + 1) / 2).sum(),
    )


def _measured_flops(mesh: Mesh, dtype, size: int = 1024) -> float:
    """FLOP/s of a matrix product on all devices at once."""
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    shape = (size * mesh.size, size)
    product = jax.jit(lambda a, b: a @ b, out_shardings=rows)
    a = jax.device_put(np.ones(shape, dtype), rows)
    b = jax.device_put(np.ones((size, size), dtype), NamedSharding(mesh, PartitionSpec()))
    product(a, b).block_until_ready()
    started = time.perf_counter()
    product(a, b).block_until_ready()
    return 2 * size**3 * mesh.size / (time.perf_counter() - started)
