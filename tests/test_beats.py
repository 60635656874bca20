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


def test_what_comes_afterwards_comes_only_after_a_beat_of_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after a check that failed, nor once fenced, nor after the last beat, when it is over."""
    monkeypatch.setattr(beats, "BEAT_SECONDS", 0.001)
    answers = iter([StoreUnavailableError("network"), None, FencedError("generation 3 is fenced")])

    def check() -> None:
        answer = next(answers)
        if answer is not None:
            raise answer

    called: list[int] = []
    store = LocalStore(tmp_path)
    running = Beats(store, Owner(check), lambda: ("step", 1))
    running.afterwards = lambda: called.append(read_beat(store, 3)["count"])
    with running:
        running._thread.join(30)
    assert running.fenced
    assert called == [1]


def test_nothing_comes_after_the_last_beat(tmp_path: Path) -> None:
    store = Signalling(tmp_path)
    called = threading.Event()
    running = Beats(store, Owner(lambda: None), lambda: ("step", 1))
    running.afterwards = called.set
    with running:
        assert called.wait(30)
        called.clear()
    assert read_beat(store, 3)["left"] is True
    assert not called.is_set()


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


def test_an_error_in_what_comes_with_a_beat_stops_no_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beats, "BEAT_SECONDS", 0.001)
    twice = threading.Event()
    failures = iter([True])

    def afterwards() -> None:
        if next(failures, False):
            raise ZeroDivisionError("a defect")
        twice.set()

    running = Beats(LocalStore(tmp_path), Owner(lambda: None), lambda: ("step", 1))
    running.afterwards = afterwards
    with running:
        assert twice.wait(30), "others take a silent owner for dead"


def test_a_beat_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert read_beat(store, 1) == {}
    store.put("beats/g0001.json", b"[1")
    assert read_beat(store, 1) == {}
    for damaged in (b"[1]", b"[" * 100_000):
        store.put("beats/g0001.json", damaged)
        assert read_beat(store, 1) == {}


def test_the_last_beat_says_the_error_and_the_others_do_not(tmp_path: Path) -> None:
    store = Signalling(tmp_path)
    running = Beats(store, Owner(lambda: None), lambda: ("step", 7))
    running.last_words = lambda error: {"error": str(error)} if error else {}
    with pytest.raises(ZeroDivisionError), running:
        assert store.written.wait(30)
        assert "error" not in read_beat(store, 3)
        raise ZeroDivisionError("a defect")
    beat = read_beat(store, 3)
    assert (beat["error"], beat["left"]) == ("a defect", True)
