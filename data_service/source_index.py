"""A source's `index.json`: what its shards are, and how they were tokenized and split.

It is written last, so a source that has one is whole. The source's fingerprint is the sha256 of
its canonical JSON: a source with the same fingerprint has the same tokens.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from data_service.shard_format import dtype_named
from data_service.validation_split import ValidationStamp
from storage.canonical import canonical_json, sha256_hex
from storage.errors import DataError

INDEX_KEY = "index.json"
FORMAT = "rangeflow-source-1"
SPLITS = ("train", "validation")

Value = TypeVar("Value")

SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One shard: its objects are `<name>.npy` (tokens) and `<name>.ends.npy` (document ends)."""

    name: str
    tokens: int
    bytes: int
    sha256: str
    documents: int
    ends_bytes: int
    ends_sha256: str

    @property
    def tokens_key(self) -> str:
        return f"{self.name}.npy"

    @property
    def ends_key(self) -> str:
        return f"{self.name}.ends.npy"

    def to_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ENTRY_FIELDS}


ENTRY_FIELDS: dict[str, type] = {
    "name": str,
    "tokens": int,
    "bytes": int,
    "sha256": str,
    "documents": int,
    "ends_bytes": int,
    "ends_sha256": str,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceIndex:
    tokenizer: Mapping[str, object]
    tokenizer_fingerprint: str
    dtype: str
    train: tuple[ShardEntry, ...]
    validation: tuple[ShardEntry, ...]
    stamp: ValidationStamp

    def shards(self, split: str) -> tuple[ShardEntry, ...]:
        return {"train": self.train, "validation": self.validation}[split]

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
                "splits": {s: [entry.to_json() for entry in self.shards(s)] for s in SPLITS},
                "validation": self.stamp.to_json(),
            }
        )


def parse_index(data: bytes, *, where: str) -> SourceIndex:
    """The index in `data`; DataError naming `where` and the field that is wrong."""
    try:
        value = json.loads(data)
    except ValueError as error:
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
    splits = _field(value, "splits", dict, where)
    dtype = _field(value, "dtype", str, where)
    try:
        dtype_named(dtype)
    except ValueError:
        raise DataError(f"{where}: dtype must be uint16 or uint32, found {dtype!r}") from None
    entries = {split: _entries(_field(splits, split, list, where), where) for split in SPLITS}
    names = [entry.name for split in SPLITS for entry in entries[split]]
    if len(set(names)) != len(names):
        raise DataError(f"{where}: {INDEX_KEY} names a shard twice")
    return SourceIndex(
        tokenizer=_field(value, "tokenizer", dict, where),
        tokenizer_fingerprint=_field(value, "tokenizer_fingerprint", str, where),
        dtype=dtype,
        train=entries["train"],
        validation=entries["validation"],
        stamp=ValidationStamp.from_json(value["validation"], where=where),
    )


def check_shard_name(name: str, *, where: str) -> None:
    """Refuse a name that could reach outside the source once it is made a key."""
    if not SHARD_NAME.fullmatch(name) or ".." in name or name.startswith("."):
        raise DataError(
            f"{where}: a shard's name must be letters, digits, '.', '_' and '-' only, "
            f"without '..'; found {name!r}"
        )


def entry_from_json(value: object, *, where: str) -> ShardEntry:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a shard must be an object, found {type(value).__name__}")
    fields: dict[str, Any] = {
        name: _field(value, name, kind, where) for name, kind in ENTRY_FIELDS.items()
    }
    check_shard_name(fields["name"], where=where)
    return ShardEntry(**fields)


def _entries(values: list[object], where: str) -> tuple[ShardEntry, ...]:
    return tuple(entry_from_json(value, where=where) for value in values)


def _field(mapping: dict[str, object], name: str, kind: type[Value], where: str) -> Value:
    found = mapping.get(name)
    if not isinstance(found, kind) or isinstance(found, bool):
        raise DataError(
            f"{where}: {INDEX_KEY} must give {name!r} as {kind.__name__}, found {found!r:.80}"
        )
    if isinstance(found, int) and found < 0:
        raise DataError(f"{where}: {INDEX_KEY} must give {name!r} of at least 0, found {found}")
    return found
