"""The devices that a run may meet: how much they hold and how fast they are, from their makers."""

import dataclasses

GIB = 2**30
MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """One jax device. A chip of TPU v2 or v3 is two devices, which share its links.

    Attributes:
      memory: bytes of main memory (HBM).
      usable: bytes of it that a program may take, its code included. On TPU the compiler names
        them when a program runs out, and what it keeps for the system (libtpu 0.0.51). On GPU it
        is all of it: how much the driver keeps is not published.
      peak_flops: dense bfloat16 FLOP/s.
      memory_bandwidth: bytes/s of main memory.
      interconnect_bandwidth: bytes/s that leave a device, over all its links together.
    """

    memory: int
    usable: int
    peak_flops: float
    memory_bandwidth: float
    interconnect_bandwidth: float


# Sources. v2, v3: Jouppi et al. 2020, "A domain-specific supercomputer for training deep neural
# networks", Communications of the ACM 63(7), whose four links of 496 and 656 Gbit/s a direction
# belong to a chip; cloud.google.com/tpu/docs/v3 gives the same 340 TB/s for 1,024 chips.
# v4: cloud.google.com/tpu/docs/v4; Jouppi et al. 2023, arXiv:2304.01433 (six links of 50 GB/s).
# v5e, v5p, v6e: cloud.google.com/tpu/docs/{v5e,v5p,v6e}; of their bidirectional 400, 1,200 and
# 800 GB/s a chip, half leaves it. Of v5p the page says
# 95 GiB, but a program is given 95.7.
TPU_V2 = DeviceSpec(
    memory=8 * GIB,
    usable=8 * GIB - 530 * MIB,
    peak_flops=45e12 / 2,
    memory_bandwidth=700e9 / 2,
    interconnect_bandwidth=4 * 496e9 / 8 / 2,
)
TPU_V3 = DeviceSpec(
    memory=16 * GIB,
    usable=16 * GIB - 530 * MIB,
    peak_flops=123e12 / 2,
    memory_bandwidth=900e9 / 2,
    interconnect_bandwidth=4 * 656e9 / 8 / 2,
)
TPU_V4 = DeviceSpec(
    memory=32 * GIB,
    usable=32 * GIB - 1283 * MIB,
    peak_flops=275e12,
    memory_bandwidth=1200e9,
    interconnect_bandwidth=6 * 50e9,
)
TPU_V5E = DeviceSpec(
    memory=16 * GIB,
    usable=16 * GIB - 258 * MIB,
    peak_flops=197e12,
    memory_bandwidth=819e9,
    interconnect_bandwidth=400e9 / 2,
)
TPU_V5P = DeviceSpec(
    memory=96 * GIB,
    usable=96 * GIB - 279 * MIB,
    peak_flops=459e12,
    memory_bandwidth=2765e9,
    interconnect_bandwidth=1200e9 / 2,
)
TPU_V6E = DeviceSpec(
    memory=32 * GIB,
    usable=32 * GIB - 776 * MIB,
    peak_flops=918e12,
    memory_bandwidth=1640e9,
    interconnect_bandwidth=800e9 / 2,
)


def _gpu(gigabytes: int, peak_flops: float, memory_bandwidth: float, nvlink: float) -> DeviceSpec:
    """A GPU by its data sheet, whose NVLink bandwidth counts both directions."""
    memory = gigabytes * 10**9
    return DeviceSpec(
        memory=memory,
        usable=memory,
        peak_flops=peak_flops,
        memory_bandwidth=memory_bandwidth,
        interconnect_bandwidth=nvlink / 2,
    )


# By jax.Device.device_kind. GPUs: NVIDIA's A100, H100 and H200 data sheets, FLOP/s without
# sparsity.
DEVICES = {
    "TPU v2": TPU_V2,
    "TPU v3": TPU_V3,
    "TPU v4": TPU_V4,
    "TPU v5 lite": TPU_V5E,
    "TPU v5e": TPU_V5E,
    "TPU v5": TPU_V5P,
    "TPU v5p": TPU_V5P,
    "TPU v6 lite": TPU_V6E,
    "TPU v6e": TPU_V6E,
    "NVIDIA A100-SXM4-40GB": _gpu(40, 312e12, 1555e9, 600e9),
    "NVIDIA A100-SXM4-80GB": _gpu(80, 312e12, 2039e9, 600e9),
    "NVIDIA A100-PCIE-40GB": _gpu(40, 312e12, 1555e9, 600e9),
    "NVIDIA A100 80GB PCIe": _gpu(80, 312e12, 1935e9, 600e9),
    "NVIDIA H100 80GB HBM3": _gpu(80, 989e12, 3350e9, 900e9),
    "NVIDIA H100 PCIe": _gpu(80, 756e12, 2000e9, 600e9),
    "NVIDIA H200": _gpu(141, 989e12, 4800e9, 900e9),
}


def peak_flops(device_kind: str, num_devices: int) -> float | None:
    """FLOP/s that the devices could do at best in bfloat16; None for an unknown kind."""
    spec = DEVICES.get(device_kind)
    return None if spec is None else spec.peak_flops * num_devices
