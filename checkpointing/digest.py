"""The digest of a checkpoint: equal if and only if the training state is bit for bit equal.

It covers every tensor (name, dtype, shape, content) and the exact state (step, cursor, scaler,
seed). It does not cover who wrote it, when, in how many processes or objects, nor the state of
random generators, which decide no bits of a run.
"""

from collections.abc import Mapping
from typing import Any

import torch

from storage.canonical import canonical_json, sha256_hex

CHUNK_BYTES = 16 * 2**20

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


def chunk_digests(data: memoryview) -> list[str]:
    """The sha256 of each 16 MiB of a tensor's bytes, row-major; one entry for an empty tensor."""
    starts = range(0, max(1, len(data)), CHUNK_BYTES)
    return [sha256_hex(data[start : start + CHUNK_BYTES]) for start in starts]


def checkpoint_digest(tensors: Mapping[str, Mapping[str, Any]], exact: Mapping[str, Any]) -> str:
    """The digest of tensors (by name: `dtype`, `shape`, `chunks`) and of the exact state."""
    table = [
        [name, tensors[name]["dtype"], tensors[name]["shape"], tensors[name]["chunks"]]
        for name in sorted(tensors)
    ]
    return sha256_hex(canonical_json({"tensors": table, "exact": exact}))


def dtype_named(name: str) -> torch.dtype | None:
    """The dtype that a description names, or None when it is not one that a checkpoint may hold."""
    return _DTYPES.get(name)
