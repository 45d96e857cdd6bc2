"""Attention split over a mesh equals attention on one device."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from easylm.attention import attention
from easylm.errors import InputError
from tests.attention.cases import assert_close, qkv, rows, with_gradients

LAYOUTS = [[(1, 70), (2, 90), (0, 40)], [(1, 200)]] * 4


def _mesh(shape):
    return jax.make_mesh(
        shape,
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=jax.devices()[: np.prod(shape)],
    )


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 2, 4), (2, 2, 2)])
def test_a_mesh_changes_nothing(shape, backend):
    segment_ids, positions = rows(*LAYOUTS)
    inputs = qkv(segment_ids, heads=8, kv_heads=4, head_dim=16)
    attend = functools.partial(
        attention, positions=positions, segment_ids=segment_ids, backend=backend
    )
    sharded = with_gradients(functools.partial(attend, mesh=_mesh(shape)), *inputs)
    assert len(sharded[0].sharding.device_set) == 8
    assert_close(sharded, with_gradients(attend, *inputs), 1e-6)


def test_a_mesh_inside_checkpoint_and_scan():
    segment_ids, positions = rows(*LAYOUTS)
    inputs = qkv(segment_ids, heads=4, kv_heads=2, head_dim=8)

    def layers(q, k, v, mesh):
        def layer(x, _):
            out = attention(
                x, k, v, positions=positions, segment_ids=segment_ids, backend="auto", mesh=mesh
            )
            return x + out, None

        return jax.lax.scan(jax.checkpoint(layer), q, None, length=2)[0]

    sharded = with_gradients(functools.partial(layers, mesh=_mesh((2, 2, 2))), *inputs)
    alone = with_gradients(functools.partial(layers, mesh=None), *inputs)
    assert_close(sharded, alone, 1e-5)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, 1, 1), ["8 rows", "multiple of 3", "data (3)", "fsdp (1)"]),
        ((1, 1, 8), ["4 key/value heads", "tensor (8)"]),
    ],
)
def test_what_does_not_divide_is_refused(shape, words):
    segment_ids, positions = rows(*LAYOUTS)
    q, k, v, _ = qkv(segment_ids, heads=8, kv_heads=4, head_dim=8)
    with pytest.raises(InputError) as raised:
        attention(q, k, v, positions=positions, segment_ids=segment_ids, mesh=_mesh(shape))
    assert all(word in str(raised.value) for word in words), raised.value
