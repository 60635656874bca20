from pathlib import Path

from checkpointing.history import Checkpoint, History, history
from checkpointing.pins import LEASE_SECONDS, pinned, pinned_checkpoints
from checkpointing.retention import retire
from storage.canonical import canonical_json
from storage.log import Log
from storage.store import LocalStore
from tests.test_retention import with_checkpoints


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
            retire(store, owner, keep_last=2)
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
