"""Which backend `auto` takes, and how a request that cannot be met is refused."""

import jax.numpy as jnp
import pytest

from easylm.attention import attention, choose_backend
from easylm.attention.choice import obstacle
from easylm.errors import InputError
from tests.attention.cases import qkv, rows


@pytest.mark.parametrize(
    ("device_kind", "head_dim", "seq", "dtype", "backend"),
    [
        ("TPU v2", 128, 8192, "bfloat16", "blockwise"),
        ("TPU v3", 128, 8192, "bfloat16", "blockwise"),
        ("TPU v4", 128, 8192, "bfloat16", "splash"),
        ("TPU v4", 64, 2048, "bfloat16", "splash"),
        ("TPU v5 lite", 128, 4096, "bfloat16", "splash"),
        ("TPU v5", 128, 4096, "bfloat16", "splash"),
        ("TPU v5p", 128, 4096, "bfloat16", "splash"),
        ("TPU v6 lite", 128, 4096, "float32", "splash"),
        ("TPU7x", 128, 4096, "bfloat16", "splash"),
        ("TPU v4", 100, 2048, "bfloat16", "blockwise"),
        ("TPU v4", 128, 1000, "bfloat16", "blockwise"),
        ("NVIDIA H100 80GB HBM3", 128, 8192, "bfloat16", "cudnn"),
        ("NVIDIA A100-SXM4-40GB", 64, 8192, "float16", "cudnn"),
        ("NVIDIA H100 80GB HBM3", 128, 8192, "float32", "blockwise"),
        ("NVIDIA H100 80GB HBM3", 256, 8192, "bfloat16", "blockwise"),
        ("NVIDIA H100 80GB HBM3", 128, 8191, "bfloat16", "blockwise"),
        ("cpu", 64, 512, "float32", "blockwise"),
    ],
)
def test_auto(device_kind, head_dim, seq, dtype, backend):
    assert choose_backend(device_kind, head_dim, seq, dtype) == backend


@pytest.mark.parametrize(
    ("backend", "shape", "words"),
    [
        ("splash", ("TPU v3", 128, 512, "bfloat16"), ["TPU v3", "v4 and later"]),
        ("splash", ("TPU v4", 96, 512, "bfloat16"), ["head_dim is 96", "64 or a multiple of 128"]),
        ("splash", ("TPU v4", 128, 500, "bfloat16"), ["500 tokens", "multiple of 128"]),
        ("flash", ("NVIDIA A100", 128, 512, "bfloat16"), ["NVIDIA A100", "v2 and later"]),
        ("flash", ("TPU v3", 128, 64, "bfloat16"), ["64 tokens", "multiple of 128"]),
        ("cudnn", ("TPU v3", 128, 512, "bfloat16"), ["TPU v3", "NVIDIA"]),
        ("cudnn", ("NVIDIA A100", 128, 512, "float32"), ["float32", "bfloat16 or float16"]),
        ("cudnn", ("NVIDIA A100", 100, 512, "bfloat16"), ["head_dim is 100", "up to 128"]),
    ],
)
def test_obstacles_say_what_is_wanted(backend, shape, words):
    message = obstacle(backend, *shape)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("splash", ["'splash'", "'cpu'", "TPU v4 and later", "'blockwise'"]),
        ("flash", ["'flash'", "'cpu'", "TPU v2 and later", "'blockwise'"]),
        ("cudnn", ["'cudnn'", "'cpu'", "NVIDIA", "'blockwise'"]),
        ("dense", ["'dense'", "reference, blockwise, splash, flash, cudnn or auto"]),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(backend, words):
    segment_ids, positions = rows([(1, 128)])
    q, k, v, _ = qkv(segment_ids, heads=2, kv_heads=1, head_dim=64, dtype=jnp.bfloat16)
    with pytest.raises(InputError) as raised:
        attention(q, k, v, positions=positions, segment_ids=segment_ids, backend=backend)
    assert all(word in str(raised.value) for word in words), raised.value
