"""Turning documents into a source: tokens in shards, held-out text apart, the index last.

The work is cut into units, each of which gives its own shards, and a ledger says which are done:
kill it at any instant and run it again, and the objects are bit for bit those of an uninterrupted
run.
"""

import itertools
import logging
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from data_service.inputs import Corpus, Part
from data_service.ledger import Ledger
from data_service.shard_format import ENDS_DTYPE, dtype_for, npy_bytes
from data_service.source_index import (
    INDEX_KEY,
    SPLITS,
    ShardEntry,
    SourceIndex,
    entry_from_json,
    parse_index,
)
from data_service.tokenizer import Tokenizer
from data_service.validation_split import ValidationStamp, split_document
from storage.canonical import sha256_hex
from storage.errors import ConfigurationError, DataError
from storage.store import Store

logger = logging.getLogger(__name__)

SHARD_TOKENS = 10_000_000
VALIDATION_PERMILLE = 10

# Below what English gives (4.2 to 4.6 for GPT-2), so that a unit mostly fits one shard.
_BYTES_PER_TOKEN = {"gpt2": 4.0}
_WINDOWS_TO_WARN = 10 * 1024

Announce = Callable[[str], None]
Advance = Callable[[int, int], None]
"""Called after each unit with the input bytes and the tokens it gave; a unit found done gives 0
tokens."""


def prepare(
    corpus: Corpus,
    store: Store,
    tokenizer: Tokenizer,
    *,
    shard_tokens: int = SHARD_TOKENS,
    validation_permille: int = VALIDATION_PERMILLE,
    announce: Announce = lambda phase: None,
    advance: Advance = lambda size_bytes, tokens: None,
) -> SourceIndex:
    """Make the store a source of the corpus; a finished one is left as it is.

    `announce` hears "prepare:ledger", "prepare:shard" before and "prepare:unit" after a unit's
    objects, "prepare:unit-done", "prepare:index" before and "prepare:done" after the index. Raises
    DataError for text it cannot take, BindingError when the store holds another preparation.
    """
    if shard_tokens < 1:
        raise ConfigurationError(f"shard_tokens must be at least 1, got {shard_tokens}")
    stamp = ValidationStamp(permille=validation_permille)
    if not store.list("ledger/") and store.list(""):
        raise ConfigurationError(
            f"{store.url} is not empty and holds no preparation to go on with; "
            "prepare into another --out"
        )
    ledger = Ledger(store, _binding(corpus, tokenizer, stamp, shard_tokens))
    announce("prepare:ledger")
    index = _finished_index(store)
    if index is not None and _are_there(store, [*index.train, *index.validation]):
        return index
    unit_bytes = max(1, int(0.9 * shard_tokens * _BYTES_PER_TOKEN.get(tokenizer.name, 1.0)))
    writer = _UnitWriter(store, tokenizer, stamp, shard_tokens, announce)
    shards: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
    for number, parts in enumerate(corpus.units(unit_bytes)):
        record = ledger.done(number)
        tokens = 0
        entries = {s: _entries(record[s], store.url) for s in SPLITS} if record else {}
        if not entries or not _are_there(store, [e for s in SPLITS for e in entries[s]]):
            entries = writer.write(number, corpus, parts)
            tokens = sum(entry.tokens for split in SPLITS for entry in entries[split])
            announce("prepare:unit")
            ledger.finish(number, {s: [e.to_json() for e in entries[s]] for s in SPLITS})
            announce("prepare:unit-done")
        for split in SPLITS:
            shards[split].extend(entries[split])
        advance(sum(part.hi - part.lo for part in parts), tokens)
    index = _checked(
        SourceIndex(
            tokenizer=tokenizer.spec(),
            tokenizer_fingerprint=tokenizer.fingerprint,
            dtype=dtype_for(tokenizer.vocab_size).name,
            train=tuple(shards["train"]),
            validation=tuple(shards["validation"]),
            stamp=stamp,
        ),
        store.url,
    )
    announce("prepare:index")
    store.put(INDEX_KEY, index.to_bytes())
    announce("prepare:done")
    return index


def _are_there(store: Store, entries: Sequence[ShardEntry]) -> bool:
    """Whether the objects of all shards are in the store, of the right sizes."""
    try:
        return all(
            store.stat(entry.tokens_key).size_bytes == entry.bytes
            and store.stat(entry.ends_key).size_bytes == entry.ends_bytes
            for entry in entries
        )
    except FileNotFoundError:
        return False


class _UnitWriter:
    """Writes the shards of one unit at a time."""

    def __init__(
        self,
        store: Store,
        tokenizer: Tokenizer,
        stamp: ValidationStamp,
        shard_tokens: int,
        announce: Announce,
    ) -> None:
        self._store = store
        self._tokenizer = tokenizer
        self._dtype = dtype_for(tokenizer.vocab_size)
        self._stamp = stamp
        self._shard_tokens = shard_tokens
        self._announce = announce

    def write(
        self, unit: int, corpus: Corpus, parts: Sequence[Part]
    ) -> dict[str, list[ShardEntry]]:
        documents: dict[str, list[npt.NDArray[np.generic]]] = {split: [] for split in SPLITS}
        for part in parts:
            for text in corpus.documents(part):
                for split, piece in split_document(text, self._stamp):
                    documents[split].append(self._encoded(piece))
        return {split: self._write_split(unit, split, documents[split]) for split in SPLITS}

    def _encoded(self, text: str) -> npt.NDArray[np.generic]:
        ids = np.append(self._tokenizer.encode(text), self._tokenizer.end_of_text)
        return ids.astype(self._dtype)

    def _write_split(
        self, unit: int, split: str, documents: Sequence[npt.NDArray[np.generic]]
    ) -> list[ShardEntry]:
        if not documents:
            return []
        tokens = np.concatenate(documents)
        ends = np.cumsum([document.size for document in documents])
        shards = -(-tokens.size // self._shard_tokens)
        cuts = [number * tokens.size // shards for number in range(shards + 1)]
        return [
            self._write_shard(
                f"{split}-{unit:05d}-{number}",
                tokens[lo:hi],
                ends[(ends > lo) & (ends <= hi)] - lo,
            )
            for number, (lo, hi) in enumerate(itertools.pairwise(cuts))
        ]

    def _write_shard(
        self, name: str, tokens: npt.NDArray[np.generic], ends: npt.NDArray[np.int64]
    ) -> ShardEntry:
        self._announce("prepare:shard")
        data, ends_data = npy_bytes(tokens), npy_bytes(ends.astype(ENDS_DTYPE))
        entry = ShardEntry(
            name=name,
            tokens=tokens.size,
            bytes=len(data),
            sha256=sha256_hex(data),
            documents=ends.size,
            ends_bytes=len(ends_data),
            ends_sha256=sha256_hex(ends_data),
        )
        self._store.put(entry.tokens_key, data)
        self._store.put(entry.ends_key, ends_data)
        return entry


def _binding(
    corpus: Corpus, tokenizer: Tokenizer, stamp: ValidationStamp, shard_tokens: int
) -> dict[str, object]:
    return {
        "inputs": [item.to_json() for item in corpus.inputs],
        "settings": {
            "tokenizer": tokenizer.name,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "shard_tokens": shard_tokens,
            "validation_permille": stamp.permille,
            "validation_rule": stamp.rule,
        },
    }


def _finished_index(store: Store) -> SourceIndex | None:
    try:
        return parse_index(store.get(INDEX_KEY), where=store.url)
    except FileNotFoundError:
        return None


def _entries(values: object, where: str) -> list[ShardEntry]:
    if not isinstance(values, list):
        raise DataError(f"{where}: a unit of the ledger is damaged; delete {where} and start again")
    return [entry_from_json(value, where=where) for value in values]


def _checked(index: SourceIndex, where: str) -> SourceIndex:
    if not sum(entry.tokens for entry in index.train):
        raise DataError(f"{where}: the inputs hold no text to train on; name other inputs")
    held_out = sum(entry.tokens for entry in index.validation)
    if held_out < _WINDOWS_TO_WARN:
        logger.warning(
            "%s: only %d tokens are held out for validation, and training needs ten windows of "
            "the context; a larger --validation_permille (now %d) or more text gives more",
            where,
            held_out,
            index.stamp.permille,
        )
    return index
