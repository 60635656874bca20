"""One start of the training program on a run: claims it, and stops when a later one has.

The fence is the order of the log. An incarnation begins with a CLAIM of the next generation; from
then on nobody of a lower generation can append, because every append reads the log to its end
first and finds the CLAIM.

Covers: processes that are killed, stopped and woken, started twice, on any number of hosts; use
by several threads of one process.
Does not cover: what a stale process does to anything but the log and its own objects.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from checkpointing.beats import BEAT_SECONDS, read_beat, silent_seconds
from checkpointing.history import history, restated, without_objects
from checkpointing.owner import provably_gone, this_process
from storage.errors import FencedError, RunBusyError
from storage.log import Draft, Log, Record, begins_replay
from storage.store import Store

logger = logging.getLogger(__name__)

GRACE_SECONDS = 12.0
"""How long a starter waits for a beating owner to leave (the default grace budget)."""

SILENT_SECONDS = 4 * BEAT_SECONDS
"""Without a beat for so long on the store's clock, an owner is gone. Twice what a starter would
wait: the store may have stamped the beat before it was whole, or failed for a while."""

BASE_RECORDS = 100
"""How many records a BASE lets lie behind it before the next: what a start reads at most."""


class Incarnation:
    """The right to append to a run's log, until a later incarnation claims it.

    Any thread may call anything: one operation on the log goes on at a time, and the others wait,
    also for a store that is slow; who must not wait takes a `watcher`. What is returned is the
    caller's own. A `decide` may read the incarnation, on its own thread.
    """

    def __init__(self, log: Log, claim: Record) -> None:
        self._log = log
        self._claim = claim
        self._lock = threading.RLock()
        self.generation = claim.generation

    @property
    def records(self) -> Sequence[Record]:
        """The log as this incarnation last read it, from the newest BASE on."""
        with self._lock:
            return tuple(self._log.records)

    def watcher(self, store: Store) -> Callable[[], object]:
        """A `check` with a log of its own, for another thread."""
        log = Log(store)
        return lambda: _refuse_if_stale(log, log.refresh(), self._claim)

    @property
    def damaged_records(self) -> Sequence[int]:
        """Slots of the log that could not be read; what they said is not known."""
        with self._lock:
            return tuple(self._log.damaged)

    def check(self) -> Sequence[Record]:
        """As `records`, read to the log's end; raises FencedError after a later CLAIM."""
        with self._lock:
            records = self._log.refresh()
            _refuse_if_stale(self._log, records, self._claim)
            return tuple(records)

    def append(
        self, kind: str, decide: Callable[[Sequence[Record]], dict[str, Any] | None]
    ) -> Record | None:
        """Append the body that `decide` makes of the records, or nothing when it makes none.

        Raises FencedError, with the log unchanged, when a later incarnation has claimed the run.
        """

        def draft(records: Sequence[Record]) -> Draft | None:
            _refuse_if_stale(self._log, records, self._claim)
            body = decide(records)
            if body is None:
                return None
            return Draft(kind=kind, generation=self.generation, body=body)

        with self._lock:
            return self._log.append(draft)

    def shorten(self, list_objects: Callable[[], Iterable[str]] | None = None) -> Record | None:
        """Append a BASE when 100 records lie since the last one; call it after a commit.

        `list_objects` lists the keys of `checkpoints/`: retired checkpoints that have no object
        left are forgotten by the BASE; without it, none is. Nothing is read or listed before a BASE
        is due. Raises as `append` does; that no BASE could be appended harms nothing.
        """
        with self._lock:
            if _records_since_base(self._log.records) < BASE_RECORDS:
                return None
            past = history(self.check())
            gone = without_objects(past, list_objects()) if list_objects else set()

            def decide(records: Sequence[Record]) -> dict[str, Any] | None:
                if _records_since_base(records) < BASE_RECORDS:
                    return None
                return restated(history(records), gone)

            return self.append("BASE", decide)


def _records_since_base(records: Sequence[Record]) -> int:
    """How many slots lie behind the newest BASE, or behind the beginning of the log."""
    newest = next((r.index for r in reversed(records) if begins_replay(r)), 0)
    return records[-1].index - newest if records else 0


def _refuse_if_stale(log: Log, records: Sequence[Record], claim: Record) -> None:
    """As `refuse_if_fenced`; and when this log is not the one that was claimed any more."""
    refuse_if_fenced(records, claim)
    if not log.holds(claim):
        raise FencedError(
            f"generation {claim.generation} is fenced: its CLAIM is not in the log any more. The "
            "run was removed and begun anew, or its log is damaged"
        )


def refuse_if_fenced(records: Sequence[Record], claim: Record) -> None:
    """Raise FencedError when the log holds a CLAIM later than `claim`."""
    for record in reversed(records):
        if record.index <= claim.index:
            return
        if record.kind == "CLAIM" or record.highest_generation > claim.generation:
            raise FencedError(
                f"generation {claim.generation} is fenced: generation "
                f"{record.highest_generation} has claimed the run"
            )


def claim_run(
    store: Store,
    log: Log,
    *,
    body: dict[str, Any],
    take_over: bool,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Incarnation:
    """Append the CLAIM of the next generation, when the present owner is gone or `take_over`.

    The owner is gone when this host can prove it, or when no new beat arrives within two beat
    intervals on this process's own clock, or none came within the last four on the store's: a
    machine that replaces one lost a minute ago waits for nothing. Otherwise waits out the grace,
    then raises RunBusyError.
    """
    claim_body = {**body, "owner": this_process()}
    while True:
        judged = None if take_over else _wait_until_free(store, log, clock=clock, sleep=sleep)

        def draft(records: Sequence[Record], judged: int | None = judged) -> Draft | None:
            if judged is not None and history(records).generation != judged:
                return None  # another starter was faster: judge that one
            generation = log.highest_generation + 1
            return Draft(kind="CLAIM", generation=generation, body=claim_body)

        record = log.append(draft)
        if record is not None:
            logger.info("claimed the run as generation %d", record.generation)
            return Incarnation(log, record)


def _wait_until_free(
    store: Store, log: Log, *, clock: Callable[[], float], sleep: Callable[[float], None]
) -> int:
    """The generation whose owner is gone, 0 when the run has never been claimed."""
    past = history(log.refresh())
    owner = past.claim.body["owner"] if past.claim else {}  # unknown when its CLAIM is damaged
    if past.generation == 0 or provably_gone(owner):
        return past.generation
    last = read_beat(store, past.generation)
    if last and silent_seconds(store, past.generation) >= SILENT_SECONDS:
        return past.generation
    started = last_news = clock()
    host = owner.get("host", "unknown")
    logger.info("waiting to see whether a process on host %s still owns the run", host)
    while clock() - last_news < 2 * BEAT_SECONDS:
        if last.get("left") or provably_gone(owner):
            break
        if clock() - started > 2 * BEAT_SECONDS + GRACE_SECONDS:
            raise RunBusyError(
                f"{store.url} is in use by generation {past.generation} on host {host}, process "
                f"{owner.get('pid')}, in phase {last.get('phase')!r} at step {last.get('step')}. "
                "Stop that one, or pass --take_over to fence it"
            )
        sleep(1.0)
        beat = read_beat(store, past.generation)
        if beat != last:
            last, last_news = beat, clock()
    return past.generation
