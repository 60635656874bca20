import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpointing import beats
from checkpointing.beats import Beats, read_beat
from storage.errors import FencedError, StoreUnavailableError
from storage.store import LocalStore, Store


class Owner:
    """An incarnation whose watcher does what the test wants."""

    generation = 3

    def __init__(self, check: Callable[[], object]) -> None:
        self._check = check

    def watcher(self, store: Store) -> Callable[[], object]:
        return self._check


class Signalling(LocalStore):
    """Tells the test when a beat has been written."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.written = threading.Event()

    def put(self, key: str, data: bytes | memoryview) -> None:
        super().put(key, data)
        self.written.set()


def test_beats_say_phase_and_step_and_that_the_process_left(tmp_path: Path) -> None:
    store = Signalling(tmp_path)
    with Beats(store, Owner(lambda: None), lambda: ("save", 7)):
        assert store.written.wait(30)
        assert read_beat(store, 3) == {"count": 1, "phase": "save", "step": 7, "left": False}
    assert read_beat(store, 3)["left"] is True


def test_a_fenced_owner_learns_it_and_beats_no_more(tmp_path: Path) -> None:
    asked = threading.Event()

    def check() -> None:
        asked.set()
        raise FencedError("generation 3 is fenced")

    store = LocalStore(tmp_path)
    with Beats(store, Owner(check), lambda: ("step", 1)) as running:
        assert asked.wait(30)
        running._thread.join(30)
        assert running.fenced
    assert read_beat(store, 3) == {}


def test_a_store_that_fails_stops_no_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beats, "BEAT_SECONDS", 0.001)
    store = Signalling(tmp_path)
    failures = iter([True, True, False])

    def check() -> None:
        if next(failures, False):
            raise StoreUnavailableError("network")

    with Beats(store, Owner(check), lambda: ("step", 1)) as running:
        assert store.written.wait(30)
        assert not running.fenced


def test_a_beat_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert read_beat(store, 1) == {}
    store.put("beats/g0001.json", b"[1")
    assert read_beat(store, 1) == {}
    store.put("beats/g0001.json", b"[1]")
    assert read_beat(store, 1) == {}
