"""Arrays whose elements do not lie in row-major order, as they are written."""

import io

import ml_dtypes
import numpy as np
import pytest

from fmodels.weights import Tensor
from fmodels.weights.tensors import put, row_major

DTYPES = (np.uint8, np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex128)
SHAPES = ((515, 300), (1, 70_000), (256, 512), (70_000, 1), (3, 5), (0, 7), (12,), (40, 50, 60))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transposed(shape, dtype):
    array = np.random.default_rng(0).integers(0, 250, shape).astype(dtype)
    for given in (array, array.T, np.repeat(array, 2, axis=0)[::2]):
        want = np.ascontiguousarray(given)
        got = row_major(given)
        assert got.flags.c_contiguous
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert got.tobytes() == want.tobytes()
        out = io.BytesIO()
        put(out, Tensor.lazy("x", given.dtype, given.shape, lambda given=given: given))
        assert out.getvalue() == want.tobytes()
