"""A source's `index.json`: what its shards are, and how they were tokenized and split.

It is small, whatever the source: each split's shards are in a table beside it, named by content,
whose sha256 it gives. It is written last, so a source that has one is whole. The source's
fingerprint is the sha256 of its canonical JSON: a source with the same fingerprint has the same
tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from data_service.shard_format import dtype_named
from data_service.shard_table import (
    ENTRY_FIELDS,
    ShardEntry,
    ShardTable,
    check_apart,
    check_shard_name,
)
from data_service.validation_split import ValidationStamp
from storage.canonical import canonical_json, sha256_hex
from storage.errors import DataError, IntegrityError
from storage.store import Store

__all__ = [
    "INDEX_KEY",
    "SPLITS",
    "ShardEntry",
    "SourceIndex",
    "check_shard_name",
    "entry_from_json",
    "read_index",
    "write_index",
]

INDEX_KEY = "index.json"
FORMAT = "rangeflow-source-2"
SPLITS = ("train", "validation")

_LONGEST_NAME = 200
"""A file's name has at most 255 bytes on common systems, and ours get `.mask.npy`."""

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceIndex:
    """What a source holds. `train` and `validation` may be given as any sequence, in any order;
    they are kept as tables."""

    tokenizer: Mapping[str, object]
    tokenizer_fingerprint: str
    dtype: str
    train: Sequence[ShardEntry]
    validation: Sequence[ShardEntry]
    stamp: ValidationStamp

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", ShardTable.of(self.train))
        object.__setattr__(self, "validation", ShardTable.of(self.validation))
        check_apart(self.shards("train"), self.shards("validation"), where="the index")

    def shards(self, split: str) -> ShardTable:
        """The shards of "train" or "validation", sorted by name."""
        table = {"train": self.train, "validation": self.validation}[split]
        assert isinstance(table, ShardTable)
        return table

    @property
    def fingerprint(self) -> str:
        return sha256_hex(self.to_bytes())

    def to_bytes(self) -> bytes:
        return canonical_json(
            {
                "format": FORMAT,
                "tokenizer": dict(self.tokenizer),
                "tokenizer_fingerprint": self.tokenizer_fingerprint,
                "dtype": self.dtype,
                "splits": {split: _table_json(self.shards(split)) for split in SPLITS},
                "validation": self.stamp.to_json(),
            }
        )


def write_index(store: Store, index: SourceIndex) -> None:
    """Write the tables, and then `index.json`: with it the source is whole."""
    for split in SPLITS:
        table = index.shards(split)
        if len(table):
            store.put(_table_key(split, table.digest), table.to_bytes())
    store.put(INDEX_KEY, index.to_bytes())


def read_index(store: Store, *, where: str) -> SourceIndex:
    """The index in the store, its tables verified; tables in local files are mapped, not read.

    Raises FileNotFoundError when there is no `index.json`, and DataError naming `where` and the
    field that is wrong.
    """
    value = _parsed(store.get(INDEX_KEY), where)
    splits = _field(value, "splits", dict, where)
    dtype = _field(value, "dtype", str, where)
    try:
        dtype_named(dtype)
    except ValueError:
        raise DataError(f"{where}: dtype must be uint16 or uint32, found {dtype!r}") from None
    tables = {split: _field(splits, split, dict, where) for split in SPLITS}
    return SourceIndex(
        tokenizer=_field(value, "tokenizer", dict, where),
        tokenizer_fingerprint=_field(value, "tokenizer_fingerprint", str, where),
        dtype=dtype,
        train=_read_table(store, "train", tables["train"], where),
        validation=_read_table(store, "validation", tables["validation"], where),
        stamp=ValidationStamp.from_json(value["validation"], where=where),
    )


def entry_from_json(value: object, *, where: str) -> ShardEntry:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a shard must be an object, found {type(value).__name__}")
    fields: dict[str, Any] = {
        name: _field(value, name, kind, where) for name, kind in ENTRY_FIELDS.items()
    }
    check_shard_name(fields["name"], where=where)
    return ShardEntry(**fields)


def _parsed(data: bytes, where: str) -> dict[str, object]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {INDEX_KEY} is not JSON ({error}); prepare it again") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise DataError(
            f"{where}: {INDEX_KEY} must say format {FORMAT!r}, found {found!r}; "
            "prepare the source with this version"
        )
    if "validation" not in value:
        raise DataError(
            f"{where}: {INDEX_KEY} has no validation stamp, so nobody knows whether text held out "
            "elsewhere is in it; prepare the source with `python -m data_service.prepare`"
        )
    return value


def _table_json(table: ShardTable) -> dict[str, object]:
    return {"shards": len(table), "name_bytes": table.name_bytes, "sha256": table.digest}


def _table_key(split: str, digest: str) -> str:
    return f"{split}-{digest[:16]}.table"


def _read_table(store: Store, split: str, about: dict[str, object], where: str) -> ShardTable:
    rows = _field(about, "shards", int, where)
    name_bytes = _field(about, "name_bytes", int, where)
    digest = _field(about, "sha256", str, where)
    if not 1 <= name_bytes <= _LONGEST_NAME:
        raise DataError(
            f"{where}: {INDEX_KEY} must give 'name_bytes' from 1 to {_LONGEST_NAME}, "
            f"found {name_bytes}"
        )
    if rows == 0:
        return ShardTable.of(())
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise DataError(f"{where}: {INDEX_KEY} must give a table's 'sha256', found {digest!r:.80}")
    key = _table_key(split, digest)
    path = store.local_path(key)
    try:
        data = store.get(key) if path is None else np.memmap(path, dtype=np.uint8, mode="r").data
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        missing = isinstance(error, FileNotFoundError)
        raise DataError(
            f"{where}: the table {key} {'is missing' if missing else f'cannot be read ({error})'}; "
            "copy it there again, or prepare the source again"
        ) from None
    found = sha256_hex(data)
    if found != digest:
        raise IntegrityError(
            f"{where}: the table {key} has sha256 {found[:12]}, the index names {digest[:12]}: its "
            "bytes have changed; copy it there again"
        )
    table = ShardTable.from_bytes(data, rows=rows, name_bytes=name_bytes, where=f"{where}: {key}")
    table.digest = digest  # known: a second hash of a million rows would double a start
    return table


def _field(mapping: dict[str, object], name: str, kind: type[Value], where: str) -> Value:
    found = mapping.get(name)
    if not isinstance(found, kind) or isinstance(found, bool):
        raise DataError(
            f"{where}: {INDEX_KEY} must give {name!r} as {kind.__name__}, found {found!r:.80}"
        )
    if isinstance(found, int) and found < 0:
        raise DataError(f"{where}: {INDEX_KEY} must give {name!r} of at least 0, found {found}")
    return found
