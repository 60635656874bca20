"""Heartbeats: one small object per incarnation that says it is alive, and in which phase.

Rank 0 writes them; another rank that ends with an error leaves its words beside them.
"""

import json
import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol

from storage.canonical import canonical_json
from storage.errors import FencedError, RangeFlowError, StoreUnavailableError
from storage.store import Store

logger = logging.getLogger(__name__)

BEAT_SECONDS = 5.0


class Owner(Protocol):
    """What a heartbeat needs of an incarnation."""

    generation: int

    def watcher(self, store: Store) -> Callable[[], object]:
        """A function that raises FencedError once a later incarnation owns the run."""


class Beats:
    """A thread that writes `beats/g<generation>.json` every five seconds. Best effort.

    `place` gives the phase and the step. `fenced` is set once the owner's watcher, which is called
    on this thread, has raised FencedError. `afterwards` is called after each beat, on this thread,
    while the owner is known to own the run. `more` gives what else a beat says, and `last_words`
    what the last one says of the error with which the incarnation ends.
    """

    def __init__(
        self,
        store: Store,
        owner: "Owner",
        place: Callable[[], tuple[str, int]],
    ) -> None:
        self._store = store
        self._key = _key(owner.generation)
        self._check = owner.watcher(store)
        self._place = place
        self._left = False
        self._count = 0
        self.afterwards: Callable[[], None] = lambda: None
        self.more: Callable[[], dict[str, Any]] = dict
        self.last_words: Callable[[BaseException | None], dict[str, Any]] = lambda error: {}
        self._last_words: dict[str, Any] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beats", daemon=True)
        self.fenced = False

    def __enter__(self) -> "Beats":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.leave(error)

    def leave(self, error: BaseException | None = None) -> None:
        """Write the last beat, once the thread has ended; for a process that ends with `error`."""
        self._stop.set()
        self._thread.join()
        if not self.fenced and not isinstance(error, FencedError) and not self._left:
            self._left = True
            self._last_words = self.last_words(error)
            self._beat()

    def _run(self) -> None:
        while not self.fenced:
            self._beat()
            if self._stop.wait(BEAT_SECONDS):
                return

    def _beat(self) -> None:
        try:
            self._check()
            self._count += 1
            phase, step = self._place()
            beat = {"count": self._count, "phase": phase, "step": step, "left": self._left}
            beat |= self.more() | self._last_words
            self._store.put(self._key, canonical_json(beat))
            if not self._left:
                self.afterwards()
        except FencedError:
            self.fenced = True
        except RangeFlowError as error:
            logger.debug("a heartbeat was not written: %s", error)
        except Exception:  # a thread that ended here would have others take the owner for dead
            logger.exception("a heartbeat was not written, or what comes with it not done")


def read_beat(store: Store, generation: int) -> dict[str, Any]:
    """The last heartbeat of an incarnation, empty when there is none that can be read."""
    return _read(store, _key(generation))


@contextmanager
def told_error(
    store: Store,
    generation: int,
    rank: int,
    last_words: Callable[[BaseException | None], dict[str, Any]],
) -> Iterator[None]:
    """For a rank that writes no heartbeats: an error of its own is put down. Best effort."""
    try:
        yield
    except Exception as error:
        words = last_words(error)
        if "error" in words:
            try:
                store.put(f"{_stem(generation)}-rank{rank}.json", canonical_json(words))
            except RangeFlowError as failure:
                logger.debug("the error of rank %d was not written: %s", rank, failure)
        raise


def read_error(store: Store, generation: int, beat: Mapping[str, Any]) -> dict[str, Any]:
    """The error with which an incarnation ended, by its last heartbeat or by another rank's words.

    Empty when it ended with none of its own, or did not say so.
    """
    told: list[Mapping[str, Any]] = [beat] if "error" in beat else []
    if not told and (not beat.get("left") or beat.get("lost_a_peer")):
        told = [_read(store, key) for key in store.list(f"{_stem(generation)}-rank")]
    errors = [words["error"] for words in told if isinstance(words.get("error"), dict)]
    return errors[0] if errors else {}


def silent_seconds(store: Store, generation: int) -> float:
    """For how long there has been no heartbeat, by the store's own clock; 0 where it has none.

    The store stamps a small object now and the heartbeat when it came: no clock of a host is asked.
    A mounted drive, where creation is not atomic, may pass on the stamps of its clients.
    """
    if not store.creates_atomically:
        return 0.0
    key = f"probe/clock-{uuid.uuid4().hex}"
    try:
        store.put(key, b"now")
        now = store.stat(key).modified_at
        store.delete(key)
        last = store.stat(_key(generation)).modified_at
    except (FileNotFoundError, StoreUnavailableError):
        return 0.0
    return 0.0 if now is None or last is None else max(0.0, now - last)


def _read(store: Store, key: str) -> dict[str, Any]:
    try:
        beat = json.loads(store.get(key))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return beat if isinstance(beat, dict) else {}


def _key(generation: int) -> str:
    return f"{_stem(generation)}.json"


def _stem(generation: int) -> str:
    return f"beats/g{generation:04d}"
