"""What to change in a config whose step does not fit its devices."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

from easylm.devices import GIB
from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.sharding import tensor_sizes
from easylm.planning.candidates import ITEM_SIZES, least_bytes
from easylm.planning.overflow import Overflow, Temporary
from easylm.planning.topology import Topology, slices
from easylm.trainers.config import RunConfig

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

    @property
    def growing(self) -> int:
        """All that grows with the rows computed at once."""
        return self.kept + self.logits + self.passing


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
        return -(-self.rows // (self.groups * self.config.micro_batches))

    @property
    def chunk(self) -> int:
        """Tokens of a row whose logits exist at the same time."""
        return min(self.config.loss_chunk, self.config.data.seq_len)

    @property
    def rounded(self) -> RunConfig:
        """The config with the mean of gradients in bfloat16."""
        optimizer = dataclasses.replace(self.config.optimizer, mu_dtype="bfloat16")
        return dataclasses.replace(self.config, optimizer=optimizer)

    @property
    def is_too_large_at_rest(self) -> bool:
        """Whether parameters, optimizer and gradients alone exceed the memory of a device."""
        return self.at_rest(self.config) > self.overflow.usable

    def at_rest(self, config: RunConfig) -> int:
        """Bytes of parameters, optimizer and gradients."""
        mesh = (self.mesh["data"], self.mesh["fsdp"], self.mesh["tensor"])
        return least_bytes(config, self.model, mesh)


def advice(
    config: RunConfig,
    model: LlamaConfig,
    mesh: Mapping[str, int],
    overflow: Overflow,
    *,
    rows: int,
    topology: Topology,
) -> list[str]:
    """What to change, with what it is worth.

    First come changes that leave the result of training alone, what saves the most first; then
    rounded moments; a larger slice last. Where parameters, optimizer and gradients alone are too
    large, a line says so, and only what makes them smaller on a device follows. The savings are
    estimates from the sizes of what is alive at the peak. Where they make another moment of the
    step the peak, less is saved, so plan again. Each change is one that this config and model
    allow.

    Args:
      config: the run's.
      model: sizes of the model.
      mesh: sizes of data, fsdp and tensor.
      overflow: what the compiler says of the step.
      rows: of a step, without the empty ones that fill the mesh.
      topology: its machines.
    Returns:
      lines such as "--config.remat=block: up to 9.4 GiB less, 11.2 at best: ...".
    """
    run = _Run(config, model, mesh, rows, topology, overflow)
    shares = _shares(run)
    ways = [*_fsdp_for_data(run, shares)]
    if not run.is_too_large_at_rest:
        ways += [
            *_remat(run, shares),
            *_micro_batches(run, shares),
            *_wider_tensor(run, shares),
            *_loss_chunk(run, shares),
        ]
    found = [*sorted(ways, reverse=True), *_mu_dtype(run), *_larger_slice(run, shares)]
    lines = [
        f"{change}: up to {saving / GIB:.1f} GiB less, {(overflow.needed - saving) / GIB:.1f} at "
        f"best: {reason}"
        for saving, change, reason in found
        if saving > _LEAST * overflow.needed
    ]
    return [_at_rest(run), *lines] if run.is_too_large_at_rest else lines


def _at_rest(run: _Run) -> str:
    return (
        f"parameters, optimizer and gradients alone take {run.at_rest(run.config) / GIB:.1f} GiB "
        f"of the {run.overflow.usable / GIB:.1f} that a device has: only what makes them smaller "
        "can help"
    )


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
    stream *= run.model.num_hidden_layers * ITEM_SIZES[config.compute_dtype]
    kept = f"what {run.model.num_hidden_layers} layers keep for the backward pass takes "
    kept += f"{shares.kept / GIB:.1f} GiB"
    if config.remat != "block_sharded" and tensor > 1 and config.data.seq_len % tensor == 0:
        reason = f"{kept}; this keeps each layer's input alone, split over tensor={tensor}"
        yield shares.kept - stream // tensor, "--config.remat=block_sharded", reason
    elif config.remat in ("none", "dots"):
        reason = f"{kept}; this keeps each layer's input alone, and computes the rest again"
        yield shares.kept - stream, "--config.remat=block", reason


def _micro_batches(run: _Run, shares: _Shares) -> _Found:
    if run.at_once == 1:
        return
    reason = f"one row at once and group of devices in place of {run.at_once}; what grows with "
    reason += f"them takes {shares.growing / GIB:.1f} GiB"
    saving = shares.growing - shares.growing // run.at_once
    yield saving, f"--config.micro_batches={_parts(run, run.groups)}", reason


def _parts(run: _Run, groups: int, at_once: int = 1) -> int | None:
    """The micro-batches of at most `at_once` rows a group that leave the fewest rows empty."""
    fixed, most = run.config.batch_rows, -(-run.rows // groups)
    counts = [most] if fixed is None else [n for n in range(1, fixed + 1) if fixed % n == 0]
    rows = {count: -(-run.rows // (groups * count)) for count in counts}
    allowed = [(rows[count] * count, -count) for count in counts if rows[count] <= at_once]
    return -min(allowed)[1] if allowed else None


def _wider_tensor(run: _Run, shares: _Shares) -> _Found:
    """The narrowest tensor axis that is enough, else the widest; one row at once in each group."""
    data, fsdp, tensor = (run.mesh[axis] for axis in ("data", "fsdp", "tensor"))
    whole = 0 if run.config.remat == "block_sharded" else shares.kept
    excess = run.overflow.needed - run.overflow.usable
    found = []
    for wider in tensor_sizes(run.model):
        factor = wider // tensor
        if wider < tensor or wider % tensor or fsdp % factor:
            continue
        left = (whole + (shares.growing - whole) // factor) // run.at_once
        saving = shares.growing - left
        parts = _parts(run, run.groups // factor)
        change = f"--config.mesh={data},{fsdp // factor},{wider} --config.micro_batches={parts}"
        reason = f"what a layer computes is split over {wider} devices in place of {tensor}, a row "
        found.append((saving, change, f"{reason}at once; more is sent between devices"))
        if saving >= excess:
            break
    # The first is as wide as now: fewer rows at once do without the others.
    least = found[0][0] + _LEAST * run.overflow.needed
    yield from (one for one in found[-1:] if one[0] > least)


def _fsdp_for_data(run: _Run, shares: _Shares) -> _Found:
    data, fsdp, tensor = (run.mesh[axis] for axis in ("data", "fsdp", "tensor"))
    if data == 1 or run.model.hidden_size % (data * fsdp * tensor):
        return
    if run.at_rest(run.rounded) > data * run.overflow.usable:
        return
    held = run.overflow.arguments + shares.weights
    reason = f"the state is held {data} times over"
    yield held - held // data, f"--config.mesh=1,{data * fsdp},{tensor}", reason


def _loss_chunk(run: _Run, shares: _Shares) -> _Found:
    if run.chunk <= _SMALL_CHUNK:
        return
    reason = f"the logits of {run.chunk} tokens a row take {shares.logits / GIB:.1f} GiB"
    saving = shares.logits - shares.logits * _SMALL_CHUNK // run.chunk
    yield saving, f"--config.loss_chunk={_SMALL_CHUNK}", reason


def _mu_dtype(run: _Run) -> _Found:
    rounded = run.at_rest(run.rounded)
    if run.is_too_large_at_rest and rounded > run.overflow.usable:
        return
    reason = f"the state takes {run.overflow.arguments / GIB:.1f} GiB; this rounds the mean of "
    reason += "gradients, so the run differs"
    saving = run.at_rest(run.config) - rounded
    yield saving, "--config.optimizer.mu_dtype=bfloat16", reason


def _larger_slice(run: _Run, shares: _Shares) -> _Found:
    """The smallest slice on which the step would fit, with the same tensor axis.

    Where none is large enough for the step as it is, but the state is what is too large here, the
    smallest that holds the state.
    """
    tensor, count = run.mesh["tensor"], math.prod(run.mesh.values())
    if run.topology.platform != "tpu":
        return
    split = max(run.overflow.arguments + shares.weights, run.at_rest(run.config))
    reason = f"the state, gradients and copies of weights take {split / GIB:.1f} GiB, and are "
    for growing in (shares.growing, 0) if run.is_too_large_at_rest else (shares.growing,):
        for larger in slices(run.topology.generation):
            groups, odd = divmod(larger.device_count, tensor)
            if odd or larger.device_count <= count:
                continue
            fsdp = math.gcd(groups, run.model.hidden_size // tensor)
            held = split * run.mesh["fsdp"] // fsdp
            row = max(1, growing // run.at_once)
            parts = _parts(run, groups, (run.overflow.usable - held) // row)
            if parts is None:
                continue
            left = held + row * -(-run.rows // (groups * parts))
            change = f"--topology={larger.name} --config.mesh={groups // fsdp},-1,{tensor} "
            change += f"--config.micro_batches={parts}"
            reason += f"split over {fsdp * tensor} devices in place of {run.mesh['fsdp'] * tensor}"
            yield run.overflow.needed - left, change, reason
            return
