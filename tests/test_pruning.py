"""Pruning by hand removes what retention would, and nothing that anybody needs."""

import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from checkpointing.group import Solo
from checkpointing.history import Checkpoint, history
from checkpointing.load import load
from checkpointing.pins import pin_for_ever, pinned
from checkpointing.pruning import prune, sizes
from checkpointing.save import save
from storage.errors import ConfigurationError
from storage.log import Draft, Log
from storage.store import LocalStore
from tests.made_runs import contents, go_on, make_run
from tests.test_retention import Interleaved, live_steps, steps_with_objects
from tests.test_save import Crash, state

NOW = 1_000_000.0


def pruned(store: LocalStore, **options: Any) -> dict[str, Any]:
    return prune(store, Log(store), wall_clock=lambda: NOW, **options)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def test_a_dry_run_tells_what_a_prune_then_does_and_changes_nothing(store: LocalStore) -> None:
    make_run(store, 1, 2, 3, 4)
    store.put("checkpoints/g0001/s00000009-0123456789ab/r000-p00.safetensors", b"12345")
    go_on(store, 5)
    store.put("pins/over.json", b'{"checkpoint": 2, "until": 1.0}')
    before = contents(store)
    told = pruned(store, dry_run=True, keep_last=2)
    assert contents(store) == before
    assert (told["dry_run"], told["retired"]) == (True, [1, 2, 3])
    assert [(row["step"], row["why"]) for row in told["removed"]] == [
        (1, "retired now"),
        (2, "retired now"),
        (3, "retired now"),
        (9, "never committed"),
    ]
    gone = pruned(store, keep_last=2)
    assert {**gone, "dry_run": True} == told
    after = contents(store)
    missing = {key for key in before if key.startswith("checkpoints/") and key not in after}
    assert len(missing) == told["objects"]
    assert sum(len(before[key]) for key in missing) == told["size_bytes"]
    assert live_steps(store) == steps_with_objects(store) == [4, 5]
    again = pruned(store, keep_last=2)
    assert (again["retired"], again["removed"], again["size_bytes"]) == ([], [], 0)


def test_what_is_pinned_or_read_stays(store: LocalStore) -> None:
    make_run(store, 1, 2, 3, 4)
    pin_for_ever(store, Log(store), lambda past: past.live[0])
    with pinned(store, Log(store), lambda past: past.live[1], wall_clock=lambda: NOW) as second:
        assert pruned(store, keep_last=2, dry_run=True)["retired"] == []
        assert pruned(store, keep_last=2)["retired"] == []
        load(store, second)
    assert pruned(store, keep_last=2)["retired"] == [2]
    assert live_steps(store) == steps_with_objects(store) == [1, 3, 4]


def test_the_policy_is_that_of_the_run_unless_told_otherwise(store: LocalStore) -> None:
    kept = {"keep_last": 3, "keep_every_steps": 2}
    make_run(store, *range(1, 9), claim={"retention": kept})
    told = pruned(store, dry_run=True)
    assert (told["keep_last"], told["keep_every_steps"]) == (3, 2)
    assert told["retired"] == [1, 3, 5]
    assert pruned(store, dry_run=True, keep_every_steps=0)["retired"] == [1, 2, 3, 4, 5]
    assert pruned(store, dry_run=True, keep_last=6)["retired"] == [1]


def test_a_policy_that_cannot_be_is_refused(store: LocalStore) -> None:
    make_run(store, 1)
    with pytest.raises(ConfigurationError, match="keep_last must be at least 2"):
        pruned(store, keep_last=1)


def test_a_run_that_does_not_say_what_it_keeps_is_asked_about(store: LocalStore) -> None:
    make_run(store, 1, 2, 3)
    store.put("log/0000000001.json", b"{}")
    for options in ({}, {"keep_last": 2}, {"keep_every_steps": 0}):
        with pytest.raises(ConfigurationError, match="pass both --keep_last and --keep_every"):
            pruned(store, **options)
    assert pruned(store, keep_last=2, keep_every_steps=0)["retired"] == [1]


def test_a_save_in_flight_is_not_touched_and_then_commits(store: LocalStore) -> None:
    make_run(store, 1, 2, 3)

    def announce(phase: str) -> None:
        if phase in ("save:object", "save:uploaded", "save:manifest"):
            pruned(store, keep_last=2)

    owner = go_on(store)
    save(store, owner, Solo(), state(4), step=4, parent=None, announce=announce)
    for checkpoint in history(Log(store).refresh()).live:
        load(store, checkpoint)
    assert live_steps(store) == steps_with_objects(store) == [2, 3, 4]
    owner.check()  # not fenced


def test_the_operators_record_fences_nobody(store: LocalStore) -> None:
    make_run(store, 1, 2, 3)
    pruned(store, keep_last=2)
    (record,) = [r for r in Log(store).refresh() if r.kind == "RETIRE"]
    assert (record.generation, len(record.body["checkpoints"])) == (0, 1)


def test_what_is_in_quarantine_and_what_a_damaged_record_may_name_stays(store: LocalStore) -> None:
    make_run(store, 1, 2, 3)
    first, second, _ = history(Log(store).refresh()).checkpoints
    body = {"checkpoints": [first.index]}
    Log(store).append(lambda _: Draft(kind="QUARANTINE", generation=0, body=body))
    store.put(f"log/{second.index:010d}.json", b"{}")
    go_on(store)
    assert pruned(store, keep_last=2)["removed"] == []
    assert steps_with_objects(store) == [1, 2, 3]


def test_a_reader_at_any_instant_of_a_prune_reads_to_its_end(tmp_path: Path) -> None:
    for nth in itertools.count(1):
        store = Interleaved(tmp_path / str(nth))
        make_run(store, 1, 2, 3, 4)
        plain = LocalStore(store.root)
        with ExitStack() as reader:
            held: list[Checkpoint] = []

            def arrive(
                plain: LocalStore = plain,
                reader: ExitStack = reader,
                held: list[Checkpoint] = held,
            ) -> None:
                pin = pinned(plain, Log(plain), lambda past: past.live[0], wall_clock=lambda: NOW)
                held.append(reader.enter_context(pin))

            store.at(nth, arrive)
            pruned(store, keep_last=2)
            if not held:
                assert nth > 10
                return
            load(plain, held[0])


class Crashing(Interleaved):
    """Leaves before its nth operation, as a kill would."""

    def crash_at(self, nth: int) -> None:
        def crash() -> None:
            raise Crash

        self.at(nth, crash)


def test_killed_at_any_instant_it_goes_on(tmp_path: Path) -> None:
    for nth in itertools.count(1):
        store = Crashing(tmp_path / str(nth))
        make_run(store, 1, 2, 3, 4)
        store.crash_at(nth)
        try:
            pruned(store, keep_last=2)
            return
        except Crash:
            plain = LocalStore(store.root)
            for checkpoint in history(Log(plain).refresh()).live:
                load(plain, checkpoint)
            pruned(plain, keep_last=2)
            assert live_steps(plain) == steps_with_objects(plain) == [3, 4]


def test_progress_is_told_object_by_object(store: LocalStore) -> None:
    make_run(store, 1, 2, 3)
    heard: list[tuple[str, int, int]] = []
    told = pruned(store, keep_last=2, advance=lambda *far: heard.append(far))
    total = told["objects"]
    assert heard == [("removing", done, total) for done in range(1, total + 1)]


def test_the_size_of_what_is_gone_is_nothing(store: LocalStore) -> None:
    store.put("a", b"123")
    assert sizes(store, ["a", "b"]) == [3, 0]
