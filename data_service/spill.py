"""The global shuffle of documents: each goes to a bucket by a hash, and is sorted there by it.

A first pass spills what it encodes, one object per batch, ordered by bucket; a second reads one
bucket out of all of them, which is about a shard, and so is all that is ever in memory. An object
is a directory (where each bucket begins, uint64), then per bucket a head (documents, tokens), the
documents' keys, lengths and mask flags, the tokens, and a byte of mask for each token.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_service.shard_writer import Encoded
from storage.store import Store

KEY_BYTES = 16
_HEAD = np.dtype([("documents", "<u8"), ("tokens", "<u8")])


class Spilled(NamedTuple):
    """An encoded document on its way to a bucket."""

    bucket: int
    key: bytes
    document: Encoded


def shuffle_key(seed: int, unit: int, ordinal: int, part: int) -> bytes:
    """Where a part of a document goes, by its place in the inputs alone; frozen."""
    named = f"rangeflow-shuffle-1 {seed} {unit} {ordinal} {part}"
    return hashlib.sha256(named.encode()).digest()[:KEY_BYTES]


def bucket_of(key: bytes, buckets: int) -> int:
    """Buckets share the keys out in equal ranges."""
    return (int.from_bytes(key[:8], "big") * buckets) >> 64


def spill_bytes(documents: Sequence[Spilled], buckets: int) -> bytes:
    """The object of a batch."""
    ordered = sorted(documents, key=lambda spilled: (spilled.bucket, spilled.key))
    groups = {
        bucket: _bucket_bytes(list(group))
        for bucket, group in itertools.groupby(ordered, key=lambda spilled: spilled.bucket)
    }
    sizes = [len(groups.get(bucket, b"")) for bucket in range(buckets)]
    directory = np.cumsum([8 * (buckets + 1), *sizes]).astype("<u8")
    return directory.tobytes() + b"".join(groups[bucket] for bucket in sorted(groups))


def read_bucket(
    store: Store, keys: Sequence[str], bucket: int, dtype: np.dtype[np.generic]
) -> list[Encoded]:
    """The documents of one bucket out of all the objects, in the order of their keys."""
    found: list[tuple[bytes, Encoded]] = []
    for key in keys:
        lo, hi = np.frombuffer(store.get(key, 8 * bucket, 8 * bucket + 16), dtype="<u8").tolist()
        if lo < hi:
            found.extend(_documents(store.get(key, lo, hi), dtype))
    found.sort(key=lambda pair: pair[0])
    return [document for _, document in found]


def _bucket_bytes(group: Sequence[Spilled]) -> bytes:
    lengths = np.array([spilled.document.ids.size for spilled in group], dtype="<u8")
    masked = [spilled.document.learn is not None for spilled in group]
    learn = [spilled.document.learn for spilled in group if spilled.document.learn is not None]
    return b"".join(
        (
            np.array((len(group), lengths.sum()), dtype=_HEAD).tobytes(),
            b"".join(spilled.key for spilled in group),
            lengths.tobytes(),
            np.array(masked, dtype=np.bool_).tobytes(),
            np.concatenate([spilled.document.ids for spilled in group]).tobytes(),
            np.concatenate(learn).tobytes() if learn else b"",
        )
    )


def _documents(data: bytes, dtype: np.dtype[np.generic]) -> Iterator[tuple[bytes, Encoded]]:
    head = np.frombuffer(data, dtype=_HEAD, count=1)[0]
    documents, tokens = int(head["documents"]), int(head["tokens"])
    keys_at = _HEAD.itemsize
    lengths_at = keys_at + documents * KEY_BYTES
    masked_at = lengths_at + documents * 8
    ids_at = masked_at + documents
    lengths = np.frombuffer(data, dtype="<u8", count=documents, offset=lengths_at)
    masked = np.frombuffer(data, dtype=np.bool_, count=documents, offset=masked_at)
    ids = np.frombuffer(data, dtype=dtype, count=tokens, offset=ids_at)
    learn: npt.NDArray[np.bool_] = np.frombuffer(
        data, dtype=np.bool_, offset=ids_at + tokens * dtype.itemsize
    )
    at = learn_at = 0
    for number, length in enumerate(lengths.tolist()):
        mask = None
        if masked[number]:
            mask = learn[learn_at : learn_at + length]
            learn_at += length
        key = data[keys_at + number * KEY_BYTES : keys_at + (number + 1) * KEY_BYTES]
        yield key, Encoded(ids[at : at + length], mask)
        at += length
