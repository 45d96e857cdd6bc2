"""The devices of a machine that may not be there, for programs to be compiled for."""

import importlib.util
import os

from easylm.errors import InputError
from easylm.planning.topology import Topology


def prepare_environment(topology: Topology) -> None:
    """Sets what jax and libtpu read as they load; to be called before jax is imported.

    A TPU of this machine is left alone: others may be training on it.
    """
    # jax would read back what an earlier call compiled, and then nothing is dumped; or fail to, for
    # devices that are absent.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if topology.platform == "gpu":
        # Without a word on platforms, jax would start the machine's TPU as well.
        os.environ["JAX_PLATFORMS"] = "cuda,cpu"
        # Compiling needs no memory of the GPU, which may be in use.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if topology.platform == "cpu":
        if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            os.environ["JAX_NUM_CPU_DEVICES"] = str(topology.device_count)
        return
    # libtpu asks the cloud where it runs, and takes a lock on the machine's TPU, unless told not
    # to. Where it runs is here; the slice that is compiled for is named to it apart from that.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{topology.generation}-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def target_devices(topology: Topology) -> list:
    """The jax devices of `topology`, in jax's order.

    Those of a TPU slice are there to compile for only: nothing can be put on them.

    Raises:
      InputError: libtpu is not installed or knows no slice of this shape, or the machine lacks
        the CPU or GPU devices.
    """
    if topology.platform == "tpu":
        return _slice_devices(topology)
    import jax  # reads the environment that prepare_environment sets

    try:
        devices = jax.devices(topology.platform)
    except RuntimeError as error:
        raise InputError(f"--topology={topology.name}: jax finds none here: {error}") from None
    count = topology.device_count or len(devices)
    if len(devices) < count:
        raise InputError(
            f"--topology={topology.name}: found {len(devices)} devices; wanted {count} (does "
            "XLA_FLAGS set another number of host devices?)"
        )
    return devices[:count]


def _slice_devices(topology: Topology) -> list:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology={topology.name}: the TPU compiler is not installed; run "
            "pip install -e '.[tpu]' in the checkout of easylm, or pip install libtpu"
        )
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    # By default a chip of v4 would be two devices, as its cores are where megacore is off.
    config = {"chip_config_name": "megacore"} if topology.generation == "v4" else {}
    if topology.shape.endswith(":1x1"):  # older ones would look for a whole host's four chips
        config["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(topology.shape, platform="tpu", **config)
    except JaxRuntimeError as error:
        raise InputError(f"--topology={topology.name}: libtpu says: {error}") from None
    return found.devices
