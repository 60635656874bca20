"""The shards of one split as columns, so that a million of them are opened, checked and found fast.

The object is the columns of `_COLUMNS` one after the other, little-endian, a row for each shard,
rows sorted by name; rows and the width of names are in `index.json`, and its sha256 as well.
`name_key` is the first 64 bits of the name's sha256: the order of an epoch is decided by it, and
it is stored because a million names take a second to hash.

Covers: names that could leave the source, names twice, sizes below zero are refused, all at once.
Does not cover: a `name_key` that is not its name's; it would give another order, under another
fingerprint.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from storage.canonical import sha256_hex
from storage.errors import DataError

SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Column = npt.NDArray[Any]

_COLUMNS: dict[str, str] = {
    "name_key": "<u8",
    "tokens": "<i8",
    "bytes": "<i8",
    "documents": "<i8",
    "ends_bytes": "<i8",
    "mask_bytes": "<i8",
    "sha256": "V32",
    "ends_sha256": "V32",
    "mask_sha256": "V32",
}
"""All but the last, `name`, whose width differs between tables."""

_SIZES = ("tokens", "bytes", "documents", "ends_bytes", "mask_bytes")
_DIGESTS = ("sha256", "ends_sha256", "mask_sha256")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One shard: `<name>.npy` (tokens), `<name>.ends.npy` (document ends), and maybe a mask.

    `<name>.mask.npy` has one bit per token, 1 where the model is trained to predict it; without
    it (`mask_bytes` is 0) every token is.
    """

    name: str
    tokens: int
    bytes: int
    sha256: str
    documents: int
    ends_bytes: int
    ends_sha256: str
    mask_bytes: int = 0
    mask_sha256: str = ""

    @property
    def tokens_key(self) -> str:
        return f"{self.name}.npy"

    @property
    def ends_key(self) -> str:
        return f"{self.name}.ends.npy"

    @property
    def mask_key(self) -> str:
        return f"{self.name}.mask.npy"

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
    "mask_bytes": int,
    "mask_sha256": str,
}


class ShardTable(Sequence[ShardEntry]):
    """The shards of a split, sorted by name. Columns are numpy arrays, one value a row."""

    def __init__(self, columns: Mapping[str, Column], *, where: str) -> None:
        """`columns` has `name` and all of `_COLUMNS`; DataError naming `where` for a bad one."""
        self.names: npt.NDArray[np.bytes_] = columns["name"]
        self.name_keys: npt.NDArray[np.uint64] = columns["name_key"]
        self.tokens: npt.NDArray[np.int64] = columns["tokens"]
        self.shard_bytes: npt.NDArray[np.int64] = columns["bytes"]
        self.mask_bytes: npt.NDArray[np.int64] = columns["mask_bytes"]
        self.sha256s: npt.NDArray[np.void] = columns["sha256"]
        self._columns = dict(columns)
        _check_names(self.names, where)
        for name in _SIZES:
            column = columns[name]
            if len(column) and int(column.min()) < 0:
                row = int(column.argmin())
                raise DataError(
                    f"{where}: shard {self.name(row)} must have {name!r} of at least 0, found "
                    f"{int(column[row])}"
                )

    @staticmethod
    def of(entries: Iterable[ShardEntry]) -> "ShardTable":
        """The table of these shards, given in any order."""
        if isinstance(entries, ShardTable):
            return entries
        rows = sorted(entries, key=lambda entry: entry.name)
        for entry in rows:
            check_shard_name(entry.name, where="the index")
        width = max((len(entry.name) for entry in rows), default=1)
        columns: dict[str, Column] = {
            "name": np.array([entry.name.encode() for entry in rows], dtype=f"S{width}"),
            "name_key": np.array([name_key(entry.name) for entry in rows], dtype="<u8"),
        }
        for name in _SIZES:
            columns[name] = np.array([getattr(entry, name) for entry in rows], dtype="<i8")
        for name in _DIGESTS:
            digests = b"".join(_digest(entry, name) for entry in rows)
            columns[name] = np.frombuffer(digests, dtype="V32")
        return ShardTable(columns, where="the index")

    @staticmethod
    def from_bytes(
        data: bytes | memoryview, *, rows: int, name_bytes: int, where: str
    ) -> "ShardTable":
        """The table in `data`, which is kept, not copied, and whose sha256 the caller knows."""
        kinds = {name: np.dtype(kind) for name, kind in _kinds(name_bytes).items()}
        expected = rows * sum(kind.itemsize for kind in kinds.values())
        if len(data) != expected:
            raise DataError(
                f"{where}: a table of {rows} shards with names of {name_bytes} bytes has "
                f"{expected} bytes, found {len(data)}; copy it there again"
            )
        columns: dict[str, Column] = {}
        offset = 0
        for name, kind in kinds.items():
            columns[name] = np.frombuffer(data, dtype=kind, count=rows, offset=offset)
            offset += rows * kind.itemsize
        return ShardTable(columns, where=where)

    def to_bytes(self) -> bytes:
        return b"".join(self._columns[name].tobytes() for name in _kinds(self.name_bytes))

    @property
    def name_bytes(self) -> int:
        """The width of the column of names."""
        return self.names.dtype.itemsize

    @cached_property
    def digest(self) -> str:
        """The sha256 of `to_bytes()`."""
        return sha256_hex(self.to_bytes())

    def name(self, row: int) -> str:
        return bytes(self.names[row]).decode("ascii")

    @cached_property
    def all_bytes(self) -> npt.NDArray[np.int64]:
        """What each shard takes: its tokens, and its loss mask if it has one."""
        return self.shard_bytes + self.mask_bytes

    def row(self, name: str) -> int | None:
        """The row of a shard, or None if there is none of that name."""
        wanted = name.encode()
        if len(wanted) > self.name_bytes:
            return None
        row = int(np.searchsorted(self.names, np.array(wanted, dtype=self.names.dtype)))
        return row if row < len(self) and bytes(self.names[row]) == wanted else None

    def rows_of(self, sha256s: Collection[str]) -> Iterator[tuple[str, int]]:
        """The rows of the shards that have one of these digests, of their tokens or their mask."""
        wanted = [int.from_bytes(bytes.fromhex(digest)[:8], "little") for digest in sha256s]
        for name, there in (("sha256", self.shard_bytes), ("mask_sha256", self.mask_bytes)):
            column = self._columns[name]
            first = np.frombuffer(column.tobytes(), dtype="<u8")[::4]
            alike = np.isin(first, np.array(wanted, dtype=np.uint64)) & (there > 0)
            for row in np.flatnonzero(alike).tolist():
                found = column[row].tobytes().hex()
                if found in sha256s:
                    yield found, row

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, row: int) -> ShardEntry: ...

    @overload
    def __getitem__(self, row: slice) -> Sequence[ShardEntry]: ...

    def __getitem__(self, row: int | slice) -> ShardEntry | Sequence[ShardEntry]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        columns = self._columns
        sizes = {name: int(columns[name][row]) for name in _SIZES}
        digests = {name: columns[name][row].tobytes().hex() for name in _DIGESTS}
        if not sizes["mask_bytes"]:
            digests["mask_sha256"] = ""
        return ShardEntry(name=self.name(row), **sizes, **digests)  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardTable) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def name_key(name: str) -> int:
    """The first 64 bits of the name's sha256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def check_shard_name(name: str, *, where: str) -> None:
    """Refuse a name that could reach outside the source once it is made a key."""
    if not SHARD_NAME.fullmatch(name) or ".." in name or name.startswith("."):
        raise DataError(
            f"{where}: a shard's name must be letters, digits, '.', '_' and '-' only, "
            f"without '..'; found {name!r}"
        )


def check_apart(one: ShardTable, other: ShardTable, *, where: str) -> None:
    """Refuse two splits that both name a shard."""
    few, many = sorted((one.names, other.names), key=len)
    if not len(few) or few[-1] < many[0] or many[-1] < few[0]:
        return
    at = np.minimum(np.searchsorted(many, few), len(many) - 1)
    if (many[at] == few).any():
        twice = bytes(few[np.argmax(many[at] == few)]).decode("ascii")
        raise DataError(f"{where}: shard {twice!r} is in train and in validation")


def _check_names(names: npt.NDArray[np.bytes_], where: str) -> None:
    """`check_shard_name` for a whole column, and that it ascends."""
    if not len(names):
        return
    width = names.dtype.itemsize
    letters = np.ascontiguousarray(names).view(np.uint8)  # all names in one line: few, long steps
    dots, zeros = letters == ord("."), letters == 0  # zeros fill up a shorter name
    bad = ~(dots | zeros | (letters == ord("-")) | (letters == ord("_")))
    bad &= letters - np.uint8(ord("0")) >= 10
    bad &= (letters | np.uint8(0x20)) - np.uint8(ord("a")) >= 26
    bad[1:] |= dots[:-1] & dots[1:]
    bad[::width] |= dots[::width] | zeros[::width]
    within = zeros[:-1] & ~zeros[1:]
    within[width - 1 :: width] = False  # the next name begins
    bad[1:] |= within
    if bad.any():
        row = int(np.argmax(bad)) // width
        name = letters[row * width : (row + 1) * width].tobytes().rstrip(b"\0")
        check_shard_name(name.decode("latin-1"), where=where)
        raise DataError(f"{where}: a shard's name has a zero byte in it; prepare the source again")
    ascends = names[:-1] < names[1:]
    if not ascends.all():
        row = int(np.argmin(ascends))
        if names[row] == names[row + 1]:
            raise DataError(f"{where}: shard {bytes(names[row]).decode()!r} is named twice")
        raise DataError(
            f"{where}: the table's names must ascend, found {bytes(names[row + 1]).decode()!r} "
            f"after {bytes(names[row]).decode()!r}; prepare the source again"
        )


def _kinds(name_bytes: int) -> dict[str, str]:
    return {**_COLUMNS, "name": f"S{name_bytes}"}


def _digest(entry: ShardEntry, name: str) -> bytes:
    """The 32 bytes of a digest; zeros for that of a mask that is not there."""
    digits = getattr(entry, name)
    if name == "mask_sha256" and not entry.mask_bytes and not digits:
        return bytes(32)
    if not _SHA256.fullmatch(digits):
        raise DataError(
            f"the index: shard {entry.name} must have {name!r} of 64 hexadecimal digits, "
            f"found {digits!r:.80}"
        )
    return bytes.fromhex(digits)
