"""The ways to run a config's step on so many devices, and which of them look fast or small."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from easylm.devices import DEVICES, DeviceSpec
from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.sharding import tensor_sizes
from easylm.planning.flops import count_parameters
from easylm.sharding import rows_on
from easylm.trainers.config import RunConfig

# Remat policies, each keeping more than the one before it.
REMAT = ("block_sharded", "block", "dots", "none")
# Times that the forward pass is computed: all of it again, attention and what is cheap, once.
_FORWARD_PASSES = {"block_sharded": 2.0, "block": 2.0, "dots": 1.1, "none": 1.0}
# Bytes of a number.
ITEM_SIZES = {"float32": 4, "bfloat16": 2}
# Times that a layer's residual crosses main memory in a step, and how often as many bytes of what
# is split over tensor do: fits the traffic of compiled steps of LLaMA 2 7B and 70B for v3, with
# tensor from 8 to 64.
_RESIDUAL_PASSES, _SPLIT_PASSES = 46, 500
# Whose ratio of speeds orders candidates for a device of unknown speed.
_TYPICAL = DEVICES["TPU v3"]


class Candidate(NamedTuple):
    """One way to run a step.

    Attributes:
      mesh: sizes of data, fsdp, tensor.
      micro_batches: parts that a step's rows are computed in.
      remat: a name in REMAT.
      seq_len: tokens of a row.
      batch_rows: rows of a step that hold examples.
    """

    mesh: tuple[int, int, int]
    micro_batches: int
    remat: str
    seq_len: int
    batch_rows: int

    @property
    def rows(self) -> int:
        """Rows of a step as they lie on the mesh."""
        data, fsdp, _ = self.mesh
        return rows_on(data * fsdp, self.batch_rows, self.micro_batches)

    @property
    def empty_rows(self) -> int:
        """Rows of padding that make a step's rows divide the mesh and the micro-batches."""
        return self.rows - self.batch_rows

    @property
    def mesh_text(self) -> str:
        """The mesh as a config spells it."""
        return ",".join(map(str, self.mesh))

    def apply(self, config: RunConfig) -> RunConfig:
        """The config of a run that does it this way."""
        return dataclasses.replace(
            config,
            mesh=self.mesh_text,
            micro_batches=self.micro_batches,
            remat=self.remat,
            data=dataclasses.replace(config.data, seq_len=self.seq_len),
        )

    def overrides(self, config: RunConfig) -> list[str]:
        """The options that turn `config` into it; seq_len only where it is another."""
        changed = {"mesh": self.mesh_text, "micro_batches": self.micro_batches, "remat": self.remat}
        if self.seq_len != config.data.seq_len:
            changed["data.seq_len"] = self.seq_len
        return [f"--config.{name}={value}" for name, value in changed.items()]

    def takes_no_less(self, other: "Candidate") -> bool:
        """Whether it surely needs as much memory as `other`, the same or more of everything."""
        same = (self.mesh, self.seq_len) == (other.mesh, other.seq_len)
        more_at_once = self.micro_batches <= other.micro_batches
        return same and more_at_once and REMAT.index(self.remat) >= REMAT.index(other.remat)


def candidates(
    config: RunConfig, model: LlamaConfig, num_devices: int, batch_rows: Mapping[int, int]
) -> list[Candidate]:
    """All meshes that divide model and devices, with micro-batches and remat policies.

    The tensor axis takes each size that divides the model, fsdp the rest of the devices as far as
    it divides the model, and data what is left over. A group of devices computes 1, 2, 4, ... rows
    at a time, up to all of its rows.

    Args:
      config: the run's; its batch_rows, if set, must be a multiple of micro_batches.
      model: sizes of the model.
      num_devices: to make a mesh of.
      batch_rows: for each seq_len to try, the rows of a step that hold examples.
    """
    found = []
    for tensor in tensor_sizes(model):
        if num_devices % tensor:
            continue
        groups = num_devices // tensor
        fsdp = math.gcd(groups, model.hidden_size // tensor)
        mesh = (groups // fsdp, fsdp, tensor)
        # On one shard there is nothing to split a residual over: the same program twice.
        policies = REMAT if tensor > 1 else REMAT[1:]
        for seq_len, rows in batch_rows.items():
            parts = _micro_batches(-(-rows // groups), config.batch_rows)
            found += [
                Candidate(mesh, part, remat, seq_len, rows) for part in parts for remat in policies
            ]
    return found


def _micro_batches(group_rows: int, batch_rows: int | None) -> list[int]:
    """The parts that a group's rows are cut in, most of them first."""
    at_once = [1 << power for power in range(group_rows.bit_length())]
    parts = {1, *(-(-group_rows // rows) for rows in at_once)}
    return sorted((n for n in parts if batch_rows is None or batch_rows % n == 0), reverse=True)


def smallest(group: Sequence[Candidate]) -> Candidate:
    """The one of a mesh and a seq_len that needs the least memory."""
    return max(group, key=lambda one: (one.micro_batches, -REMAT.index(one.remat)))


def least_bytes(config: RunConfig, model: LlamaConfig, mesh: tuple[int, int, int]) -> int:
    """Bytes that every program needs on a device: parameters, their moments, their gradients.

    Adafactor's factored squares are so small that they are left out.
    """
    dtype = config.param_dtype
    moments = {"adamw": [config.optimizer.mu_dtype, "float32"], "lion": [config.optimizer.mu_dtype]}
    arrays = [dtype, dtype, *moments.get(config.optimizer.name, [])]
    parameters = count_parameters(model) / (mesh[1] * mesh[2])
    return int(parameters * sum(ITEM_SIZES[dtype] for dtype in arrays))


class Guess(NamedTuple):
    """What decides which candidate is compiled first, never what is reported; seconds a step."""

    compute: float
    memory: float
    interconnect: float

    @property
    def key(self) -> tuple[float, float]:
        """Sorts candidates, as if nothing were sent while a device computes."""
        return max(self.compute, self.memory) + self.interconnect, sum(self)


def guess(
    one: Candidate, config: RunConfig, model: LlamaConfig, device: DeviceSpec | None
) -> Guess:
    """How long a step may take, by arithmetic alone.

    Compute: 2 FLOPs a parameter and token, empty rows included, forward, backward (twice) and what
    remat computes again. Memory: passes over the activations of a group's rows, counted in
    residuals. Interconnect, by ring algorithms: the kernels of a tensor shard gathered over fsdp
    for the forward and the backward pass of each micro-batch, and their gradients summed, in the
    compute dtype; gradients summed over data once; and, over tensor, the residual of a group's
    rows, twice a layer and pass.

    Args:
      one: the candidate.
      config: gives the dtypes.
      model: sizes of the model.
      device: None: of unknown speed; TPU v3's stands in, good for an order only.
    """
    device = device or _TYPICAL
    data, fsdp, tensor = one.mesh
    tokens = one.rows * one.seq_len
    parameters, width = count_parameters(model), ITEM_SIZES[config.compute_dtype]
    passes = _FORWARD_PASSES[one.remat]
    flops = 2 * parameters * tokens * (passes + 2)
    kernels = parameters * width / tensor
    of_parameters = 3 * one.micro_batches * kernels * (fsdp - 1) / fsdp
    of_copies = 2 * parameters * 4 / (fsdp * tensor) * (data - 1) / data
    residuals = model.num_hidden_layers * tokens / (data * fsdp) * model.hidden_size * width
    of_residuals = 2 * 2 * (passes + 1) * residuals * (tensor - 1) / tensor
    traffic = (_RESIDUAL_PASSES + _SPLIT_PASSES / tensor) * residuals
    return Guess(
        compute=flops / (math.prod(one.mesh) * device.peak_flops),
        memory=traffic / device.memory_bandwidth,
        interconnect=(of_parameters + of_copies + of_residuals) / device.interconnect_bandwidth,
    )
