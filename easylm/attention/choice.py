"""Which attention runs where: the limits of every backend, and the one that `auto` takes."""

import re

BACKENDS = ("reference", "blockwise", "splash", "flash", "cudnn")

# Both Pallas kernels work on tiles of 128 lanes.
_LANES = 128


def choose_backend(device_kind, head_dim, seq, dtype):
    """The fastest backend that takes these shapes on this device.

    TPU v4 and later run splash. TPU v2 and v3 run blockwise rather than flash: compiled for a v3
    core (one row of 8,192 tokens, 8 heads on one K/V head of 128, forward and backward) it needs
    92 MB of temporaries against 186 MB, multiplies bfloat16 where flash must take float32, and
    skips the blocks that packed segments do not share, which flash computes. NVIDIA GPUs run
    cuDNN in 16 bits. Everything else, and every shape that those kernels refuse, runs blockwise,
    which takes any shape anywhere.

    Args:
      device_kind: as `jax.Device.device_kind` spells it, "TPU v5 lite" for example.
      head_dim: width of a head.
      seq: tokens in a row.
      dtype: name of the dtype of q, k and v.

    Returns:
      One of BACKENDS.
    """
    for backend in ("splash", "cudnn"):
        if obstacle(backend, device_kind, head_dim, seq, dtype) is None:
            return backend
    return "blockwise"


def obstacle(backend, device_kind, head_dim, seq, dtype):
    """Why a backend cannot run this, as "found; wanted", or None when it can.

    Takes the arguments of `choose_backend`.
    """
    if backend == "splash":
        return _pallas_obstacle(device_kind, 4, head_dim, seq)
    if backend == "flash":
        return _pallas_obstacle(device_kind, 2, head_dim, seq)
    if backend == "cudnn":
        return _cudnn_obstacle(device_kind, head_dim, seq, dtype)
    return None


def _pallas_obstacle(device_kind, oldest, head_dim, seq):
    generation = re.match(r"TPU ?v?(\d+)", device_kind)
    if generation is None or int(generation[1]) < oldest:
        return f"the device is {device_kind!r}; it runs on TPU v{oldest} and later"
    if head_dim != 64 and head_dim % _LANES:
        return f"head_dim is {head_dim}; it takes 64 or a multiple of {_LANES}"
    if seq % _LANES:
        return f"rows have {seq} tokens; it takes a multiple of {_LANES}"
    return None


def _cudnn_obstacle(device_kind, head_dim, seq, dtype):
    if not device_kind.startswith("NVIDIA"):
        return f"the device is {device_kind!r}; it runs on NVIDIA GPUs"
    if dtype not in ("bfloat16", "float16"):
        return f"the dtype is {dtype}; it takes bfloat16 or float16"
    # Hopper and later take 256; 128 holds on every GPU that cuDNN's flash attention supports.
    if head_dim > 128 or head_dim % 8:
        return f"head_dim is {head_dim}; it takes a multiple of 8 up to 128"
    if seq % 2:
        return f"rows have {seq} tokens; it takes an even number"
    return None
