"""Names of machines give the devices that libtpu makes of them."""

import subprocess
import sys

import jax
import pytest

from easylm.devices import DEVICES
from easylm.errors import InputError
from easylm.planning.target import target_devices
from easylm.planning.topology import parse_topology, slices

GENERATIONS = ("v2", "v3", "v4", "v5e", "v5p", "v6e")
QUIET = """
import sys
from easylm.planning.target import prepare_environment, target_devices
from easylm.planning.topology import parse_topology
topology = parse_topology(sys.argv[1])
prepare_environment(topology)
assert "jax" not in sys.modules
devices = target_devices(topology)
import jax, numpy as np
mesh = jax.sharding.Mesh(np.array(devices), ("x",))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
x = jax.ShapeDtypeStruct((64, 64), "float32", sharding=sharding)
jax.jit(lambda x: x.sum()).lower(x).compile()
print(len(devices), devices[0].device_kind)
"""


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_slice_has_the_devices_that_its_name_says(generation):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    for topology in slices(generation):
        devices = target_devices(topology)
        assert len(devices) == topology.device_count, topology
        assert {device.device_kind for device in devices} == {topology.device_kind}
        assert parse_topology(topology.name) == topology
        assert topology.device_kind in DEVICES
    counts = [topology.device_count for topology in slices(generation)]
    assert counts == sorted(set(counts))


@pytest.mark.parametrize(
    "name, shape, device_count",
    [
        # In cores, each a device.
        ("v2-8", "v2:2x2", 8),
        ("v3-256", "v3:8x16", 256),
        ("v3-2048", "v3:32x32", 2048),
        # In cores, two of which are a device.
        ("v4-8", "v4:2x2x1", 4),
        ("v4-4096", "v4:8x16x16", 2048),
        ("v5p-64", "v5p:2x4x4", 32),
        # In chips, each a device.
        ("v5litepod-16", "v5e:4x4", 16),
        ("v5e-16", "v5e:4x4", 16),
        ("v6e-64", "v6e:8x8", 64),
        # Explicit, in chips.
        ("v3:8x16", "v3:8x16", 256),
        ("v4:2x2x4", "v4:2x2x4", 16),
    ],
)
def test_names_of_slices(name, shape, device_count):
    topology = parse_topology(name)
    assert (topology.name, topology.shape) == (name, shape)
    assert (topology.platform, topology.device_count) == ("tpu", device_count)
    assert topology.generation == shape.split(":")[0]


@pytest.mark.parametrize(
    "name",
    ["", "v3-100", "v3-0", "v7-8", "v7:2x2", "tpu", "cpus"],
)
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(InputError) as error:
        parse_topology(name)
    message = str(error.value)
    assert f"found {name!r}" in message
    for known in ("v2-512", "v3-2048", "v4-4096", "v5litepod-256", "v5p-12288", "v6e-256"):
        assert known in message
    assert "v3:8x16" in message and "cpu:8" in message and "gpu" in message


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("v3", "wanted a slice of it, one of v3-8, v3-32, "),
        ("v5e", "; or --smallest, which finds the smallest"),
        ("v3:2x2x2", "wanted 2 sizes in chips, such as v3:2x2"),
        ("v3:0x2", "wanted 2 sizes in chips, such as v3:2x2"),
        ("v3:", "wanted 2 sizes in chips, such as v3:2x2"),
        ("v4:2x2", "wanted 3 sizes in chips, such as v4:2x2x1"),
        ("cpu", "wanted a number of devices, such as cpu:8"),
        ("cpu:0", "wanted a number of devices, such as cpu:8"),
    ],
)
def test_a_name_that_is_nearly_right_says_what_is_wanted(name, wanted):
    with pytest.raises(InputError) as error:
        parse_topology(name)
    assert f"found {name!r}" in str(error.value) and wanted in str(error.value)
    assert "\n" not in str(error.value)


def test_a_shape_that_libtpu_refuses_is_named():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    with pytest.raises(InputError, match=r"--topology=v5e:3x3: libtpu says: .*not divisible"):
        target_devices(parse_topology("v5e:3x3"))


def test_without_libtpu_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[tpu\]'.*pip install libtpu"):
        target_devices(parse_topology("v3-8"))


def test_devices_of_this_machine():
    topology = parse_topology("cpu:4")
    assert target_devices(topology) == jax.devices("cpu")[:4]
    assert (topology.platform, topology.device_kind) == ("cpu", jax.devices("cpu")[0].device_kind)
    with pytest.raises(InputError, match="--topology=cpu:99: found 8 devices; wanted 99"):
        target_devices(parse_topology("cpu:99"))
    with pytest.raises(InputError, match="--topology=gpu: jax finds none here"):
        target_devices(parse_topology("gpu"))


@pytest.mark.parametrize(
    "name, printed", [("v3-8", "8 TPU v3"), ("v5e-4", "4 TPU v5 lite"), ("cpu:2", "2 cpu")]
)
def test_a_fresh_process_compiles_without_a_word_of_warning(name, printed, monkeypatch, tmp_path):
    if name.startswith("v"):
        pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    for variable in ("XLA_FLAGS", "JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(variable, raising=False)
    # The second time, jax finds what the first has kept.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    command = [sys.executable, "-c", QUIET, name]
    for _ in range(2):
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.strip() == printed


def test_without_a_gpu_nothing_else_is_touched_and_the_message_is_all_that_is_said(monkeypatch):
    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("this machine has a GPU")
    for variable in ("XLA_FLAGS", "JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(variable, raising=False)
    program = [
        "import sys",
        "from easylm.planning.target import prepare_environment, target_devices",
        "from easylm.planning.topology import parse_topology",
        "topology = parse_topology('gpu')",
        "prepare_environment(topology)",
        "try: target_devices(topology)",
        "except ValueError as error: print(error)",
        "print('libtpu' in sys.modules, 'libtpu.so' in open('/proc/self/maps').read())",
    ]
    command = [sys.executable, "-c", "\n".join(program)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    message, touched = result.stdout.splitlines()
    assert message.startswith("--topology=gpu: jax finds none here") and touched == "False False"
