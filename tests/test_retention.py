"""Retention: what may go goes, and what somebody needs stays."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from checkpointing.group import Solo
from checkpointing.history import Checkpoint, History, history
from checkpointing.load import load
from checkpointing.pins import pinned
from checkpointing.retention import retire, sweep, victims
from checkpointing.save import save
from storage.log import Log
from storage.store import LocalStore
from tests.test_save import Crash, claimed, state


def made(index: int, **fields: Any) -> Checkpoint:
    base: dict[str, Any] = {
        "step": index,
        "generation": 1,
        "digest": "",
        "manifest_key": "",
        "manifest_sha256": "",
        "parent": None,
        "healthy": True,
        "validation_loss": None,
        "written_at": 0.0,
    }
    return Checkpoint(index=index, **(base | fields))


def chosen(*checkpoints: Checkpoint, keep_last: int = 2, pins: set[int] | None = None) -> list[int]:
    past = History(
        generation=1, claim=None, claim_records=(), checkpoints=checkpoints, plans=(), end=None
    )
    return victims(past, keep_last=keep_last, pinned=pins or set())


def test_the_newest_are_kept() -> None:
    assert chosen(*(made(i) for i in range(1, 6))) == [1, 2, 3]
    assert chosen(made(1), made(2)) == []


def test_the_newest_healthy_one_is_kept() -> None:
    sick = [made(i, healthy=False) for i in (3, 4, 5)]
    assert chosen(made(1), made(2), *sick) == [1, 3]


def test_the_best_by_validation_loss_is_kept_the_newest_of_equals() -> None:
    losses = {1: 3.0, 2: 2.0, 3: 2.0, 4: 2.5, 5: None, 6: None}
    assert chosen(*(made(i, validation_loss=loss) for i, loss in losses.items())) == [1, 2, 4]


def test_the_parent_and_the_pinned_are_kept() -> None:
    assert chosen(*(made(i) for i in (1, 2, 3, 4)), made(5, parent=2), pins={1}) == [3]


def test_what_is_retired_or_in_quarantine_is_no_victim_and_does_not_count() -> None:
    rest = [made(3), made(4)]
    assert chosen(made(1, retired=True), made(2, quarantined=True), *rest) == []


def with_checkpoints(store: LocalStore, *steps: int) -> Any:
    owner = claimed(store)
    for step in steps:
        save(store, owner, Solo(), state(step), step=step, parent=None)
    return owner


def steps_with_objects(store: LocalStore) -> list[int]:
    names = {key.split("/")[2] for key in store.list("checkpoints/")}
    return sorted(int(name[1:9]) for name in names)


def live_steps(store: LocalStore) -> list[int]:
    return [c.step for c in history(Log(store).refresh()).live]


def test_retired_checkpoints_lose_their_objects_and_the_others_can_be_read(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    owner = with_checkpoints(store, 1, 2, 3, 4)
    retire(store, owner, keep_last=2)
    assert live_steps(store) == steps_with_objects(store) == [3, 4]
    for checkpoint in history(Log(store).refresh()).live:
        load(store, checkpoint)


def test_a_pinned_checkpoint_is_neither_retired_nor_removed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    owner = with_checkpoints(store, 1, 2, 3, 4)
    with pinned(store, Log(store), lambda past: past.live[0]) as checkpoint:
        retire(store, owner, keep_last=2)
        assert live_steps(store) == [1, 3, 4]
        load(store, checkpoint)
    retire(store, owner, keep_last=2)
    assert live_steps(store) == steps_with_objects(store) == [3, 4]


def test_a_pin_set_between_retire_and_delete_keeps_the_objects(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    owner = with_checkpoints(store, 1, 2, 3)
    first = history(Log(store).refresh()).live[0]

    def announce(phase: str) -> None:
        if phase == "retire:recorded":
            store.put("pins/late.json", b'{"checkpoint": %d, "until": null}' % first.index)

    retire(store, owner, keep_last=2, announce=announce)
    load(store, first)
    store.delete("pins/late.json")
    sweep(store, claimed(store))
    assert steps_with_objects(store) == [2, 3]


@pytest.mark.parametrize("phase", ["retire:chosen", "retire:recorded", "retire:deleted"])
def test_left_at_any_phase_the_next_start_removes_the_rest(phase: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    owner = with_checkpoints(store, 1, 2, 3)

    def announce(entered: str) -> None:
        if entered == phase:
            raise Crash

    with pytest.raises(Crash):
        retire(store, owner, keep_last=2, announce=announce)
    for checkpoint in history(Log(store).refresh()).live:
        load(store, checkpoint)
    next_owner = claimed(store)
    sweep(store, next_owner)
    retire(store, next_owner, keep_last=2)
    assert live_steps(store) == steps_with_objects(store) == [2, 3]


def test_the_sweep_takes_attempts_that_never_committed_but_not_its_own(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with_checkpoints(store, 1)
    store.put("checkpoints/g0001/s00000002-0123456789ab/r000-p00.safetensors", b"x")
    owner = claimed(store)
    own = f"checkpoints/g{owner.generation:04d}/s00000002-0123456789ab/r000-p00.safetensors"
    store.put(own, b"x")
    store.put("checkpoints/notes.txt", b"a user's")
    sweep(store, owner)
    assert [key for key in store.list("checkpoints/") if "-0123456789ab" in key] == [own]
    assert "checkpoints/notes.txt" in store.list("checkpoints/")
    assert live_steps(store) == [1]


def test_the_sweep_keeps_what_a_damaged_record_may_have_committed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with_checkpoints(store, 1, 2)
    newest = history(Log(store).refresh()).live[-1]
    store.put(f"log/{newest.index:010d}.json", b"{}")
    sweep(store, claimed(store))
    assert steps_with_objects(store) == [1, 2]


def test_the_sweep_keeps_what_is_in_quarantine(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    owner = with_checkpoints(store, 1, 2)
    newest = history(Log(store).refresh()).live[-1]
    owner.append("QUARANTINE", lambda _: {"checkpoints": [newest.index]})
    sweep(store, claimed(store))
    assert steps_with_objects(store) == [1, 2]


def test_over_any_history_the_newest_two_survive(tmp_path: Path) -> None:
    for pattern in itertools.product([True, False], repeat=4):
        checkpoints = [made(i, healthy=h) for i, h in enumerate(pattern, start=1)]
        assert not {3, 4} & set(chosen(*checkpoints))
