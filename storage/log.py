"""The run's log: totally ordered, append-only records whose meaning this module does not know.

Record n is the object `log/<n>.json`, created once. Each carries its own sha256 and that of the
record before it, so that a damaged, missing or exchanged record is seen and left out. Two writers
cannot both create slot n: the loser reads what is there and decides anew.

A replay may begin at a record of kind BASE, whose body restates all before it; records are never
deleted. What a BASE restates is its writer's affair; this module adds the damaged slots.

Covers: order, lost responses (a writer knows its record by its nonce), damage, torn records.
Does not cover: who may append what; that is decided by the caller, at every attempt.
"""

import json
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from storage.canonical import canonical_json, sha256_hex
from storage.errors import StoreUnavailableError
from storage.store import Store

logger = logging.getLogger(__name__)

TORN_SECONDS = 30.0
"""How long an invalid last record must stay unchanged, where creation is not atomic, to be void."""

_ATTEMPTS = 1000
_READERS = 8
_WINDOW = 128
"""Records read at once on the way back to a BASE; an owner appends one every 100 or so."""
_PAGE = 1000
"""Keys that an object store lists in one request (GCS, S3)."""


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


def record_from_json(content: dict[str, Any]) -> Record:
    """The record whose fields are `content`, after a passage through JSON; nothing is checked."""
    return Record(**{**content, "voids": tuple(content["voids"])})


_VOID = Draft(kind="VOID", generation=0, body={})
"""Says nothing but which slots before it are void."""

Decide = Callable[[Sequence[Record]], Draft | None]


def begins_replay(record: Record) -> bool:
    """Whether a replay may begin here: a BASE of the highest generation that its writer had read.

    That its writer had read everything before is shown by the chain of sha256.
    """
    is_owners = 1 <= record.generation == record.highest_generation
    return record.kind == "BASE" and is_owners


class Log:
    """A reader and writer of one run's log. Not for use by two threads at once.

    `records` begins at the newest BASE, and what lies before it is neither read nor kept in
    memory; with `whole`, it is all records. The list grows, and is exchanged for another when
    records leave it, so that one who iterates over it is not disturbed.
    """

    def __init__(
        self,
        store: Store,
        *,
        whole: bool = False,
        wall_clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._whole = whole
        self._wall_clock = wall_clock
        self._sleep = sleep
        self._opened = False
        self._warned: set[int] = set()
        self._missing: set[int] = set()
        self._begin(None)

    def _begin(self, base: Record | None) -> None:
        """Know only what a BASE says, or nothing."""
        self.records: list[Record] = [base] if base else []
        self.damaged: list[int] = _damaged_before(base) if base else []
        self._slots: dict[int, Record | None] = {}
        self._start = base.index if base else 0
        self._next = self._start + 1
        self._highest = base.highest_generation if base else 0
        self._voided: set[int] = set()
        self._base_taken = False

    @property
    def highest_generation(self) -> int:
        """The highest generation any readable record knows of, also when its CLAIM is damaged."""
        return self._highest

    def refresh(self) -> Sequence[Record]:
        """Read what has been appended since; returns the valid records, oldest first."""
        while True:
            if not self._opened:
                self._open()
            data = self._read(self._next)
            if data is None:
                break
            self._take(self._next, data)
        if self._base_taken and not self._whole:
            self._forget_before_base()
        return self.records

    def append(self, decide: Decide) -> Record | None:
        """Append what `decide` drafts from the records so far; None when it drafts nothing.

        `decide` is called again whenever another writer was faster, and may raise to stop.
        Returns after the record is durable and cannot be voided.
        """
        for _ in range(_ATTEMPTS):
            self.refresh()
            self._wait_for_torn()
            draft = decide(self.records)
            if draft is None:
                return None
            record = self._complete(draft)
            index = record.index
            try:
                self._store.put_if_absent(record_key(index), _encode(record))
            except StoreUnavailableError:
                if not self.holds(record):  # the response was lost, or the request was
                    raise
            self.refresh()
            if self.holds(record):
                self._settle_behind(index)
                if index not in self._voided:
                    return record
            logger.info("log record %d went to another writer; deciding anew", index)
        raise StoreUnavailableError(f"{self._store.url}: lost {_ATTEMPTS} races for the log's tail")

    def _settle_behind(self, index: int) -> None:
        """Void what is torn behind slot `index`: completed later, it might void that slot."""
        if self._torn(index):
            self._wait_for_torn(index)
            self.append(lambda _: _VOID if self._torn(index) else None)

    def holds(self, record: Record) -> bool:
        """Whether the record is still in its slot, byte for byte."""
        data = self._read(record.index)
        return data is not None and data == _encode(record)

    def _complete(self, draft: Draft) -> Record:
        last = self.records[-1].index if self.records else 0
        claimed = draft.generation if draft.kind == "CLAIM" else 0
        restated = {"damaged": list(self.damaged)} if draft.kind == "BASE" else {}
        record = Record(
            index=self._next,
            kind=draft.kind,
            generation=draft.generation,
            highest_generation=max(self.highest_generation, claimed),
            nonce=uuid.uuid4().hex,
            previous=self.records[-1].sha256 if self.records else "",
            voids=tuple(range(last + 1, self._next)),
            written_at=self._wall_clock(),
            body={**draft.body, **restated},
        )
        content = asdict(record)
        del content["sha256"]
        return record_from_json({**content, "sha256": _digest(content)})

    def _open(self) -> None:
        """Read from the newest BASE that holds, or from the beginning, to the tail."""
        with ThreadPoolExecutor(_READERS) as pool:
            last = self._last_slot(pool)
            base, slots = self._read_back(pool, last)
        self._begin(base)
        self._opened = True
        self._missing = {i for i, data in slots.items() if data is None}
        self._slots = {i: _decode(slots[i], i) for i in range(self._next, last + 1)}
        self._next = last + 1
        self._judge_all()

    def _last_slot(self, pool: Executor) -> int:
        """The highest slot that holds anything.

        Galloping finds some slot near the tail, and a listing from there finds the tail: galloping
        alone would take a missing record for it. One that ends a gallop too early makes the listing
        longer, and the listing sees what lies behind. Object stores need 4 rounds of requests for
        200,000 records, in place of 200 pages one after another; a folder is listed whole all the
        same (measured, 202,000 files: listing 1.5 s, galloping 1 ms).
        """
        low = high = 0
        probes = [_PAGE * 8**power for power in range(8)] if self._exists(_PAGE) else []
        while probes:
            there = zip(probes, pool.map(self._exists, probes), strict=True)
            low = max([low, *(probe for probe, exists in there if exists)])
            high = min((probe for probe in [high, *probes] if probe > low), default=low)
            stride = (high - low) // (_READERS + 1)
            far = high - low > _PAGE
            probes = [low + stride * n for n in range(1, _READERS + 1)] if far else []
        keys = self._store.list("log/", start_after=record_key(low) if low else "")
        return max([low, *(_index_of(key) for key in keys)])

    def _exists(self, index: int) -> bool:
        try:
            self._store.stat(record_key(index))
        except FileNotFoundError:
            return False
        return True

    def _read_back(
        self, pool: Executor, last: int
    ) -> tuple[Record | None, dict[int, bytes | None]]:
        """The newest BASE that holds, if there is one, and the bytes of all slots from there on."""
        slots: dict[int, bytes | None] = {}
        for high in range(last, 0, -_WINDOW):
            window = range(max(1, high - _WINDOW + 1), high + 1)
            slots.update(zip(window, pool.map(self._read, window), strict=True))
            for index in reversed(window):
                data = slots[index]
                if self._whole or data is None or b'"kind":"BASE"' not in data:
                    continue
                base = _decode(data, index)
                if base is not None and begins_replay(base) and self._holds_together(base, slots):
                    return base, slots
        return None, slots

    def _holds_together(self, base: Record, slots: dict[int, bytes | None]) -> bool:
        """Whether the records on both sides of a BASE know it, as far as they can be read."""
        for index in (i for i in slots if i > base.index):
            later = _decode(slots[index], index)
            if later is None:
                continue
            follows = index == base.index + 1
            if base.index in later.voids or (follows and later.previous != base.sha256):
                return False
        before = base.index - 1
        while before in base.voids:
            before -= 1
        if before == 0:
            return base.previous == ""
        data = slots[before] if before in slots else self._read(before)
        previous = _decode(data, before)
        return previous is None or previous.sha256 == base.previous

    def _read(self, index: int) -> bytes | None:
        try:
            return self._store.get(record_key(index))
        except FileNotFoundError:
            return None

    def _take(self, index: int, data: bytes | None) -> None:
        """Judge slot `index` and move on to the next."""
        record = self._slots[index] = _decode(data, index)
        self._next = index + 1
        expected = self.records[-1].sha256 if self.records else ""
        if record is None or record.voids or record.previous != expected:
            self._judge_all()
        else:
            self._keep(self.records, record)

    def _judge_all(self) -> None:
        """Judge all slots known, from the last one back: a record that is void voids nothing."""
        voided: set[int] = set()
        for index in sorted(self._slots, reverse=True):
            record = self._slots[index]
            if record is not None and index not in voided:
                voided.update(record.voids)
        if self._start in voided:
            self._opened = False  # the replay began at a torn BASE, which ended after all
            return
        base = self.records[0] if self._start else None
        kept: list[Record] = [base] if base else []
        self.damaged = _damaged_before(base) if base else []
        self._highest = base.highest_generation if base else 0
        for index in sorted(self._slots):
            record = self._slots[index]
            if index in voided and record is not None:
                continue  # it was completed too late
            after_damage = bool(self.damaged) and self.damaged[-1] == index - 1
            expected = kept[-1].sha256 if kept else ""
            if record is None or (record.previous != expected and not after_damage):
                self._leave_out(index)
            else:
                self._keep(kept, record)
        self.records, self._voided = kept, voided

    def _keep(self, kept: list[Record], record: Record) -> None:
        kept.append(record)
        self._highest = max(self._highest, _highest_known(record))
        self._base_taken = self._base_taken or begins_replay(record)

    def _leave_out(self, index: int) -> None:
        self.damaged.append(index)
        if index not in self._warned:
            self._warned.add(index)
            what = "is missing" if index in self._missing else "is damaged"
            logger.warning("log record %d of %s %s and is left out", index, self._store.url, what)

    def _forget_before_base(self) -> None:
        """Drop what the newest BASE restates. Not before the tail: a record may void a BASE."""
        self._base_taken = False
        for place in range(len(self.records) - 1, 0, -1):
            base = self.records[place]
            if begins_replay(base):
                self.records = self.records[place:]
                since = [index for index in self.damaged if index > base.index]
                self.damaged = _damaged_before(base) + since
                self._start = base.index
                self._slots = {i: r for i, r in self._slots.items() if i > base.index}
                return

    def _torn(self, after: int = 0) -> list[int]:
        """The slots at the tail, behind `after`, that hold no record; none where creation is whole.

        What cannot be torn is damaged, and not worth a wait.
        """
        last = max(after, self.records[-1].index if self.records else 0)
        torn = range(last + 1, self._next)
        return [] if not torn or self._store.creates_atomically else list(torn)

    def _wait_for_torn(self, after: int = 0) -> None:
        """Give the writers of torn slots at the tail time to end; what ends meanwhile is read.

        What has not changed afterwards is void, and the next record says so.
        """
        while torn := self._torn(after):
            before = [self._read(index) for index in torn]
            if not any(map(_decode, before, torn)):  # not complete since it was judged
                self._sleep(TORN_SECONDS)
                if before == [self._read(index) for index in torn]:
                    self.refresh()
                    if torn == self._torn(after):
                        return
            self._opened = False
            self.refresh()


def record_key(index: int) -> str:
    """The key of a slot; keys sort as slots do."""
    return f"log/{index:010d}.json"


def _index_of(key: str) -> int:
    name = key.removeprefix("log/").removesuffix(".json")
    return int(name) if name.isdigit() and key == record_key(int(name)) else 0


def _highest_known(record: Record) -> int:
    return max(record.generation, record.highest_generation)


def _damaged_before(base: Record) -> list[int]:
    """The slots before a BASE that its writer could not read."""
    return [int(index) for index in base.body.get("damaged", [])]


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
        return record_from_json({**content, "sha256": sha256})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
