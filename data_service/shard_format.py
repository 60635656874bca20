"""The bytes of a shard: a one-dimensional `.npy` array, written without numpy's help or pickle.

The header is laid out and read here and not by numpy, so that a shard's bytes never change with the
version of numpy that wrote it.
"""

import re

import numpy as np
import numpy.typing as npt

HEADER_BYTES = 128
_HEADER = re.compile(
    rb"\{'descr': '(?P<descr>[\w<>|=]+)', 'fortran_order': (?P<fortran_order>True|False), "
    rb"'shape': \((?P<shape>[\d, ]*)\), \}\s*"
)
"""As numpy writes it. Its own reader parses Python, which threads of Python 3.11.7 cannot do at the
same time: SystemError "AST constructor recursion depth mismatch"."""
ENDS_DTYPE = np.dtype("<i8")


def dtype_for(vocab_size: int) -> np.dtype[np.generic]:
    """The narrowest dtype of a shard that holds every id: uint16, else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def dtype_named(name: str) -> np.dtype[np.generic]:
    """`uint16` or `uint32`, little-endian; ValueError for anything else."""
    if name not in ("uint16", "uint32"):
        raise ValueError(name)
    return np.dtype(name).newbyteorder("<")


def npy_bytes(array: npt.NDArray[np.generic]) -> bytes:
    """The whole object for a one-dimensional array."""
    return npy_head(array.dtype, array.shape[0]) + array.tobytes()


def npy_head(dtype: np.dtype[np.generic], count: int) -> bytes:
    """The header of so many values, 128 bytes (npy format 1.0, numpy's NEP 1)."""
    description = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({count},), }}"
    padded = description.encode("ascii").ljust(HEADER_BYTES - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded


def npy_header(head: bytes | memoryview) -> tuple[np.dtype[np.generic], tuple[int, ...], int]:
    """dtype, shape and the offset of the data, from an object's first bytes; ValueError if none."""
    data = bytes(head)
    if data[:6] != b"\x93NUMPY":
        raise ValueError("no npy magic")
    if data[6:8] != b"\x01\x00":
        raise ValueError(f"npy version {(data[6], data[7]) if len(data) > 7 else ()}")
    offset = 10 + int.from_bytes(data[8:10], "little")
    found = _HEADER.fullmatch(data[10:offset])
    if found is None or len(data) < offset:
        raise ValueError("not the header of a plain array")
    if found["fortran_order"] == b"True":
        raise ValueError("fortran order")
    try:
        dtype = np.dtype(found["descr"].decode("ascii"))
    except TypeError as error:
        raise ValueError(str(error)) from None
    return dtype, tuple(int(size) for size in found["shape"].split(b",") if size.strip()), offset


def npy_array(data: bytes | memoryview) -> npt.NDArray[np.generic]:
    """The array in a whole object, without a copy; ValueError for what is not a plain `.npy`."""
    dtype, shape, offset = npy_header(bytes(data[: 2 * HEADER_BYTES]))
    if dtype.hasobject:
        raise ValueError("an array of Python objects")
    return np.frombuffer(data, dtype=dtype, offset=offset).reshape(shape)
