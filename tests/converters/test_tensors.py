"""What sources of tensors share."""

import ml_dtypes
import numpy as np
import pytest

from easylm.converters.tensors import TensorInfo, contiguous, files_and_size, has_nonfinite, refuse
from easylm.errors import InputError

FLOATS = (ml_dtypes.bfloat16, np.float16, np.float32, np.float64)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -np.nan])
def test_one_bad_value_is_found_anywhere(dtype, bad):
    for place in (0, 65_535, 65_536, 199_999):
        array = np.ones(200_000, dtype)
        array[place] = bad
        layouts = (
            array,
            array.reshape(400, 500).T,
            array.reshape(2, 2, 100, 500).swapaxes(1, 2),
            np.stack([np.ones_like(array), array], axis=1)[:, 1],
        )
        for layout in layouts:
            assert has_nonfinite(layout)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_finite_value_passes(dtype):
    info = ml_dtypes.finfo(dtype)
    values = [0, -0.0, info.max, info.min, info.tiny, -info.tiny, info.smallest_subnormal, 1]
    assert not has_nonfinite(np.array(values, dtype))
    assert not has_nonfinite(np.zeros((0, 3), dtype))
    assert not has_nonfinite(np.array(1, dtype))
    assert has_nonfinite(np.array(np.nan, dtype))


def test_all_sixteen_bit_patterns_are_judged_as_numpy_does():
    bits = np.arange(1 << 16, dtype=np.uint16)
    for dtype in (ml_dtypes.bfloat16, np.float16):
        floats = bits.view(dtype)
        for start in range(0, 1 << 16, 64):
            block = floats[start : start + 64]
            wanted = not np.isfinite(block.astype(np.float32)).all()
            assert has_nonfinite(block) == wanted


def test_integers_are_finite():
    assert not has_nonfinite(np.full(3, -1, np.int16))
    assert not has_nonfinite(np.ones(3, bool))


def test_sizes_are_counted_and_said():
    assert TensorInfo((3, 5), np.dtype(ml_dtypes.bfloat16), "f").nbytes == 30
    assert TensorInfo((), np.dtype(np.float32), "f").nbytes == 4
    # Beyond what a 32-bit or a numpy integer of a platform may hold.
    assert TensorInfo((1 << 31, 1 << 31), np.dtype(np.float64), "f").nbytes == 1 << 65
    assert files_and_size(1, 999) == "1 file, 999 bytes"
    assert files_and_size(3, 13_476_839_424) == "3 files, 13.5 GB"


def test_all_problems_are_listed_at_once():
    refuse([], "here")
    with pytest.raises(InputError, match=r"^here: a: bad$"):
        refuse(["a: bad"], "here")
    with pytest.raises(InputError) as error:
        refuse([f"tensor {i}" for i in range(23)], "here")
    lines = str(error.value).splitlines()
    assert lines[0] == "here: 23 problems:"
    assert lines[1:21] == [f"  tensor {i}" for i in range(20)]
    assert lines[21] == "  and 3 more"


@pytest.mark.parametrize("dtype", [*FLOATS, np.int8, bool])
def test_any_layout_is_copied_into_order(dtype):
    array = np.random.default_rng(0).normal(size=(300, 270)).astype(dtype)
    layouts = (
        array.T,
        array[::2],
        array[:, ::3],
        array.T[5:, ::2],
        array[::-1, ::-1],
        array.reshape(2, 150, 3, 90).swapaxes(1, 2),
        array[:1].T,
        array[:0].T,
    )
    for layout in layouts:
        copy = contiguous(layout)
        assert copy.flags.c_contiguous
        assert (copy.dtype, copy.shape) == (layout.dtype, layout.shape)
        assert copy.tobytes() == layout.tobytes()
    assert contiguous(array) is array


def test_values_that_overflow_when_rounded_are_seen():
    largest = np.float32(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    for exponent in range(8, 24):  # steps below, at and above half a unit in the last place
        for value in (largest * np.float32(1 + 2.0**-exponent), largest):
            if not np.isfinite(value):
                continue
            array = np.array([0, -value], np.float32)
            wanted = bool(np.isinf(array.astype(bfloat16)).any())
            assert has_nonfinite(array, bfloat16) == wanted, (exponent, value)
            assert not has_nonfinite(array, np.dtype(np.float32))
    for dtype in (np.float32, bfloat16):
        largest = np.float64(ml_dtypes.finfo(dtype).max)
        for scale in (1.0, 1 + 2.0**-9, 1 + 2.0**-8, 1 + 2.0**-25, 1 + 2.0**-24, 1e3):
            array = np.array([largest * scale])
            with np.errstate(over="ignore"):
                wanted = bool(np.isinf(array.astype(dtype)).any())
            assert has_nonfinite(array, np.dtype(dtype)) == wanted, (dtype, scale)
