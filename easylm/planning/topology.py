"""Names of machines: slices of TPU pods as the cloud calls them, virtual CPU devices, GPUs."""

import dataclasses
import math
import re

from easylm.errors import InputError


@dataclasses.dataclass(frozen=True)
class Topology:
    """The devices of one machine, or of all machines of a slice.

    Attributes:
      name: as it was asked for: v3-256, v3:8x16, cpu:8 or gpu.
      platform: tpu, cpu or gpu.
      generation: of TPU: v2, v3, v4, v5e, v5p or v6e; empty elsewhere.
      shape: of the slice in chips, as libtpu calls it, such as v3:8x16; empty elsewhere.
      device_kind: jax.Device.device_kind of its devices; empty where only jax knows.
      device_count: jax devices; None for gpu: as many as the machine has.
    """

    name: str
    platform: str
    generation: str = ""
    shape: str = ""
    device_kind: str = ""
    device_count: int | None = None


@dataclasses.dataclass(frozen=True)
class _Generation:
    """A generation of TPU.

    Attributes:
      cloud_name: what stands before the number in the name of a slice.
      device_kind: of jax.
      counted_per_chip: what the number counts for each chip: its cores (2), or the chip (1).
      devices_per_chip: a core is a device of its own on v2 and v3 alone.
      slices: the shapes that the cloud offers, in chips, smallest first.
    """

    cloud_name: str
    device_kind: str
    counted_per_chip: int
    devices_per_chip: int
    slices: tuple[str, ...]


_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
_CUBES += ("8x16x16",)
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_V3 = ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32")

# cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e}, "Configurations". Of one number of v4 or v5p
# the cloud offers several shapes; here is the one it takes by default. A v3-64 is no longer on
# the page, but was sold.
_GENERATIONS = {
    "v2": _Generation("v2", "TPU v2", 2, 2, ("2x2", "4x4", "8x8", "8x16", "16x16")),
    "v3": _Generation("v3", "TPU v3", 2, 2, _V3),
    "v4": _Generation("v4", "TPU v4", 2, 1, _CUBES),
    "v5e": _Generation("v5litepod", "TPU v5 lite", 1, 1, _SQUARES),
    "v5p": _Generation("v5p", "TPU v5", 2, 1, (*_CUBES, "16x16x16", "16x16x24")),
    "v6e": _Generation("v6e", "TPU v6 lite", 1, 1, _SQUARES),
}


def slices(generation: str) -> list[Topology]:
    """The slices of a generation of TPU that the cloud offers, smallest first.

    Args:
      generation: v2, v3, v4, v5e, v5p or v6e.
    """
    known = _GENERATIONS[generation]
    return [
        _slice(f"{known.cloud_name}-{_chips(sizes) * known.counted_per_chip}", generation, sizes)
        for sizes in known.slices
    ]


def parse_generation(text: str) -> list[Topology]:
    """The slices of a generation, or of that of a slice: v3, or v3-256; smallest first.

    Raises:
      InputError: there is no such generation of TPU.
    """
    generation = text if text in _GENERATIONS else parse_topology(text).generation
    if not generation:
        raise InputError(
            f"--topology: found {text!r}; wanted a generation of TPU, one of "
            f"{', '.join(_GENERATIONS)}, or a slice of one"
        )
    return slices(generation)


def parse_topology(text: str) -> Topology:
    """The machine of a name: v3-256, v5litepod-16 or v5e-16, v3:8x16 (in chips), cpu:8 or gpu.

    Raises:
      InputError: there is no such machine; the message says what is wanted, or lists those that
        are known.
    """
    if text in _GENERATIONS:
        names = ", ".join(topology.name for topology in slices(text))
        raise InputError(
            f"--topology: found {text!r}, a generation of TPU; wanted a slice of it, one of "
            f"{names}; or --smallest, which finds the smallest that the run fits"
        )
    if text == "gpu":
        return Topology(text, "gpu")
    if virtual := re.fullmatch(r"cpu:([1-9]\d*)", text):
        return Topology(text, "cpu", device_kind="cpu", device_count=int(virtual[1]))
    if text.partition(":")[0] == "cpu":
        raise InputError(f"--topology: found {text!r}; wanted a number of devices, such as cpu:8")
    generation, colon, sizes = text.partition(":")
    if colon and generation in _GENERATIONS:
        example = _GENERATIONS[generation].slices[0]
        if not re.fullmatch("x".join([r"[1-9]\d*"] * len(example.split("x"))), sizes):
            raise InputError(
                f"--topology: found {text!r}; wanted {len(example.split('x'))} sizes in chips, "
                f"such as {generation}:{example}"
            )
        return _slice(text, generation, sizes)
    cloud_name = re.sub(r"^v5e-", "v5litepod-", text)
    for generation in _GENERATIONS:
        for topology in slices(generation):
            if topology.name == cloud_name:
                return dataclasses.replace(topology, name=text)
    raise InputError(f"--topology: found {text!r}; wanted one of\n{_known_names()}")


def _slice(name: str, generation: str, sizes: str) -> Topology:
    known = _GENERATIONS[generation]
    return Topology(
        name,
        "tpu",
        generation=generation,
        shape=f"{generation}:{sizes}",
        device_kind=known.device_kind,
        device_count=_chips(sizes) * known.devices_per_chip,
    )


def _chips(sizes: str) -> int:
    return math.prod(map(int, sizes.split("x")))


def _known_names() -> str:
    lines = [", ".join(topology.name for topology in slices(name)) for name in _GENERATIONS]
    lines.append("v5e-N (a v5litepod-N), chips such as v3:8x16 or v4:2x2x1, cpu:8, gpu")
    return "\n".join(lines)
