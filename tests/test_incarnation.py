"""Who may own a run, and when; with a clock and a sleep of the test's own."""

import os
import shutil
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from checkpointing.beats import silent_seconds
from checkpointing.history import history
from checkpointing.incarnation import BASE_RECORDS, Incarnation, claim_run
from storage.canonical import canonical_json
from storage.contract import ObjectInfo
from storage.errors import FencedError, RunBusyError, StoreUnavailableError
from storage.log import Draft, Log, Record
from storage.store import LocalStore, Store, open_store

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


def aged(store: LocalStore, seconds: float) -> None:
    """The newest heartbeat came so long ago, as the store has it."""
    path = store.root / "beats/g0001.json"
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_an_owner_long_silent_by_the_store_s_own_clock_is_gone_at_once(store: LocalStore) -> None:
    owned_elsewhere(store)
    aged(store, 20)
    time = Time()
    assert claim(store, time).generation == 2
    assert time.now == 0.0
    assert store.list("probe/") == []


def test_a_heartbeat_not_so_old_or_of_the_future_is_waited_for(store: LocalStore) -> None:
    for seconds in (15, -60):
        owned_elsewhere(store)
        aged(store, seconds)
        time = Time()
        claim(store, time)
        assert time.now == 10.0
        shutil.rmtree(store.root)
        store.root.mkdir()


def test_an_owner_that_has_not_beaten_yet_is_waited_for(store: LocalStore) -> None:
    owned_elsewhere(store)
    store.delete("beats/g0001.json")
    time = Time()
    assert claim(store, time).generation == 2
    assert time.now == 10.0


def test_a_store_without_a_clock_of_its_own_is_not_asked(store: LocalStore) -> None:
    owned_elsewhere(store)
    aged(store, 3600)
    store.creates_atomically = False
    assert silent_seconds(store, 1) == 0.0
    memory = open_store(f"memory://{uuid.uuid4().hex}")
    beat(memory, 1, 1)
    assert silent_seconds(memory, 1) == 0.0


def test_a_store_that_fails_leaves_the_starter_waiting(store: LocalStore) -> None:
    class Failing(LocalStore):
        def stat(self, key: str) -> ObjectInfo:
            raise StoreUnavailableError("network")

    owned_elsewhere(store)
    aged(store, 3600)
    assert silent_seconds(Failing(store.root), 1) == 0.0


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


def committed(owner: Incarnation, step: int) -> int:
    body = {
        "step": step,
        "digest": "d",
        "manifest_key": f"checkpoints/g0001/s{step:08d}-0123456789ab/manifest.json",
        "manifest_sha256": "s",
        "parent": None,
        "healthy": True,
        "validation_loss": None,
    }
    record = owner.append("COMMIT", lambda _: body)
    assert record is not None
    return record.index


def busy(owner: Incarnation, slots: int) -> None:
    """Append notes until the log has that many slots."""
    while owner.records[-1].index < slots:
        owner.append("NOTE", lambda _: {})


def test_a_base_is_appended_every_hundred_records(store: LocalStore) -> None:
    owner = claim(store)
    based = []
    while owner.records[-1].index < 3 * BASE_RECORDS:
        owner.append("NOTE", lambda _: {})
        if record := owner.shorten():
            based.append(record.index)
    assert based == [101, 202]
    assert owner.records[0].index == 202
    assert len(Log(store).refresh()) == 3 * BASE_RECORDS - 202 + 1
    next_owner = claim(store, take_over=True)
    assert next_owner.generation == 2
    past = history(next_owner.check())
    assert past == history(Log(store, whole=True).refresh())
    assert [lifespan.generation for lifespan in past.lifespans] == [1, 2]


def test_before_a_base_is_due_nothing_is_read_or_listed(store: LocalStore) -> None:
    owner = claim(store)
    busy(owner, BASE_RECORDS - 1)
    store.root = store.root / "nowhere"  # any read would now find the run gone
    assert owner.shorten(lambda: pytest.fail("listed")) is None


def test_a_base_forgets_the_retired_checkpoints_that_have_no_object(store: LocalStore) -> None:
    owner = claim(store)
    first, second, third = (committed(owner, step) for step in (1, 2, 3))
    owner.append("RETIRE", lambda _: {"checkpoints": [first, second]})
    store.put("checkpoints/g0001/s00000002-0123456789ab/manifest.json", b"{}")
    busy(owner, BASE_RECORDS)
    assert owner.shorten(lambda: store.list("checkpoints/")) is not None
    assert [c.index for c in history(Log(store).refresh()).checkpoints] == [second, third]
    whole = history(Log(store, whole=True).refresh())
    assert [c.index for c in whole.checkpoints] == [first, second, third]


def test_without_a_listing_a_base_forgets_nothing(store: LocalStore) -> None:
    owner = claim(store)
    first, second = (committed(owner, step) for step in (1, 2))
    owner.append("RETIRE", lambda _: {"checkpoints": [first]})
    busy(owner, BASE_RECORDS)
    assert owner.shorten() is not None
    assert [c.index for c in history(Log(store).refresh()).checkpoints] == [first, second]


def test_a_stale_incarnation_appends_no_base(store: LocalStore) -> None:
    stale = claim(store)
    busy(stale, BASE_RECORDS)
    claim(store, take_over=True)
    before = store.list("log/")
    with pytest.raises(FencedError):
        stale.shorten()
    assert store.list("log/") == before


def test_a_claim_while_a_base_is_prepared_fences_it(store: LocalStore) -> None:
    stale = claim(store)
    busy(stale, BASE_RECORDS)

    def list_objects() -> list[str]:
        claim(store, take_over=True)
        return []

    with pytest.raises(FencedError):
        stale.shorten(list_objects)
    assert not [r for r in Log(store, whole=True).refresh() if r.kind == "BASE"]


def test_a_claim_that_a_base_has_left_behind_still_fences(store: LocalStore) -> None:
    """The watcher of a process that slept reads a log that begins after the CLAIM it missed."""
    stale = claim(store)
    watch = stale.watcher(store)
    owner = claim(store, take_over=True)
    busy(owner, BASE_RECORDS)
    assert owner.shorten() is not None
    assert [r.kind for r in Log(store).refresh()] == ["BASE"]
    for action in (stale.check, watch):
        with pytest.raises(FencedError, match="generation 2 has claimed"):
            action()


def test_threads_take_turns(store: LocalStore) -> None:
    """Appends, checks and BASEs at once: nothing is lost, and nobody sees another's half."""
    owner = claim(store)
    at_once = threading.Barrier(4)

    def append() -> None:
        at_once.wait()
        for _ in range(40):
            owner.append("NOTE", lambda records: {"last": records[-1].index})

    def read() -> None:
        at_once.wait()
        for _ in range(40):
            indices = [record.index for record in owner.check()]
            assert indices == list(range(indices[0], indices[-1] + 1))
            owner.shorten()

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for work in (append, append, append, read)]:
            done.result()
    owner.shorten()
    records = Log(store, whole=True).refresh()
    notes = [record for record in records if record.kind == "NOTE"]
    assert len(notes) == 3 * 40
    assert all(note.body["last"] == note.index - 1 for note in notes), "no append was decided anew"
    assert [record.kind for record in records].count("BASE") == 1


def test_a_check_waits_for_an_append_of_another_thread(store: LocalStore) -> None:
    owner = claim(store)
    with ThreadPoolExecutor(1) as pool:
        waiting = []

        def decide(_: Sequence[Record]) -> dict[str, Any]:
            waiting.append(pool.submit(owner.check))
            assert owner.records, "the appending thread itself may read"
            return {}

        record = owner.append("NOTE", decide)
        assert record is not None
        assert waiting[0].result()[-1] == record


def test_what_was_returned_does_not_change(store: LocalStore) -> None:
    owner = claim(store)
    before = owner.check()
    owner.append("NOTE", lambda _: {})
    assert len(before) == 1
