"""What to change in a config whose step does not fit its devices."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.sharding import tensor_sizes
from easylm.planning.overflow import Overflow, Temporary
from easylm.planning.topology import Topology, slices
from easylm.trainers.config import RunConfig

_GIB = 2**30
_ITEM_SIZES = {"float32": 4, "bfloat16": 2}
# Below it, smaller chunks of logits save little and slow the loss down.
_SMALL_CHUNK = 512
# What saves less than this share of the memory needed is not worth a word.
_LEAST = 0.01


@dataclasses.dataclass(frozen=True)
class _Shares:
    """What the temporaries alive at the peak hold, in bytes of a device.

    Attributes:
      kept: by all layers, for the backward pass.
      logits: of a chunk of the loss.
      passing: all else that grows with the rows computed at once.
      weights: copies of weights in the compute dtype, and gradients.
    """

    kept: int
    logits: int
    passing: int
    weights: int


@dataclasses.dataclass(frozen=True)
class _Run:
    """A step that does not fit.

    Attributes:
      config, model: of the run.
      mesh: sizes of data, fsdp and tensor.
      rows: of a step, without empty ones.
      topology: its machines.
      overflow: what the compiler says.
    """

    config: RunConfig
    model: LlamaConfig
    mesh: Mapping[str, int]
    rows: int
    topology: Topology
    overflow: Overflow

    @property
    def groups(self) -> int:
        """Parts of the mesh that take different rows."""
        return self.mesh["data"] * self.mesh["fsdp"]

    @property
    def at_once(self) -> int:
        """Rows of a micro-batch in one group."""
        return self.rows_at_once(self.config.micro_batches)

    @property
    def chunk(self) -> int:
        """Tokens of a row whose logits exist at the same time."""
        return min(self.config.loss_chunk, self.config.data.seq_len)

    def rows_at_once(self, micro_batches: int) -> int:
        """Rows of a micro-batch in one group, for another number of micro-batches."""
        return -(-self.rows // (self.groups * micro_batches))


def advice(
    config: RunConfig,
    model: LlamaConfig,
    mesh: Mapping[str, int],
    overflow: Overflow,
    *,
    rows: int,
    topology: Topology,
) -> list[str]:
    """What to change, with what it is worth; what saves the most first, a larger slice last.

    The savings are estimates from the sizes of what is alive at the peak. Where they make another
    moment of the step the peak, less is saved, so plan again. Each change is one that this config
    and model allow.

    Args:
      config: the run's.
      model: sizes of the model.
      mesh: sizes of data, fsdp and tensor.
      overflow: what the compiler says of the step.
      rows: of a step, without the empty ones that fill the mesh.
      topology: its machines.
    Returns:
      lines such as "--config.remat=block: up to 9.4 GiB less, 11.2 in all: ...".
    """
    run = _Run(config, model, mesh, rows, topology, overflow)
    shares = _shares(run)
    found = [
        *_remat(run, shares),
        *_micro_batches(run, shares),
        *_wider_tensor(run, shares),
        *_fsdp_for_data(run, shares),
        *_loss_chunk(run, shares),
        *_mu_dtype(run),
    ]
    found = [*sorted(found, reverse=True), *_larger_slice(run, shares)]
    worth = [one for one in found if one[0] > _LEAST * overflow.needed]
    return [
        f"{change}: up to {saving / _GIB:.1f} GiB less, {(overflow.needed - saving) / _GIB:.1f} in "
        f"all: {reason}"
        for saving, change, reason in worth
    ]


def _shares(run: _Run) -> _Shares:
    kept = logits = weights = 0
    for one in run.overflow.largest:
        size = one.size * one.count
        if _is_of_weights(one, run):
            weights += size
        elif _dims(one)[0] == run.model.num_hidden_layers:
            kept += size
        elif _is_logits(one, run):
            logits += size
    passing = max(0, run.overflow.temporaries - kept - logits - weights)
    return _Shares(kept=kept, logits=logits, passing=passing, weights=weights)


def _dims(one: Temporary) -> list[int]:
    return [int(size) for size in one.shape.partition("[")[2][:-1].split(",") if size] or [1]


def _is_of_weights(one: Temporary, run: _Run) -> bool:
    """Whether it copies weights, or holds gradients: the forward pass makes neither."""
    model, dims = run.model, _dims(one)
    if one.operation.startswith("state."):
        return True
    widths = (
        model.intermediate_size,
        model.num_attention_heads * model.head_dim,
        model.num_key_value_heads * model.head_dim,
    )
    if dims[0] == model.num_hidden_layers:
        sizes = {model.num_hidden_layers * model.hidden_size * width for width in widths}
    else:
        sizes = {model.hidden_size * model.vocab_size}
    shards = math.prod(run.mesh.values())
    return "transpose(" in one.operation and any(
        size % math.prod(dims) == 0 and shards % (size // math.prod(dims)) == 0 for size in sizes
    )


def _is_logits(one: Temporary, run: _Run) -> bool:
    vocab = -(-run.model.vocab_size // run.mesh["tensor"])
    return vocab in _dims(one) and math.prod(_dims(one)) == run.at_once * run.chunk * vocab


_Found = Iterator[tuple[int, str, str]]  # (bytes saved, the overrides, why)


def _remat(run: _Run, shares: _Shares) -> _Found:
    config, tensor = run.config, run.mesh["tensor"]
    stream = run.at_once * config.data.seq_len * run.model.hidden_size
    stream *= run.model.num_hidden_layers * _ITEM_SIZES[config.compute_dtype]
    kept = f"what {run.model.num_hidden_layers} layers keep for the backward pass takes "
    kept += f"{shares.kept / _GIB:.1f} GiB"
    if config.remat != "block_sharded" and tensor > 1 and config.data.seq_len % tensor == 0:
        reason = f"{kept}; this keeps each layer's input alone, split over tensor={tensor}"
        yield shares.kept - stream // tensor, "--config.remat=block_sharded", reason
    elif config.remat in ("none", "dots"):
        reason = f"{kept}; this keeps each layer's input alone, and computes the rest again"
        yield shares.kept - stream, "--config.remat=block", reason


def _micro_batches(run: _Run, shares: _Shares) -> _Found:
    parts = _parts_of_one_row(run, run.groups)
    if run.at_once == 1 or parts is None:
        return
    growing = shares.kept + shares.logits + shares.passing
    reason = f"one row at once and group of devices in place of {run.at_once}; what grows with "
    reason += f"them takes {growing / _GIB:.1f} GiB"
    saving = growing - growing // run.at_once
    yield saving, f"--config.micro_batches={parts}", reason


def _parts_of_one_row(run: _Run, groups: int) -> int | None:
    """The fewest micro-batches in which a group takes one row at once; None: not allowed."""
    fixed = run.config.batch_rows
    parts = -(-run.rows // groups)
    if fixed is not None:
        parts = next((count for count in range(parts, fixed + 1) if fixed % count == 0), fixed)
    return parts if parts >= run.config.micro_batches else None


def _wider_tensor(run: _Run, shares: _Shares) -> _Found:
    """The next wider tensor axis, with one row at once in each of the fewer groups."""
    data, fsdp, tensor = (run.mesh[axis] for axis in ("data", "fsdp", "tensor"))
    for wider in tensor_sizes(run.model):
        factor = wider // tensor
        if wider <= tensor or wider % tensor or fsdp % factor:
            continue
        parts = _parts_of_one_row(run, run.groups // factor)
        if parts is None:
            continue
        split = shares.logits + shares.passing
        split += shares.kept if run.config.remat == "block_sharded" else 0
        # Rows that go one by one for the first time.
        saving = split - split // (factor * run.at_once)
        change = f"--config.mesh={data},{fsdp // factor},{wider} --config.micro_batches={parts}"
        reason = f"what a layer computes is split over {wider} devices in place of {tensor}, "
        yield saving, change, f"{reason}a row at once; more is sent between devices"
        return


def _fsdp_for_data(run: _Run, shares: _Shares) -> _Found:
    data, fsdp, tensor = (run.mesh[axis] for axis in ("data", "fsdp", "tensor"))
    if run.model.hidden_size % (data * fsdp * tensor):
        return
    held = run.overflow.arguments + shares.weights
    reason = f"the state is held {data} times over"
    yield held - held // data, f"--config.mesh=1,{data * fsdp},{tensor}", reason


def _loss_chunk(run: _Run, shares: _Shares) -> _Found:
    if run.chunk <= _SMALL_CHUNK:
        return
    reason = f"the logits of {run.chunk} tokens a row take {shares.logits / _GIB:.1f} GiB"
    saving = shares.logits - shares.logits * _SMALL_CHUNK // run.chunk
    yield saving, f"--config.loss_chunk={_SMALL_CHUNK}", reason


def _mu_dtype(run: _Run) -> _Found:
    options = run.config.optimizer
    if options.name == "adafactor" or options.mu_dtype == "bfloat16":
        return
    moments = {"adamw": 8, "lion": 4}[options.name]
    saving = run.overflow.arguments * 2 // (_ITEM_SIZES[run.config.param_dtype] + moments)
    reason = f"the state takes {run.overflow.arguments / _GIB:.1f} GiB; this rounds the mean of "
    yield saving, "--config.optimizer.mu_dtype=bfloat16", f"{reason}gradients, so the run differs"


def _larger_slice(run: _Run, shares: _Shares) -> _Found:
    """The smallest slice on which the step would fit, with the same tensor axis."""
    overflow, count = run.overflow, math.prod(run.mesh.values())
    if run.topology.platform != "tpu":
        return
    split = overflow.arguments + shares.weights
    growing = shares.kept + shares.logits + shares.passing
    for larger in slices(run.topology.generation):
        factor, odd = divmod(larger.device_count, count)
        if (
            odd
            or factor == 1
            or run.model.hidden_size % (factor * run.mesh["fsdp"] * run.mesh["tensor"])
        ):
            continue
        at_once = run.rows_at_once(run.config.micro_batches * factor)
        left = split // factor + growing * at_once // run.at_once
        if left <= overflow.usable:
            mesh = f"{run.mesh['data']},-1,{run.mesh['tensor']}"
            reason = f"the state, gradients and copies of weights take {split / _GIB:.1f} GiB, and "
            reason += f"are split over {factor} times as many devices"
            change = f"--topology={larger.name} --config.mesh={mesh}"
            yield overflow.needed - left, change, reason
            return
