"""Writes encoded documents as shards: tokens, document ends, and a loss mask where there is one."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_service.chat import rendered
from data_service.inputs import Document
from data_service.shard_format import ENDS_DTYPE, dtype_for, npy_bytes
from data_service.source_index import ShardEntry
from data_service.tokenizer import Tokenizer
from storage.canonical import sha256_hex
from storage.store import Store

Announce = Callable[[str], None]


class Encoded(NamedTuple):
    """A document's ids, its end of text included; `learn` is None where all are trained on."""

    ids: npt.NDArray[np.generic]
    learn: npt.NDArray[np.bool_] | None


def encoded(document: Document, tokenizer: Tokenizer) -> Encoded:
    learn: npt.NDArray[np.bool_] | None = None
    if isinstance(document, str):
        ids = tokenizer.encode(document)
    else:
        ids, learn = rendered(document, tokenizer)
        learn = np.append(learn, False)
    ids = np.append(ids, tokenizer.end_of_text)
    return Encoded(ids.astype(dtype_for(tokenizer.vocab_size)), learn)


def write_shards(
    store: Store,
    prefix: str,
    first: int,
    documents: Sequence[Encoded],
    *,
    shard_tokens: int,
    announce: Announce,
) -> list[ShardEntry]:
    """The shards `<prefix>-<first>` and following, of about equal size; a document may be cut.

    Their names sort in the order of their numbers, as that of the index.

    `announce` hears "prepare:shard" before each.
    """
    if not documents:
        return []
    tokens = np.concatenate([document.ids for document in documents])
    ends = np.cumsum([document.ids.size for document in documents])
    learn = _learnt(documents)
    shards = -(-tokens.size // shard_tokens)
    cuts = [number * tokens.size // shards for number in range(shards + 1)]
    entries = []
    for number, (lo, hi) in enumerate(itertools.pairwise(cuts), first):
        announce("prepare:shard")
        entries.append(
            _write_shard(
                store,
                f"{prefix}-{sortable(number, 1)}",
                tokens[lo:hi],
                ends[(ends > lo) & (ends <= hi)] - lo,
                None if learn is None or learn[lo:hi].all() else learn[lo:hi],
            )
        )
    return entries


def sortable(number: int, digits: int) -> str:
    """The number in at least so many digits; a longer one has a letter before it, and so sorts."""
    text = f"{number:0{digits}d}"
    longer = len(text) - digits
    return f"{chr(ord('a') + longer - 1)}{text}" if longer else text


def are_there(store: Store, entries: Iterable[ShardEntry]) -> bool:
    """Whether the objects of all shards are in the store, of the right sizes."""
    return objects_are_there(
        store,
        (
            (key, size)
            for entry in entries
            for key, size in (
                (entry.tokens_key, entry.bytes),
                (entry.ends_key, entry.ends_bytes),
                (entry.mask_key, entry.mask_bytes),
            )
            if size
        ),
    )


def objects_are_there(store: Store, sizes: Iterable[tuple[str, int]]) -> bool:
    try:
        return all(store.stat(key).size_bytes == size for key, size in sizes)
    except FileNotFoundError:
        return False


def _learnt(documents: Sequence[Encoded]) -> npt.NDArray[np.bool_] | None:
    if all(document.learn is None for document in documents):
        return None
    return np.concatenate(
        [np.ones(d.ids.size, dtype=np.bool_) if d.learn is None else d.learn for d in documents]
    )


def _write_shard(
    store: Store,
    name: str,
    tokens: npt.NDArray[np.generic],
    ends: npt.NDArray[np.int64],
    learn: npt.NDArray[np.bool_] | None,
) -> ShardEntry:
    data, ends_data = npy_bytes(tokens), npy_bytes(ends.astype(ENDS_DTYPE))
    mask_data = b"" if learn is None else npy_bytes(np.packbits(learn, bitorder="little"))
    entry = ShardEntry(
        name=name,
        tokens=tokens.size,
        bytes=len(data),
        sha256=sha256_hex(data),
        documents=ends.size,
        ends_bytes=len(ends_data),
        ends_sha256=sha256_hex(ends_data),
        mask_bytes=len(mask_data),
        mask_sha256=sha256_hex(mask_data) if mask_data else "",
    )
    store.put(entry.tokens_key, data)
    store.put(entry.ends_key, ends_data)
    if mask_data:
        store.put(entry.mask_key, mask_data)
    return entry
