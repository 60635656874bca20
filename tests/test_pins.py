import itertools
import os
import threading
import time
from pathlib import Path

import pytest

from checkpointing.history import Checkpoint, History, history
from checkpointing.pins import (
    LEASE_SECONDS,
    MOST_REASON_CHARACTERS,
    all_pins,
    pin_for_ever,
    pinned,
    pinned_checkpoints,
    pinned_together,
    unpin,
)
from checkpointing.retention import retire
from storage.canonical import canonical_json
from storage.errors import ConfigurationError, StoreUnavailableError
from storage.log import Log
from storage.store import LocalStore
from tests.test_retention import KEEP_2, Interleaved, live_steps, with_checkpoints
from tests.test_save import claimed


def test_a_pin_holds_while_the_reader_reads_and_not_longer(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with_checkpoints(store, 1)
    with pinned(store, Log(store), lambda past: past.live[-1]) as checkpoint:
        assert pinned_checkpoints(store) == {checkpoint.index}
    assert pinned_checkpoints(store) == set()
    assert store.list("pins/") == []


def test_a_reader_that_was_retired_under_its_hands_chooses_anew(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    owner = with_checkpoints(store, 1, 2, 3)
    asked: list[int] = []

    def oldest(past: History) -> Checkpoint:
        asked.append(past.live[0].step)
        if len(asked) == 1:
            retire(store, owner, KEEP_2)
        return past.live[0]

    with pinned(store, Log(store), oldest) as checkpoint:
        assert checkpoint.step == 2
        assert checkpoint.index in {c.index for c in history(Log(store).refresh()).live}
    assert asked == [1, 2]


def test_a_lease_of_a_killed_reader_ends(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("pins/a.json", canonical_json({"checkpoint": 4, "until": 1000.0}))
    store.put("pins/b.json", canonical_json({"checkpoint": 5, "until": None}))
    assert pinned_checkpoints(store, wall_clock=lambda: 999.0) == {4, 5}
    assert pinned_checkpoints(store, wall_clock=lambda: 1000.0 + LEASE_SECONDS) == {5}
    assert store.list("pins/") == ["pins/b.json"]


def test_what_is_no_pin_is_left_alone(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    (tmp_path / "pins").mkdir()
    contents = {
        ".DS_Store": "x",
        "a.json": "x",
        "b.json": "[]",
        "c.json": "{}",
        "d.json": '{"checkpoint": "4", "until": null}',
        "e.json": '{"checkpoint": true, "until": null}',
        "f.json": '{"checkpoint": 4}',
        "g.json": '{"checkpoint": 4, "until": NaN}',
        "gg.json": '{"checkpoint": 4, "until": %s}' % ("9" * 400),
        "h.json": '{"checkpoint": 4, "until": "soon"}',
        "i.json": '{"checkpoint": 4, "until": null, "reason": 7}',
        "j.json": '{"checkpoint": 4, "until": null, "reason": "%s"}' % ("x" * 9000),
        "k.json": "[" * 8000,
        "l m.json": '{"checkpoint": 4, "until": null}',
    }
    for name, content in contents.items():
        (tmp_path / "pins" / name).write_text(content)
    assert pinned_checkpoints(store) == set()
    assert len(list((tmp_path / "pins").iterdir())) == len(contents)


class ReadOnly(LocalStore):
    def put(self, key: str, data: bytes | memoryview) -> None:
        raise StoreUnavailableError(f"{key}: Read-only file system")


def test_a_read_only_copy_of_a_run_is_read_without_a_pin(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_checkpoints(LocalStore(tmp_path), 1)
    store = ReadOnly(tmp_path)
    with pinned(store, Log(store), lambda past: past.live[-1]) as checkpoint:
        assert checkpoint.step == 1
    assert "reading without a pin" in caplog.text


def test_the_lease_of_a_reader_that_takes_long_is_renewed_while_it_reads(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with_checkpoints(store, 1, 2)
    now = 1000.0

    def clock() -> float:
        return now

    def both(past: History) -> list[Checkpoint]:
        return list(past.live)

    with pinned_together(
        store, Log(store), both, wall_clock=clock, renew_seconds=0.001
    ) as checkpoints:
        for _ in range(3):
            now += 0.9 * LEASE_SECONDS
            wanted = now + LEASE_SECONDS
            deadline = time.monotonic() + 60
            while any(pin.until != wanted for pin in all_pins(store)):
                assert time.monotonic() < deadline, "the leases were not renewed"
                os.sched_yield()
            held = pinned_checkpoints(store, wall_clock=clock)
            assert held == {c.index for c in checkpoints} and len(held) == 2
    assert store.list("pins/") == []
    assert "pins" not in [thread.name for thread in threading.enumerate()]


class Failing(LocalStore):
    """A store whose pins cannot be written or deleted from some moment on."""

    broken = False
    refused = 0

    def put(self, key: str, data: bytes | memoryview) -> None:
        if self.broken and key.startswith("pins/"):
            self.refused += 1
            raise StoreUnavailableError(f"{key}: gone")
        super().put(key, data)

    def delete(self, key: str) -> None:
        if self.broken:
            raise StoreUnavailableError(f"{key}: gone")
        super().delete(key)


def test_a_store_that_fails_meanwhile_does_not_stop_the_reader(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Failing(tmp_path)
    with_checkpoints(store, 1)
    with pinned(store, Log(store), lambda past: past.live[-1], renew_seconds=0.001):
        store.broken = True
        deadline = time.monotonic() + 60
        while not store.refused:
            assert time.monotonic() < deadline, "nobody tried to renew"
            os.sched_yield()
    assert "a pin was not renewed" in caplog.text
    assert "a pin stays for at most 3600 s" in caplog.text


def test_a_pin_for_ever_outlives_leases_and_retention_until_it_is_taken_away(
    tmp_path: Path,
) -> None:
    store = LocalStore(tmp_path)
    owner = with_checkpoints(store, 1, 2, 3, 4)
    first = pin_for_ever(store, Log(store), lambda past: past.live[0], reason="the paper's")
    again = pin_for_ever(store, Log(store), lambda past: past.live[0])
    assert (first.step, again) == (1, first)
    (pin,) = all_pins(store)
    assert (pin.checkpoint, pin.until, pin.reason) == (first.index, None, "the paper's")
    assert pinned_checkpoints(store, wall_clock=lambda: 1e12) == {first.index}
    retire(store, owner, KEEP_2)
    assert live_steps(store) == [1, 3, 4]
    assert unpin(store, first.index) == 1
    assert unpin(store, first.index) == 0
    retire(store, owner, KEEP_2)
    assert live_steps(store) == [3, 4]


def test_unpinning_leaves_a_reader_alone(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with_checkpoints(store, 1)
    with pinned(store, Log(store), lambda past: past.live[0]) as checkpoint:
        assert unpin(store, checkpoint.index) == 0
        assert pinned_checkpoints(store) == {checkpoint.index}


def test_a_reason_has_a_largest_length(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with pytest.raises(ConfigurationError, match="reason must have at most 500 characters; got"):
        pin_for_ever(
            store,
            Log(store),
            lambda past: past.live[0],
            reason="x" * (MOST_REASON_CHARACTERS + 1),
        )
    assert store.list("") == []


@pytest.mark.parametrize("who", ["operator", "owner"])
def test_a_pin_for_ever_and_a_retirement_at_the_same_instant_agree(
    who: str, tmp_path: Path
) -> None:
    """One comes before each operation of the other: it is pinned and live, or said to be gone."""
    outcomes = set()
    for nth in itertools.count(1):
        store = Interleaved(tmp_path / str(nth))
        plain = LocalStore(store.root)
        owner = with_checkpoints(store, 1, 2, 3)
        oldest = history(Log(plain).refresh()).live[0]
        results: list[str] = []

        def pin(place: LocalStore, oldest: Checkpoint = oldest) -> str:
            try:
                pin_for_ever(place, Log(place), lambda past: oldest)
                return "pinned"
            except ConfigurationError as error:
                assert "step 1 was retired just now" in str(error)
                return "gone"

        if who == "operator":
            store.at(nth, lambda: results.append(pin(plain)))  # noqa: B023
            retire(store, owner, KEEP_2)
        else:
            owner = claimed(plain)  # its log reads through the plain store
            store.at(nth, lambda: results.append(str(retire(plain, owner, KEEP_2))))  # noqa: B023
            outcome = pin(store)
            results = [outcome] if results else []
        if not results:
            break
        outcomes.add(results[0])
        assert live_steps(plain) == ([1, 2, 3] if results == ["pinned"] else [2, 3])
        assert pinned_checkpoints(plain) == ({oldest.index} if results == ["pinned"] else set())
    assert nth > 5
    assert outcomes == {"pinned", "gone"}
