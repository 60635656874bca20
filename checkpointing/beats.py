"""Heartbeats: one small object per incarnation that says it is alive, and in which phase."""

import json
import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from storage.canonical import canonical_json
from storage.errors import FencedError, RangeFlowError
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
        self._stop.set()
        self._thread.join()
        if not self.fenced and not isinstance(error, FencedError):
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


def read_beat(store: Store, generation: int) -> dict[str, Any]:
    """The last heartbeat of an incarnation, empty when there is none that can be read."""
    try:
        beat = json.loads(store.get(_key(generation)))
    except (FileNotFoundError, ValueError):
        return {}
    return beat if isinstance(beat, dict) else {}


def _key(generation: int) -> str:
    return f"beats/g{generation:04d}.json"
