"""The rows of a batch on real hosts: each has its own, no others, and together they have all."""

import numpy as np
import pytest

from easylm.config import parse_mesh
from tests.hosts import ends, start_hosts
from tests.rows_of_hosts import MESHES, stream_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 4], ids="{} hosts".format)
def found(request, tmp_path_factory):
    """What each host found."""
    folder, hosts = tmp_path_factory.mktemp("rows"), request.param
    printed = ends(
        start_hosts([str(folder)], hosts, devices=8 // hosts, module="tests.rows_of_hosts")
    )
    assert [code for code, _ in printed] == [0] * hosts, printed
    return [np.load(folder / f"{host}.npz") for host in range(hosts)]


def groups_of(shape: str, hosts: int) -> list[set[int]]:
    """The groups of devices with different rows that each host is in."""
    devices = np.arange(8).reshape(hosts, -1)
    mesh = devices.T.reshape(1, 8, 1) if shape == "torus" else devices.reshape(parse_mesh(shape))
    owners = (mesh // (8 // hosts)).reshape(-1, mesh.shape[2])
    return [{group for group, of_it in enumerate(owners) if host in of_it} for host in range(hosts)]


@pytest.mark.parametrize("shape", [*MESHES, "torus"])
def test_each_host_gets_its_rows_and_builds_no_others(found, shape):
    groups = groups_of(shape, len(found))
    number = len(set.union(*groups))
    is_shared = number < len(found)  # a row of a batch lies on devices of several hosts
    assert sum(map(len, groups)) == (len(found) if is_shared else number)
    stream = stream_for(number)
    size = stream.rows_per_batch // number
    for step in range(len(stream)):
        for name, whole in stream[step].items():
            held = []
            for host, arrays in enumerate(found):
                values, rows = (arrays[f"{shape} {step} {name}{part}"] for part in ("", " rows"))
                np.testing.assert_array_equal(values, whole[rows])
                assert {row // size for row in rows} == groups[host]
                held += sorted(set(rows))
            assert set(held) == set(range(stream.rows_per_batch))
            assert is_shared or len(held) == stream.rows_per_batch
    built = [int(arrays[f"{shape} laid out"]) for arrays in found]
    assert built == [len(stream) * len(own) * size for own in groups]
