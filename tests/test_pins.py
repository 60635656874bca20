from pathlib import Path

import pytest

from checkpointing.history import Checkpoint, History, history
from checkpointing.pins import LEASE_SECONDS, pinned, pinned_checkpoints
from checkpointing.retention import retire
from storage.canonical import canonical_json
from storage.errors import StoreUnavailableError
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


def test_what_is_no_pin_is_left_alone(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    (tmp_path / "pins").mkdir()
    for name, content in ((".DS_Store", "x"), ("a.json", "x"), ("b.json", "[]"), ("c.json", "{}")):
        (tmp_path / "pins" / name).write_text(content)
    assert pinned_checkpoints(store) == set()


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
