"""A source opened for reading: its index checked, its shards read by token range.

Local shards are mapped into memory; remote ones come through the cache of this host, or without
one are read into memory. Either way a shard's sha256 and its ids are checked at its first use in
this process. Safe to use from several threads.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import chain
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from data_service.cache import Cache
from data_service.download import Remote
from data_service.shard_format import HEADER_BYTES, dtype_named, npy_array, npy_head, npy_header
from data_service.shard_table import ShardTable
from data_service.source_index import (
    INDEX_KEY,
    SPLITS,
    ShardEntry,
    SourceIndex,
    read_index,
)
from data_service.tokenizer import Tokenizer, tokenizer_from_spec
from storage.canonical import sha256_hex
from storage.errors import (
    ConfigurationError,
    DataError,
    IntegrityError,
    StoreUnavailableError,
)
from storage.store import Store, open_store

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Array = TypeVar("Array", bound=npt.NDArray[Any])

LISTED_SHARDS = 1000  # up to so many are looked for when the source is opened: 40 ms
OPEN_SHARDS = 32  # twice the default lanes, and more: mapped, or held in memory when remote
_KNOWN_REMOTES = 4096


def open_source(
    name: str,
    url: str,
    *,
    store: Store | None = None,
    cache: Cache | None = None,
    alternates: Sequence[Store] = (),
    look: bool = True,
) -> "Source":
    """The source at `url`, whole and of the kind its index says; DataError with the reason if not.

    Remote shards come through `cache`, if there is one, and from `alternates` when `url` fails;
    local ones are read where they are. Checks the index, and with `look`, of a source with at most
    1,000 shards, that every shard is there, and the size and header of local ones. What is not
    checked here is checked when it is read.
    """
    store = open_store(url) if store is None else store
    where = f"source {name!r} at {url}"
    local = store.local_path(INDEX_KEY) is not None
    if alternates and (local or cache is None):
        raise ConfigurationError(
            f"{where}: another place is asked for the shards of remote sources that come through "
            "a cache, and not for these; leave it out"
        )
    index = _read_index(store, alternates, where)
    tokenizer = tokenizer_from_spec(index.tokenizer)
    if tokenizer.fingerprint != index.tokenizer_fingerprint:
        raise DataError(
            f"{where}: made with a {tokenizer.name} tokenizer of fingerprint "
            f"{index.tokenizer_fingerprint[:12]}, here it is {tokenizer.fingerprint[:12]}; "
            "prepare the source again"
        )
    if look and sum(len(index.shards(split)) for split in SPLITS) <= LISTED_SHARDS:
        _check_shards((store, *alternates), index, where)
    return Source(
        name=name,
        url=url,
        stores=(store, *alternates),
        index=index,
        tokenizer=tokenizer,
        cache=None if local else cache,
    )


class Source:
    """A named collection of shards; made by `open_source`."""

    def __init__(
        self,
        *,
        name: str,
        url: str,
        stores: Sequence[Store],
        index: SourceIndex,
        tokenizer: Tokenizer,
        cache: Cache | None = None,
    ) -> None:
        self.name = name
        self.url = url
        self.index = index
        self.fingerprint = index.fingerprint
        self.tokenizer = tokenizer
        self._stores = tuple(stores)
        self._store = self._stores[0]
        self._cache = cache
        self._remotes = lru_cache(_KNOWN_REMOTES)(self._new_remotes)
        self._where = f"source {name!r} at {url}"
        self.has_masks = any(bool(index.shards(split).mask_bytes.any()) for split in SPLITS)
        self._tokens: OrderedDict[str, Tokens] = OrderedDict()
        self._masks: OrderedDict[str, npt.NDArray[np.uint8]] = OrderedDict()
        self._verified: set[str] = set()
        self._lock = threading.Lock()

    @property
    def is_cached(self) -> bool:
        """Whether shards come through the cache: an array that is kept then takes room from it."""
        return self._cache is not None

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def shards(self, split: str) -> ShardTable:
        """The shards of "train" or "validation", sorted by name."""
        return self.index.shards(split)

    def tokens(self, shard: str, lo: int, hi: int) -> Tokens:
        """Tokens [lo, hi) of a shard, in the shard's dtype; the array must not be written to."""
        entry = self._entry(shard)
        if not 0 <= lo <= hi <= entry.tokens:
            raise IndexError(f"{self._where}: shard {shard} has no tokens [{lo}, {hi})")
        if self._cache is not None:
            return self._cache.array(self.remotes(shard)[0])[lo:hi]
        return self._opened(self._tokens, shard, lambda: self._load_tokens(entry))[lo:hi]

    def shard_tokens(self, row: int) -> Tokens:
        """All tokens of the training shard at a row of the table; not to be written to."""
        train = self.index.shards("train")
        if self._cache is not None:
            return self._cache.array(self.remotes(train.name(row))[0])
        return self._opened(self._tokens, train.name(row), lambda: self._load_tokens(train[row]))

    def shard_mask(self, row: int) -> npt.NDArray[np.uint8] | None:
        """The loss mask of a training shard: eight tokens a byte, lowest bit first; None: no mask.

        A bit is 1 where the model is trained to predict the token.
        """
        train = self.index.shards("train")
        if not train.mask_bytes[row]:
            return None
        if self._cache is not None:
            return self._cache.array(self.remotes(train.name(row))[1])
        return self._opened(self._masks, train.name(row), lambda: self._load_mask(train[row]))

    def mask(self, shard: str) -> npt.NDArray[np.uint8] | None:
        """The loss mask of a shard of either split, as `shard_mask` gives it."""
        entry = self._entry(shard)
        if not entry.mask_bytes:
            return None
        if self._cache is not None:
            return self._cache.array(self.remotes(shard)[1])
        return self._opened(self._masks, shard, lambda: self._load_mask(entry))

    def ends(self, shard: str) -> npt.NDArray[np.int64]:
        """Where the documents of a shard end: positions just after each end of text, int64."""
        entry = self._entry(shard)
        data = self._get(entry.ends_key)
        if sha256_hex(data) != entry.ends_sha256:
            raise IntegrityError(f"{self._where}: {entry.ends_key} is not what the index names")
        return npy_array(data).astype(np.int64)

    def remotes(self, shard: str) -> tuple[Remote, ...]:
        """What the cache keeps of a shard: its tokens, and its loss mask if it has one."""
        return self._remotes(shard)

    def _new_remotes(self, shard: str) -> tuple[Remote, ...]:
        entry = self._entry(shard)
        tokens = Remote(
            source=self.name,
            key=entry.tokens_key,
            sha256=entry.sha256,
            size_bytes=entry.bytes,
            stores=self._stores,
            check=partial(self._check_tokens, entry),
        )
        if not entry.mask_bytes:
            return (tokens,)
        mask = Remote(
            source=self.name,
            key=entry.mask_key,
            sha256=entry.mask_sha256,
            size_bytes=entry.mask_bytes,
            stores=self._stores,
            check=partial(self._check_mask, entry),
        )
        return tokens, mask

    def _entry(self, shard: str) -> ShardEntry:
        for split in SPLITS:
            row = self.index.shards(split).row(shard)
            if row is not None:
                return self.index.shards(split)[row]
        raise DataError(f"{self._where}: there is no shard {shard!r}")

    def _opened(self, held: OrderedDict[str, Array], name: str, load: Callable[[], Array]) -> Array:
        """What is held, or else loaded: outside the lock, so that others load beside it."""
        with self._lock:
            if name in held:
                held.move_to_end(name)
                return held[name]
        array = load()
        with self._lock:
            held[name] = array
            while len(held) > OPEN_SHARDS:
                held.popitem(last=False)
        return array

    def _load_tokens(self, entry: ShardEntry) -> Tokens:
        data = self._buffer(entry.tokens_key)
        _check_size(len(data), entry, self._where)
        _check_header(bytes(data[: 2 * HEADER_BYTES]), entry, self.index, self._where)
        known = self._verify(entry.tokens_key, data, entry.sha256)
        array = cast(Tokens, _array(data, entry.tokens_key, self._where))
        if not known:
            self._check_vocabulary(entry, array)
            self._verified.add(entry.tokens_key)
        return array

    def _load_mask(self, entry: ShardEntry) -> npt.NDArray[np.uint8]:
        data = self._buffer(entry.mask_key)
        if not self._verify(entry.mask_key, data, entry.mask_sha256):
            self._verified.add(entry.mask_key)
        mask = _array(data, entry.mask_key, self._where)
        self._check_mask(entry, mask)
        return cast(npt.NDArray[np.uint8], mask)

    def _check_mask(self, entry: ShardEntry, mask: npt.NDArray[Any]) -> None:
        if mask.dtype != np.uint8 or mask.shape != (-(-entry.tokens // 8),):
            raise DataError(
                f"{self._where}: shard {entry.mask_key} must hold {-(-entry.tokens // 8)} bytes "
                f"for {entry.tokens} tokens, found {mask.shape} of {mask.dtype}; prepare the "
                "source again"
            )

    def _check_tokens(self, entry: ShardEntry, tokens: npt.NDArray[Any]) -> None:
        _check_kind(tokens.dtype, tokens.shape, entry, self.index, self._where)
        self._check_vocabulary(entry, tokens)

    def _check_vocabulary(self, entry: ShardEntry, tokens: Tokens) -> None:
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            place = int(np.argmax(tokens >= self.vocab_size))
            raise DataError(
                f"{self._where}: shard {entry.name} holds token id {int(tokens[place])} at "
                f"position {place}, beyond the {self.tokenizer.name} vocabulary of "
                f"{self.vocab_size}; prepare the source again"
            )

    def _buffer(self, key: str) -> bytes | memoryview:
        """A whole object: mapped where it is a file, else read."""
        path = self._store.local_path(key)
        if path is None:
            return self._get(key)
        try:
            return np.memmap(path, dtype=np.uint8, mode="r").data
        except FileNotFoundError:
            raise DataError(_missing(self._where, key)) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{self._where}: {key} cannot be read ({error})") from error

    def _verify(self, key: str, data: bytes | memoryview, expected: str) -> bool:
        """Whether the object was verified before; IntegrityError when its bytes have changed."""
        if key in self._verified:
            return True
        found = sha256_hex(data)
        if found != expected:
            raise IntegrityError(
                f"{self._where}: shard {key} has sha256 {found[:12]}, the index names "
                f"{expected[:12]}: its bytes have changed; copy it there again"
            )
        return False

    def _get(self, key: str) -> bytes:
        try:
            return self._store.get(key)
        except FileNotFoundError:
            raise DataError(_missing(self._where, key)) from None


def _read_index(store: Store, alternates: Sequence[Store], where: str) -> SourceIndex:
    """The index, of the first place that has it and can be reached."""
    try:
        return read_index(store, where=where)
    except (FileNotFoundError, StoreUnavailableError) as error:
        if alternates:
            return _read_index(alternates[0], alternates[1:], where)
        if isinstance(error, StoreUnavailableError):
            raise
        raise DataError(_what_is_missing(store, where)) from None


def _check_shards(stores: Sequence[Store], index: SourceIndex, where: str) -> None:
    """Look now what reading would find: all shards there, local ones of the right size and kind."""
    store, listings = stores[0], list[Sequence[str]]()
    for place in stores:
        try:
            listings.append(place.list(""))
        except StoreUnavailableError:
            if place is stores[-1] and not listings:
                raise
    present = set(chain.from_iterable(listings))
    for split in SPLITS:
        for entry in index.shards(split):
            if entry.tokens_key not in present:
                raise DataError(_missing(where, entry.tokens_key))
            if store.local_path(entry.tokens_key) is not None:
                _check_size(store.stat(entry.tokens_key).size_bytes, entry, where)
                _check_header(store.get(entry.tokens_key, 0, 2 * HEADER_BYTES), entry, index, where)


def _missing(where: str, key: str) -> str:
    return f"{where}: shard {key} is missing; copy it there again, or prepare the source again"


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


def _array(data: bytes | memoryview, key: str, where: str) -> npt.NDArray[Any]:
    try:
        return npy_array(data)
    except ValueError as error:
        raise DataError(f"{where}: shard {key} is no .npy file ({error})") from None


def _check_size(size_bytes: int, entry: ShardEntry, where: str) -> None:
    if size_bytes != entry.bytes:
        what = "truncated" if size_bytes < entry.bytes else "larger than it was"
        raise DataError(
            f"{where}: shard {entry.tokens_key} is {what}: {size_bytes} bytes, the index names "
            f"{entry.bytes}; copy it there again, or prepare the source again"
        )


def _check_header(head: bytes, entry: ShardEntry, index: SourceIndex, where: str) -> None:
    if head[:HEADER_BYTES] == npy_head(dtype_named(index.dtype), entry.tokens):
        return
    try:
        dtype, shape, _ = npy_header(head)
    except ValueError as error:
        raise DataError(f"{where}: shard {entry.tokens_key} is no .npy file ({error})") from None
    _check_kind(dtype, shape, entry, index, where)


def _check_kind(
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    entry: ShardEntry,
    index: SourceIndex,
    where: str,
) -> None:
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
