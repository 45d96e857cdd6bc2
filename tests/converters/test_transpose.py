"""The tiled copy, against numpy's."""

import ml_dtypes
import numpy as np
import pytest

from easylm.converters.transpose import contiguous


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("shape", [(300, 129), (1, 7), (128, 256), (0, 5)])
def test_a_transposed_matrix_is_copied_into_c_order(shape, dtype):
    matrix = np.random.default_rng(0).normal(size=shape).astype(dtype)
    copy = contiguous(matrix.T)
    assert copy.flags.c_contiguous and copy.dtype == matrix.dtype and copy.shape == shape[::-1]
    assert copy.tobytes() == matrix.T.tobytes()


def test_what_is_in_order_is_not_copied():
    matrix = np.zeros((300, 129))
    assert contiguous(matrix) is matrix
    vector = np.zeros(8)[::2]
    assert contiguous(vector).flags.c_contiguous
