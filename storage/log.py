"""The run's log: totally ordered, append-only records whose meaning this module does not know.

Record n is the object `log/<n>.json`, created once. Each carries its own sha256 and that of the
record before it, so that a damaged, missing or exchanged record is seen and left out. Two writers
cannot both create slot n: the loser reads what is there and decides anew.

Covers: order, lost responses (a writer knows its record by its nonce), damage, torn records.
Does not cover: who may append what; that is decided by the caller, at every attempt.
"""

import json
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from storage.canonical import canonical_json, sha256_hex
from storage.errors import StoreUnavailableError
from storage.store import Store

logger = logging.getLogger(__name__)

TORN_SECONDS = 30.0
"""How long an invalid last record must stay unchanged, where creation is not atomic, to be void."""

_ATTEMPTS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """What a writer wants to append. Generation 0 is an operator's."""

    kind: str
    generation: int
    body: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record as it stands in the log. `highest_generation` is what its writer had read."""

    index: int
    kind: str
    generation: int
    highest_generation: int
    nonce: str
    previous: str
    voids: tuple[int, ...]
    written_at: float
    body: dict[str, Any]
    sha256: str = field(default="")


Decide = Callable[[Sequence[Record]], Draft | None]


class Log:
    """A reader and writer of one run's log. Not for use by two threads at once."""

    def __init__(
        self,
        store: Store,
        *,
        wall_clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._wall_clock = wall_clock
        self._sleep = sleep
        self.records: list[Record] = []
        self.damaged: list[int] = []
        self._next = 1
        self._opened = False

    @property
    def highest_generation(self) -> int:
        """The highest generation any readable record knows of, also when its CLAIM is damaged."""
        return max((max(r.generation, r.highest_generation) for r in self.records), default=0)

    def refresh(self) -> Sequence[Record]:
        """Read what has been appended since; returns all valid records, oldest first."""
        if not self._opened:
            keys = self._store.list("log/")
            last = max((_index_of(key) for key in keys), default=0)
            while self._next <= last:
                self._take(self._next, self._read(self._next))
            self._opened = True
        while (data := self._read(self._next)) is not None:
            self._take(self._next, data)
        return self.records

    def append(self, decide: Decide) -> Record | None:
        """Append what `decide` drafts from the records so far; None when it drafts nothing.

        `decide` is called again whenever another writer was faster, and may raise to stop.
        Returns after the record is durable and cannot be voided.
        """
        for _ in range(_ATTEMPTS):
            self.refresh()
            draft = decide(self.records)
            if draft is None:
                return None
            self._wait_for_torn_record()
            record = self._complete(draft)
            index = record.index
            try:
                self._store.put_if_absent(_key(index), _encode(record))
            except StoreUnavailableError:
                if not self.holds(record):  # the response was lost, or the request was
                    raise
            self.refresh()
            if self.holds(record) and not any(index in r.voids for r in self.records):
                return record
            logger.info("log record %d went to another writer; deciding anew", index)
        raise StoreUnavailableError(f"{self._store.url}: lost {_ATTEMPTS} races for the log's tail")

    def holds(self, record: Record) -> bool:
        """Whether the record is still in its slot, byte for byte."""
        data = self._read(record.index)
        return data is not None and data == _encode(record)

    def _complete(self, draft: Draft) -> Record:
        last = self.records[-1].index if self.records else 0
        claimed = draft.generation if draft.kind == "CLAIM" else 0
        record = Record(
            index=self._next,
            kind=draft.kind,
            generation=draft.generation,
            highest_generation=max(self.highest_generation, claimed),
            nonce=uuid.uuid4().hex,
            previous=self.records[-1].sha256 if self.records else "",
            voids=tuple(range(last + 1, self._next)),
            written_at=self._wall_clock(),
            body=draft.body,
        )
        content = asdict(record)
        del content["sha256"]
        return Record(**{**content, "voids": record.voids, "sha256": _digest(content)})

    def _read(self, index: int) -> bytes | None:
        try:
            return self._store.get(_key(index))
        except FileNotFoundError:
            return None

    def _take(self, index: int, data: bytes | None) -> None:
        """Judge slot `index` and move on to the next."""
        record = _decode(data, index)
        kept = [r for r in self.records if record is None or r.index not in record.voids]
        after_damage = bool(self.damaged) and self.damaged[-1] == index - 1
        expected = kept[-1].sha256 if kept else ""
        if record is None or (record.previous != expected and not after_damage):
            what = "is missing" if data is None else "is damaged"
            logger.warning("log record %d of %s %s and is left out", index, self._store.url, what)
            self.damaged.append(index)
        else:
            kept.append(record)
            self.records = kept
        self._next = index + 1

    def _wait_for_torn_record(self) -> None:
        """Where creation is not atomic, give the writer of an invalid last record time to end."""
        if self._store.creates_atomically or not self.damaged or self.damaged[-1] != self._next - 1:
            return
        index = self.damaged[-1]
        before = self._read(index)
        self._sleep(TORN_SECONDS)
        if self._read(index) == before:
            return
        self.damaged.pop()
        self._next = index
        self.refresh()


def _key(index: int) -> str:
    return f"log/{index:010d}.json"


def _index_of(key: str) -> int:
    name = key.removeprefix("log/").removesuffix(".json")
    return int(name) if name.isdigit() and key == _key(int(name)) else 0


def _digest(content: dict[str, Any]) -> str:
    return sha256_hex(canonical_json(content))


def _encode(record: Record) -> bytes:
    return canonical_json(asdict(record))


def _decode(data: bytes | None, index: int) -> Record | None:
    """The record in slot `index`, or None when these bytes are not one."""
    if data is None:
        return None
    try:
        content = json.loads(data)
        sha256 = content.pop("sha256")
        if _digest(content) != sha256 or content["index"] != index:
            return None
        return Record(**{**content, "voids": tuple(content["voids"]), "sha256": sha256})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
