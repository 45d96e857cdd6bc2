"""How fast a step can be at best, by what it computes, reads and sends. An estimate."""

from typing import NamedTuple

from easylm.devices import DeviceSpec
from easylm.planning.flops import Flops


class Roofline(NamedTuple):
    """An estimate: no step is faster, and real ones are slower.

    Compute, memory and interconnect each get their peak and overlap perfectly, so the largest of
    the three is the time of a step (Williams et al. 2009, "Roofline"). How well they do overlap is
    not known; `serial_seconds` is what a step takes if nothing is sent while a device computes,
    which is near the truth on older TPUs. None where a device's peaks are unknown, as on a CPU.

    Attributes:
      compute_seconds: of a step, for all that the program multiplies.
      memory_seconds: of a step, for what a device reads and writes of its main memory.
      interconnect_seconds: of a step, for what a device sends to others.
      bound: which of the three is the largest: "compute", "memory" or "interconnect".
      step_seconds: the largest.
      serial_seconds: the larger of compute and memory, and after it the interconnect.
      mfu_bound: model FLOPs over what all devices could do in step_seconds; MFU is at most this.
      tokens_per_second: at most; without padding.
      hours: of the run, at least.
      device_hours: hours times devices.
    """

    compute_seconds: float | None
    memory_seconds: float | None
    interconnect_seconds: float | None
    bound: str | None
    step_seconds: float | None
    serial_seconds: float | None
    mfu_bound: float | None
    tokens_per_second: float | None
    hours: float | None
    device_hours: float | None


def roofline(
    device: DeviceSpec | None,
    *,
    num_devices: int,
    flops: Flops,
    traffic: int,
    wire: int,
    tokens: float,
    steps: int,
) -> Roofline:
    """The least time of a run.

    Args:
      device: what one can do; None: unknown.
      num_devices: of the mesh.
      flops: of a step, of all devices together.
      traffic: bytes of main memory that a device reads and writes in a step.
      wire: bytes that leave a device in a step.
      tokens: of a step, without padding.
      steps: of the run.
    """
    if device is None:
        return Roofline(*[None] * len(Roofline._fields))
    peak = device.peak_flops * num_devices
    seconds = {
        "compute": flops.hardware / peak,
        "memory": traffic / device.memory_bandwidth,
        "interconnect": wire / device.interconnect_bandwidth,
    }
    bound = max(seconds, key=seconds.__getitem__)
    step_seconds = seconds[bound]
    hours = step_seconds * steps / 3600
    return Roofline(
        *seconds.values(),
        bound=bound,
        step_seconds=step_seconds,
        serial_seconds=max(seconds["compute"], seconds["memory"]) + seconds["interconnect"],
        mfu_bound=flops.model / (step_seconds * peak),
        tokens_per_second=tokens / step_seconds,
        hours=hours,
        device_hours=hours * num_devices,
    )
