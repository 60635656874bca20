"""Who may own a run, and when; with a clock and a sleep of the test's own."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpointing.history import history
from checkpointing.incarnation import Incarnation, claim_run
from storage.canonical import canonical_json
from storage.errors import FencedError, RunBusyError
from storage.log import Draft, Log
from storage.store import LocalStore, Store

ELSEWHERE = {"host": "spot-7", "boot_id": "x", "pid_namespace": "y", "pid": 1, "started": "9"}


class Time:
    """A clock that passes only in sleeps; `on_second` is called after each."""

    def __init__(self, on_second: Callable[[int], None] = lambda second: None) -> None:
        self.now = 0.0
        self._on_second = on_second

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._on_second(int(self.now))


def beat(store: Store, generation: int, count: int, **more: Any) -> None:
    content = {"count": count, "phase": "step", "step": 40, **more}
    store.put(f"beats/g{generation:04d}.json", canonical_json(content))


def claim(store: Store, time: Time | None = None, *, take_over: bool = False) -> Incarnation:
    time = time or Time()
    return claim_run(
        store, Log(store), body={}, take_over=take_over, clock=time.clock, sleep=time.sleep
    )


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def owned_elsewhere(store: Store) -> None:
    body = {"owner": ELSEWHERE}
    Log(store).append(lambda _: Draft(kind="CLAIM", generation=1, body=body))
    beat(store, 1, 1)


def test_generations_count_up(store: LocalStore) -> None:
    assert claim(store).generation == 1
    assert claim(store, take_over=True).generation == 2


def test_a_silent_owner_is_gone_after_two_beat_intervals(store: LocalStore) -> None:
    owned_elsewhere(store)
    time = Time()
    assert claim(store, time).generation == 2
    assert time.now == 10.0


def test_an_owner_that_beats_is_named_and_left_alone(store: LocalStore) -> None:
    owned_elsewhere(store)
    time = Time(lambda second: beat(store, 1, second) if second % 5 == 0 else None)
    with pytest.raises(RunBusyError, match=r"generation 1 on host spot-7, process 1, .* step 40"):
        claim(store, time)
    assert 22.0 <= time.now < 30.0
    assert len(Log(store).refresh()) == 1


def test_an_owner_that_leaves_within_the_grace_is_followed(store: LocalStore) -> None:
    owned_elsewhere(store)
    time = Time(lambda second: beat(store, 1, second, left=second >= 15))
    assert claim(store, time).generation == 2
    assert time.now == 15.0


def test_taking_over_waits_for_nobody(store: LocalStore) -> None:
    owned_elsewhere(store)
    time = Time()
    assert claim(store, time, take_over=True).generation == 2
    assert time.now == 0.0


def test_of_two_starters_one_claims_and_the_other_judges_anew(store: LocalStore) -> None:
    owned_elsewhere(store)

    def faster(second: int) -> None:
        if second == 9:
            body = {"owner": ELSEWHERE | {"host": "spot-8"}}
            Log(store).append(lambda _: Draft(kind="CLAIM", generation=2, body=body))
        if second > 9:
            beat(store, 2, second)

    with pytest.raises(RunBusyError, match="generation 2 on host spot-8"):
        claim(store, Time(faster))


def test_a_later_claim_fences_everything_and_nothing_is_appended(store: LocalStore) -> None:
    first = claim(store)
    assert first.append("NOTE", lambda _: {}) is not None
    second = claim(store, take_over=True)
    before = store.list("log/")
    for action in (first.check, lambda: first.append("COMMIT", lambda _: {}), first.watcher(store)):
        with pytest.raises(FencedError, match="generation 1 is fenced: generation 2 has claimed"):
            action()
    assert store.list("log/") == before
    assert second.append("NOTE", lambda _: {}) is not None


def test_a_claim_during_an_append_fences_it(store: LocalStore) -> None:
    first = claim(store)

    def decide(_: object) -> dict[str, Any]:
        if history(Log(store).refresh()).claim == history(first.records).claim:
            claim(store, take_over=True)
        return {}

    with pytest.raises(FencedError):
        first.append("COMMIT", decide)
    assert [record.kind for record in Log(store).refresh()] == ["CLAIM", "CLAIM"]


def test_a_damaged_claim_still_fences_by_the_records_after_it(store: LocalStore) -> None:
    first = claim(store)
    claim(store, take_over=True).append("NOTE", lambda _: {"nonce": uuid.uuid4().hex})
    store.put("log/0000000002.json", b"{}")
    with pytest.raises(FencedError):
        first.check()


def test_a_run_removed_and_begun_anew_fences_the_process_that_was_left(tmp_path: Path) -> None:
    """Both are generation 1: only the CLAIM itself tells them apart."""
    import shutil

    stale = claim(LocalStore(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run")
    new = claim(LocalStore(tmp_path / "run"))
    assert stale.generation == new.generation == 1
    store = LocalStore(tmp_path / "run")
    before = store.list("log/")
    for action in (stale.check, lambda: stale.append("COMMIT", lambda _: {}), stale.watcher(store)):
        with pytest.raises(FencedError, match="its CLAIM is not in the log any more"):
            action()
    assert store.list("log/") == before
    assert new.append("NOTE", lambda _: {}) is not None


def test_an_owner_whose_claim_is_damaged_is_known_by_its_beats(store: LocalStore) -> None:
    owner = claim(store)
    owner.append("NOTE", lambda _: {})
    store.put("log/0000000001.json", b"{}")
    time = Time(lambda second: beat(store, 1, second) if second % 5 == 0 else None)
    beat(store, 1, 0)
    with pytest.raises(RunBusyError, match="generation 1 on host unknown"):
        claim(store, time)
    assert claim(store, take_over=True).generation == 2
