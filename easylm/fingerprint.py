"""A name for what parameters hold, computed where they lie."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Odd, and so are their powers: places along one axis, of up to 2**32 elements, all differ.
_STRIDES = (0x9E3779B1, 0x85EBCA77)


def params_fingerprint(params: dict) -> str:
    """32 hexadecimal digits that stand for the parameters.

    They depend on every parameter's path, shape, dtype and bits, and not on the mesh, the number of
    processes or the machine. All processes call it together, and each gets the answer.

    Each parameter becomes two words of 32 bits on the devices that hold it: the bits of each value
    are mixed with its place in the parameter, and the results added modulo 2**32, which no order of
    adding changes. One changed value always changes these words; any other two parameters have the
    same with a probability of about 2**-64, unless someone means them to.

    Args:
      params: nested dict of jax.Array with elements of up to 32 bits.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    words = jax.device_get(_all_words([leaf for _, leaf in leaves]))
    described = [
        ["/".join(key.key for key in path), leaf.shape, leaf.dtype.name, *map(int, pair)]
        for (path, leaf), pair in zip(leaves, words, strict=True)
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


@jax.jit
def _all_words(leaves: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    return [_words(leaf) for leaf in leaves]


def _words(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two sums over an array, uint32 scalars: whole on every device, however the array is split."""
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    first = _mixed(bits + _places(leaf.shape, _STRIDES[0]))
    second = _mixed(first ^ _places(leaf.shape, _STRIDES[1]))
    zero = np.uint32(0)
    # One reduction of both: XLA:CPU would read the array again for a second one.
    return lax.reduce(
        (first, second),
        (zero, zero),
        lambda x, y: (x[0] + y[0], x[1] + y[1]),
        range(leaf.ndim),
    )


def _places(shape: tuple[int, ...], stride: int) -> jax.Array:
    """A number for each element of an array, from its indices in the whole of it; uint32."""
    places = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        step = np.uint32(pow(stride, axis + 1, 2**32))
        places += lax.broadcasted_iota(jnp.uint32, shape, axis) * step
    return places


def _mixed(words: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: a bijection of 32 bits in which each one touches all."""
    words = (words ^ (words >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return words ^ (words >> np.uint32(16))
