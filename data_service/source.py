"""A source opened for reading: its index checked, its shards read by token range.

Local shards are mapped into memory, remote ones kept whole in a small cache; either way a shard's
sha256 is checked at its first use in this process, and every id read is checked against the
vocabulary. Safe to use from several threads.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from data_service.shard_format import HEADER_BYTES, dtype_named, npy_array, npy_header
from data_service.source_index import (
    INDEX_KEY,
    SPLITS,
    ShardEntry,
    SourceIndex,
    parse_index,
)
from data_service.tokenizer import Tokenizer, tokenizer_from_spec
from storage.canonical import sha256_hex
from storage.errors import DataError, IntegrityError
from storage.store import Store, open_store

Tokens = npt.NDArray[np.unsignedinteger[Any]]

OPEN_SHARDS = 32  # twice the default lanes, and more: mapped, or held in memory when remote


def open_source(name: str, url: str, *, store: Store | None = None) -> "Source":
    """The source at `url`, whole and of the kind its index says; DataError with the reason if not.

    Checks the index, that every shard is there, and the size and header of local shards. Remote
    shards are checked when they are read: one request each would make a start slow.
    """
    store = open_store(url) if store is None else store
    where = f"source {name!r} at {url}"
    try:
        data = store.get(INDEX_KEY)
    except FileNotFoundError:
        raise DataError(_what_is_missing(store, where)) from None
    index = parse_index(data, where=where)
    tokenizer = tokenizer_from_spec(index.tokenizer)
    if tokenizer.fingerprint != index.tokenizer_fingerprint:
        raise DataError(
            f"{where}: made with a {tokenizer.name} tokenizer of fingerprint "
            f"{index.tokenizer_fingerprint[:12]}, here it is {tokenizer.fingerprint[:12]}; "
            "prepare the source again"
        )
    present = set(store.list(""))
    for split in SPLITS:
        for entry in index.shards(split):
            if entry.tokens_key not in present:
                raise DataError(
                    f"{where}: shard {entry.tokens_key} is missing; copy it there again, or "
                    "prepare the source again"
                )
            if store.local_path(entry.tokens_key) is not None:
                _check_size(store.stat(entry.tokens_key).size_bytes, entry, where)
                _check_header(store.get(entry.tokens_key, 0, 2 * HEADER_BYTES), entry, index, where)
    return Source(name=name, url=url, store=store, index=index, tokenizer=tokenizer)


class Source:
    """A named collection of shards; made by `open_source`."""

    def __init__(
        self, *, name: str, url: str, store: Store, index: SourceIndex, tokenizer: Tokenizer
    ) -> None:
        self.name = name
        self.url = url
        self.index = index
        self.fingerprint = index.fingerprint
        self.tokenizer = tokenizer
        self._store = store
        self._where = f"source {name!r} at {url}"
        self._entries = {entry.name: entry for split in SPLITS for entry in index.shards(split)}
        self._open: OrderedDict[str, Tokens] = OrderedDict()
        self._verified: set[str] = set()
        self._lock = threading.Lock()

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def shards(self, split: str) -> tuple[ShardEntry, ...]:
        """The shards of "train" or "validation", in the order of the index."""
        return self.index.shards(split)

    def tokens(self, shard: str, lo: int, hi: int) -> Tokens:
        """Tokens [lo, hi) of a shard, in the shard's dtype; the array must not be written to."""
        entry = self._entries[shard]
        if not 0 <= lo <= hi <= entry.tokens:
            raise IndexError(f"{self._where}: shard {shard} has no tokens [{lo}, {hi})")
        found = self._shard(entry)[lo:hi]
        if found.size and int(found.max()) >= self.vocab_size:
            place = int(np.argmax(found >= self.vocab_size))
            raise DataError(
                f"{self._where}: shard {shard} holds token id {int(found[place])} at position "
                f"{lo + place}, beyond the {self.tokenizer.name} vocabulary of {self.vocab_size}; "
                "prepare the source again"
            )
        return found

    def ends(self, shard: str) -> npt.NDArray[np.int64]:
        """Where the documents of a shard end: positions just after each end of text, int64."""
        entry = self._entries[shard]
        data = self._get(entry.ends_key)
        if sha256_hex(data) != entry.ends_sha256:
            raise IntegrityError(f"{self._where}: {entry.ends_key} is not what the index names")
        return npy_array(data).astype(np.int64)

    def _shard(self, entry: ShardEntry) -> Tokens:
        with self._lock:
            array = self._open.get(entry.name)
            if array is None:
                array = self._open[entry.name] = self._load(entry)
                while len(self._open) > OPEN_SHARDS:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(entry.name)
            return array

    def _load(self, entry: ShardEntry) -> Tokens:
        path = self._store.local_path(entry.tokens_key)
        if path is None:
            data = self._get(entry.tokens_key)
            _check_size(len(data), entry, self._where)
            _check_header(data[: 2 * HEADER_BYTES], entry, self.index, self._where)
            self._verify(entry, lambda: data)
            return cast(Tokens, npy_array(data))
        try:
            mapped: npt.NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self._where}: shard {entry.tokens_key} cannot be read ({error})"
            ) from error
        _check_size(mapped.size, entry, self._where)
        self._verify(entry, lambda: mapped.data)
        array: Tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        return array

    def _verify(self, entry: ShardEntry, data: Callable[[], bytes | memoryview]) -> None:
        if entry.name in self._verified:
            return
        found = sha256_hex(data())
        if found != entry.sha256:
            raise IntegrityError(
                f"{self._where}: shard {entry.tokens_key} has sha256 {found[:12]}, the index names "
                f"{entry.sha256[:12]}: its bytes have changed; copy it there again"
            )
        self._verified.add(entry.name)

    def _get(self, key: str) -> bytes:
        try:
            return self._store.get(key)
        except FileNotFoundError:
            raise DataError(f"{self._where}: {key} is missing; copy it there again") from None


def _what_is_missing(store: Store, where: str) -> str:
    if store.list(""):
        return (
            f"{where}: there is no {INDEX_KEY} (it is written last: the preparation did not "
            "finish, run it again; or these are not token shards)"
        )
    return (
        f"{where}: there is no data here; make it with `python -m data_service.prepare INPUT... "
        "--out URL`"
    )


def _check_size(size_bytes: int, entry: ShardEntry, where: str) -> None:
    if size_bytes != entry.bytes:
        what = "truncated" if size_bytes < entry.bytes else "larger than it was"
        raise DataError(
            f"{where}: shard {entry.tokens_key} is {what}: {size_bytes} bytes, the index names "
            f"{entry.bytes}; copy it there again, or prepare the source again"
        )


def _check_header(head: bytes, entry: ShardEntry, index: SourceIndex, where: str) -> None:
    try:
        dtype, shape, _ = npy_header(head)
    except ValueError as error:
        raise DataError(f"{where}: shard {entry.tokens_key} is no .npy file ({error})") from None
    if dtype != dtype_named(index.dtype):
        raise DataError(
            f"{where}: shard {entry.tokens_key} has dtype {dtype}, the index says {index.dtype}; "
            "prepare the source again"
        )
    if shape != (entry.tokens,):
        raise DataError(
            f"{where}: shard {entry.tokens_key} has shape {shape}, the index says "
            f"{entry.tokens} tokens"
        )
