"""The table of devices: sizes and speeds of one jax device."""

import jax
import numpy as np
import pytest

from easylm.devices import DEVICES, GIB, peak_flops
from easylm.planning.overflow import is_overflow, read_overflow
from easylm.planning.target import target_devices
from easylm.planning.topology import parse_topology

ONE_CHIP = ("v2:1x1", "v3:1x1", "v4:2x2x1", "v5e:1x1", "v5p:2x2x1", "v6e:1x1")


def test_peak_is_per_jax_device_and_unknown_for_cpus():
    # 256 chips of 123 TFLOP/s.
    assert peak_flops("TPU v3", 512) == pytest.approx(256 * 123e12)
    assert peak_flops("NVIDIA H200", 8) == pytest.approx(8 * 989e12)
    assert peak_flops(jax.devices()[0].device_kind, 8) is None


def test_a_v3_pod_has_the_interconnect_that_its_page_states():
    # cloud.google.com/tpu/docs/v3: all-reduce bandwidth per pod of 1,024 chips 340 TB/s.
    assert 2048 * DEVICES["TPU v3"].interconnect_bandwidth == pytest.approx(340e12, rel=0.02)


@pytest.mark.parametrize("shape", ONE_CHIP)
def test_usable_memory_is_what_the_compiler_names_when_it_runs_out(shape):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    device = target_devices(parse_topology(shape))[0]
    spec = DEVICES[device.device_kind]
    mesh = jax.sharding.Mesh(np.array([device]), ("x",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    floats = jax.ShapeDtypeStruct((spec.memory,), "uint8", sharding=everywhere)
    lowered = jax.jit(lambda x, y: x + y).lower(floats, floats)
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        lowered.compile()
    assert is_overflow(error.value)
    # The compiler rounds to 0.01 GiB, and libtpu 0.0.42 gives out 0.01 more of a v5p than 0.0.51.
    assert read_overflow(lowered).usable == pytest.approx(spec.usable, abs=0.015 * GIB)
    assert spec.usable < spec.memory
