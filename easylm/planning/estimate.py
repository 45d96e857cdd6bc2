"""A plan: whether a step fits its devices, and how fast it can be at best."""

import dataclasses
import os

import jax
import numpy as np

from easylm.attention import choose_backend
from easylm.devices import DEVICES
from easylm.planning.compiled import Compiled, compile_step
from easylm.planning.flops import Flops, count_parameters, step_flops
from easylm.planning.inputs import Inputs
from easylm.planning.program import StateBytes, build_program, state_bytes
from easylm.planning.roofline import Roofline, roofline
from easylm.planning.topology import Topology
from easylm.trainers.build import Program
from easylm.trainers.config import DpoConfig, RunConfig
from easylm.trainers.overview import flops_of_segments

# Steps whose rows are looked at to know the work of a typical one.
_SAMPLES = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run before it runs.

    Attributes:
      config: the run's.
      topology: its machines.
      device_kind: of the devices, as jax names it.
      inputs: its model and the amounts of its data.
      mesh: sizes of data, fsdp and tensor.
      rows: of a step as they lie on the mesh, the empty ones that fill it included.
      attention: the backend that runs.
      parameters: of the model.
      state: bytes of a device that stay from step to step.
      compiled: what the compiler says.
      was_known: whether it was asked in an earlier call.
      usable: bytes a program may take on a device; None: unknown.
      flops: of a step, all devices together.
      roofline: the least time.
    """

    config: RunConfig
    topology: Topology
    device_kind: str
    inputs: Inputs
    mesh: dict[str, int]
    rows: int
    attention: str
    parameters: int
    state: StateBytes
    compiled: Compiled
    was_known: bool
    usable: int | None
    flops: Flops
    roofline: Roofline

    @property
    def fits(self) -> bool:
        """Whether the step has room on its devices."""
        if self.compiled.overflow is not None or self.refusal:
            return False
        return self.usable is None or self.total_bytes <= self.usable

    @property
    def refusal(self) -> str:
        """Why the compiler could not compile the step; empty where it could."""
        return self.compiled.refusal

    @property
    def total_bytes(self) -> int:
        """That a device needs."""
        return self.compiled.total

    @property
    def num_devices(self) -> int:
        return int(np.prod(list(self.mesh.values())))

    @property
    def step_seconds(self) -> float | None:
        """An estimate: at least."""
        return self.roofline.step_seconds

    @property
    def serial_seconds(self) -> float | None:
        """An estimate: of a step that sends nothing while it computes."""
        return self.roofline.serial_seconds

    @property
    def mfu_bound(self) -> float | None:
        """An estimate: at most."""
        return self.roofline.mfu_bound

    @property
    def tokens(self) -> float:
        """Of a step on average, without padding."""
        return float(self.inputs.stream.seen_lengths.sum() / len(self.inputs.stream))


def make_plan(
    config: RunConfig, inputs: Inputs, topology: Topology, devices: list[jax.Device]
) -> Plan:
    """Builds, lowers and compiles the step of a run, and counts what it costs.

    Args:
      config: the run's.
      inputs: of `read_inputs`.
      topology: its machines, and
      devices: their devices; see `target_devices`.
    Raises:
      InputError: the mesh does not go with the devices or the model.
    """
    program = build_program(config, inputs, devices)
    compiled, was_known = compile_step(program, topology)
    kind = devices[0].device_kind
    seq_len, dtype = config.data.seq_len, config.compute_dtype
    attention = config.attention
    if attention == "auto":
        attention = choose_backend(kind, inputs.model.head_dim, seq_len, dtype)
    flops = typical_flops(config, inputs, program, attention, topology.platform)
    steps = len(inputs.stream)
    return Plan(
        config=config,
        topology=topology,
        device_kind=kind,
        inputs=inputs,
        mesh=dict(program.mesh.shape),
        rows=program.batch["tokens"].shape[0],
        attention=attention,
        parameters=count_parameters(inputs.model),
        state=state_bytes(program),
        compiled=compiled,
        was_known=was_known,
        usable=_usable(devices),
        flops=flops,
        roofline=roofline(
            DEVICES.get(kind),
            num_devices=len(devices),
            flops=flops,
            traffic=compiled.traffic,
            wire=sum(one.wire for one in compiled.collectives),
            tokens=inputs.stream.seen_lengths.sum() / steps,
            steps=steps,
        ),
    )


def typical_flops(
    config: RunConfig, inputs: Inputs, program: Program, attention: str, platform: str
) -> Flops:
    """Of a step: what the model asks for on average, and what the program computes on a few."""
    # The last step of a run may be nearly empty.
    last = max(0, len(inputs.stream) - 2)
    steps = np.unique(np.linspace(0, last, _SAMPLES).astype(int))
    rows, tensor = program.batch["tokens"].shape[0], program.mesh.shape["tensor"]
    groups = program.mesh.size // tensor
    at_once = rows // (groups * config.micro_batches)
    # Rows that a device computes at the same time, one after the other; see `_split_rows` in
    # trainers/step.py.
    order = np.arange(rows).reshape(groups, at_once, config.micro_batches).swapaxes(1, 2).ravel()
    taken = []
    for step in steps:
        filled = inputs.segments_of(int(step))
        filled += [[]] * (rows - len(filled))
        taken += [filled[row] for row in order]
    counted = step_flops(
        config,
        inputs.model,
        taken,
        objective="dpo" if isinstance(config, DpoConfig) else "sft",
        attention=attention,
        platform=platform,
        tensor=tensor,
        rows_at_once=at_once,
    )
    asked = flops_of_segments(inputs.model, inputs.stream.seen_lengths)
    return Flops(asked / len(inputs.stream), counted.hardware / len(steps))


def _usable(devices: list[jax.Device]) -> int | None:
    """Bytes of memory that a program may take on one of these devices."""
    spec = DEVICES.get(devices[0].device_kind)
    if spec is not None:
        return spec.usable
    if devices[0].platform == "cpu":  # virtual devices share the machine's
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    return devices[0].memory_stats()["bytes_limit"]
