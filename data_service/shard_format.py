"""The bytes of a shard: a one-dimensional `.npy` array, written without numpy's help or pickle.

The header is laid out here and not by `np.save`, so that a shard's bytes never change with the
version of numpy that wrote it.
"""

import io

import numpy as np
import numpy.typing as npt

HEADER_BYTES = 128
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
    """The whole object for a one-dimensional array (npy format 1.0, numpy's NEP 1)."""
    description = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, "
    description += f"'shape': ({array.shape[0]},), }}"
    padded = description.encode("ascii").ljust(HEADER_BYTES - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + array.tobytes()


def npy_header(head: bytes) -> tuple[np.dtype[np.generic], tuple[int, ...], int]:
    """dtype, shape and the offset of the data, from an object's first bytes; ValueError if none."""
    stream = io.BytesIO(head)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"npy version {version}")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    if fortran_order:
        raise ValueError("fortran order")
    return dtype, shape, stream.tell()


def npy_array(data: bytes) -> npt.NDArray[np.generic]:
    """The array in a whole object, without a copy; ValueError for what is not a plain `.npy`."""
    dtype, shape, offset = npy_header(data[: 2 * HEADER_BYTES])
    if dtype.hasobject:
        raise ValueError("an array of Python objects")
    return np.frombuffer(data, dtype=dtype, offset=offset).reshape(shape)
