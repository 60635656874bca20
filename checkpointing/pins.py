"""Pins: what keeps a checkpoint's objects while somebody reads it, or for ever.

A reader chooses, pins, and reads the log again; when the checkpoint has been retired meanwhile,
its objects may be gone and the reader chooses anew. Whoever deletes lists pins after the RETIRE.
A reader's pin is a lease, which a thread renews; an operator's has no end.

Covers: readers that are killed (their lease ends) or take days. Does not cover: a reader that
stands still for longer than a lease, or whose clock is wrong by as much; what it reads may then go.
"""

import json
import logging
import math
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from checkpointing.history import Checkpoint, History, history
from storage.canonical import canonical_json
from storage.errors import ConfigurationError, StoreUnavailableError
from storage.log import Draft, Log, Record
from storage.store import Store

logger = logging.getLogger(__name__)

LEASE_SECONDS = 3600.0
"""A reader that was killed holds its checkpoint for at most this long."""

RENEW_SECONDS = LEASE_SECONDS / 4
"""Three renewals may fail, or two clocks differ by as much, before a lease ends too early."""

MOST_REASON_CHARACTERS = 500

_KEY = re.compile(r"pins/[A-Za-z0-9_-]{1,64}\.json")
_MOST_BYTES = 8192
_FAR_FUTURE = 1e18


@dataclass(frozen=True, kw_only=True, slots=True)
class Pin:
    """A pin as it stands in the store. `until` is None for one that holds for ever."""

    key: str
    checkpoint: int
    until: float | None
    reason: str


def all_pins(store: Store) -> list[Pin]:
    """Every pin, also those that have ended. What is no pin is left out."""
    found = (_read(store, key) for key in store.list("pins/") if _KEY.fullmatch(key))
    return [pin for pin in found if pin is not None]


def pinned_checkpoints(store: Store, *, wall_clock: Callable[[], float] = time.time) -> set[int]:
    """Indices of checkpoints that somebody holds now; leases that have ended are removed."""
    held: set[int] = set()
    for pin in all_pins(store):
        if ended(pin, wall_clock()):
            store.delete(pin.key)
        else:
            held.add(pin.checkpoint)
    return held


def ended(pin: Pin, now: float) -> bool:
    """Whether a pin was a lease that has run out."""
    return pin.until is not None and pin.until <= now


def pin_for_ever(
    store: Store, log: Log, choose: Callable[[History], Checkpoint], *, reason: str = ""
) -> Checkpoint:
    """Keep the checkpoint that `choose` picks until it is unpinned; that it is pinned is no error.

    Raises ConfigurationError when it was retired at the same moment.
    """
    if len(reason) > MOST_REASON_CHARACTERS:
        raise ConfigurationError(
            f"reason must have at most {MOST_REASON_CHARACTERS} characters; got {len(reason)}"
        )
    checkpoint = choose(history(log.refresh()))
    if any(p.checkpoint == checkpoint.index and p.until is None for p in all_pins(store)):
        return checkpoint
    key = _new_key()
    pin = {"checkpoint": checkpoint.index, "until": None, "reason": reason}
    store.put(key, canonical_json(pin))

    def draft(records: Sequence[Record]) -> Draft | None:
        if _retired(history(records), checkpoint.index):
            return None
        # It retires nothing: whoever was about to retire loses the slot and lists the pins anew.
        return Draft(kind="RETIRE", generation=0, body={"checkpoints": []})

    if log.append(draft) is None:
        store.delete(key)
        raise ConfigurationError(
            f"the checkpoint of step {checkpoint.step} was retired just now, before the pin could "
            "hold it; `python -m checkpointing.runs show RUN` lists what is live"
        )
    return checkpoint


def unpin(store: Store, index: int) -> int:
    """Remove what holds a checkpoint for ever; how many pins those were. Leases stay."""
    mine = [p for p in all_pins(store) if p.checkpoint == index and p.until is None]
    for pin in mine:
        store.delete(pin.key)
    return len(mine)


@contextmanager
def pinned(
    store: Store,
    log: Log,
    choose: Callable[[History], Checkpoint],
    *,
    wall_clock: Callable[[], float] = time.time,
    renew_seconds: float = RENEW_SECONDS,
) -> Iterator[Checkpoint]:
    """Hold the checkpoint that `choose` picks, while the body reads it; see `pinned_together`."""
    with pinned_together(
        store,
        log,
        lambda past: [choose(past)],
        wall_clock=wall_clock,
        renew_seconds=renew_seconds,
    ) as (checkpoint,):
        yield checkpoint


@contextmanager
def pinned_together(
    store: Store,
    log: Log,
    choose: Callable[[History], Sequence[Checkpoint]],
    *,
    wall_clock: Callable[[], float] = time.time,
    renew_seconds: float = RENEW_SECONDS,
) -> Iterator[Sequence[Checkpoint]]:
    """Hold the checkpoints that `choose` picks, while the body reads them, however long.

    Where no pin can be written, as in a read-only copy of a run, they are read without one.
    `choose` is called again when one of them was retired before its pin held it.
    """
    while True:
        checkpoints = choose(history(log.refresh()))
        lease = _Lease(store, [c.index for c in checkpoints], wall_clock)
        try:
            try:
                lease.renew()
                held = True
            except StoreUnavailableError as error:
                logger.warning("reading without a pin: %s", error)
                held = False
            past = history(log.refresh()) if held else None
            if past is None or all(_retired(past, c.index) == c.retired for c in checkpoints):
                with lease.renewed_every(renew_seconds if held else math.inf):
                    yield checkpoints
                return
        finally:
            lease.release()


class _Lease:
    """One reader's pins."""

    def __init__(
        self, store: Store, checkpoints: Sequence[int], wall_clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._pins = {_new_key(): index for index in checkpoints}
        self._wall_clock = wall_clock
        self._written: list[str] = []

    def renew(self) -> None:
        """Hold for a lease from now on."""
        for key, index in self._pins.items():
            if key not in self._written:
                self._written.append(key)
            until = self._wall_clock() + LEASE_SECONDS
            self._store.put(key, canonical_json({"checkpoint": index, "until": until}))

    @contextmanager
    def renewed_every(self, seconds: float) -> Iterator[None]:
        """Renew on a thread while the body runs: it may be inside one long call."""
        if not self._pins or math.isinf(seconds):
            yield
            return
        stop = threading.Event()

        def work() -> None:
            while not stop.wait(seconds):
                try:
                    self.renew()
                except StoreUnavailableError as error:
                    logger.warning("a pin was not renewed: %s", error)

        thread = threading.Thread(target=work, name="pins", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def release(self) -> None:
        """Remove the pins; where that fails they end by themselves."""
        for key in self._written:
            try:
                self._store.delete(key)
            except StoreUnavailableError as error:
                logger.warning("a pin stays for at most %.0f s: %s", LEASE_SECONDS, error)


def _new_key() -> str:
    return f"pins/{uuid.uuid4().hex}.json"


def _retired(past: History, index: int) -> bool:
    """Whether a checkpoint is out of use; one that the log does not know any more is."""
    return all(c.retired for c in past.checkpoints if c.index == index)


def _read(store: Store, key: str) -> Pin | None:
    """The pin under a key; None when it is gone since it was listed, or is somebody else's file."""
    try:
        data = store.get(key, 0, _MOST_BYTES + 1)
        pin = json.loads(data) if len(data) <= _MOST_BYTES else None
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    if not isinstance(pin, dict) or type(pin.get("checkpoint")) is not int or "until" not in pin:
        return None
    until, reason = pin["until"], pin.get("reason", "")
    if until is not None and (type(until) not in (int, float) or not abs(until) < _FAR_FUTURE):
        return None
    if not isinstance(reason, str):
        return None
    return Pin(key=key, checkpoint=pin["checkpoint"], until=until, reason=reason)
