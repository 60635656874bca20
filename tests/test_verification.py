"""A checkpoint is whole, damaged, or nobody's business any more."""

from pathlib import Path

import pytest

from checkpointing.history import history
from checkpointing.verification import damaged_unnoticed, record_verified, verify
from storage.errors import ConfigurationError
from storage.log import Draft, Log
from storage.store import LocalStore
from tests.made_runs import make_run


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LyingOnce(tmp_path)
    make_run(store, 1, 2)
    return store


class LyingOnce(LocalStore):
    """A store whose first reading of one object is wrong."""

    lie: str = ""

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        data = super().get(key, start, end)
        if key != self.lie:
            return data
        self.lie = ""
        return bytes(len(data))

    def local_path(self, key: str) -> Path | None:
        return None if self.lie else super().local_path(key)  # a load then reads through `get`


def weights(store: LocalStore, step: int) -> str:
    return next(
        key for key in store.list("checkpoints/") if f"/s{step:08d}-" in key and "safet" in key
    )


def append(store: LocalStore, kind: str, index: int) -> None:
    Log(store).append(lambda _: Draft(kind=kind, generation=0, body={"checkpoints": [index]}))


def first(store: LocalStore) -> int:
    return history(Log(store).refresh()).checkpoints[0].index


def test_a_whole_checkpoint_is_whole_and_its_pin_goes(store: LocalStore) -> None:
    assert verify(store, Log(store), first(store)) == ("whole", "")
    assert store.list("pins/") == []


def test_a_single_wrong_reading_is_not_damage(store: LyingOnce) -> None:
    store.lie = weights(store, 1)
    assert verify(store, Log(store), first(store)) == ("whole", "")
    assert not store.lie


def test_damage_names_the_object(store: LocalStore) -> None:
    key = weights(store, 1)
    store.put(key, bytes(store.stat(key).size_bytes))
    verdict, what = verify(store, Log(store), first(store))
    assert verdict == "damaged" and key in what


def test_what_is_retired_is_not_read(store: LocalStore) -> None:
    append(store, "RETIRE", first(store))
    store.delete(weights(store, 1))
    assert verify(store, Log(store), first(store)) == ("retired", "")
    assert not record_verified(Log(store), first(store))


def test_what_is_retired_and_removed_under_a_reader_is_not_called_damaged(tmp_path: Path) -> None:
    """A reader that stood still for longer than its lease."""

    class Slow(LocalStore):
        waiting = True

        def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            if self.waiting and key.endswith(".safetensors"):
                self.waiting = False
                append(self, "RETIRE", first(self))
                for gone in [k for k in self.list("checkpoints/") if "/s00000001-" in k]:
                    self.delete(gone)
            return super().get(key, start, end)

        def local_path(self, key: str) -> None:
            return None  # so that a load reads through `get`

    store = Slow(tmp_path)
    make_run(LocalStore(tmp_path), 1, 2)
    assert verify(store, Log(store), first(store)) == ("retired", "")


def test_a_checkpoint_that_is_not_there_is_refused(store: LocalStore) -> None:
    with pytest.raises(ConfigurationError, match="the log has no checkpoint at record 999"):
        verify(store, Log(store), 999)


def test_verified_is_recorded_once_and_lifts_a_quarantine(store: LocalStore) -> None:
    assert record_verified(Log(store), first(store))
    assert not record_verified(Log(store), first(store))
    append(store, "QUARANTINE", first(store))
    assert record_verified(Log(store), first(store))
    (checkpoint, _) = history(Log(store).refresh()).checkpoints
    assert checkpoint.live and checkpoint.verified


def test_a_torn_record_is_noticed_by_its_successor_and_another_is_not(store: LocalStore) -> None:
    torn = len(store.list("log/")) + 1
    store.put(f"log/{torn:010d}.json", b'{"torn')
    append(store, "VERIFIED", first(store))
    log = Log(store)
    log.refresh()
    assert (log.damaged, damaged_unnoticed(log)) == ([torn], [])
    store.put("log/0000000002.json", b"{}")
    log = Log(store)
    log.refresh()
    assert damaged_unnoticed(log) == [2]
