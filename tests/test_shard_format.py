"""The bytes of a shard are numpy's own format, and nothing but plain numbers."""

import io

import numpy as np
import pytest

from data_service.shard_format import (
    HEADER_BYTES,
    dtype_for,
    dtype_named,
    npy_array,
    npy_bytes,
    npy_header,
)


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i8"])
@pytest.mark.parametrize("size", [0, 1, 10_000_000])
def test_numpy_reads_and_writes_the_same_bytes(dtype: str, size: int) -> None:
    array = np.zeros(size, dtype=dtype)
    array[: size // 2] = 7
    data = npy_bytes(array)
    assert len(data) == HEADER_BYTES + array.nbytes
    assert np.array_equal(np.load(io.BytesIO(data), allow_pickle=False), array)
    assert np.array_equal(npy_array(data), array)
    saved = io.BytesIO()
    np.save(saved, array)
    assert npy_header(data) == npy_header(saved.getvalue())


def test_the_narrowest_dtype_that_fits_is_chosen() -> None:
    assert [dtype_for(size).name for size in (257, 65_536, 65_537)] == [
        *("uint16", "uint16", "uint32")
    ]
    assert dtype_named("uint16") == np.dtype("<u2")
    with pytest.raises(ValueError, match="int64"):
        dtype_named("int64")


def test_what_is_no_npy_is_refused() -> None:
    for data in (b"", b"hello", npy_bytes(np.zeros(3, "<u2"))[:40]):
        with pytest.raises(ValueError, match=r".+"):
            npy_header(data)


def test_an_array_of_objects_is_refused() -> None:
    saved = io.BytesIO()
    np.save(saved, np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="Python objects"):
        npy_array(saved.getvalue())
