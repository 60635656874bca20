"""Restoring: the newest whole checkpoint, on all ranks together, and no hasty quarantine."""

from pathlib import Path

import pytest
import torch

from checkpointing import layout
from checkpointing.group import Solo
from checkpointing.history import history
from checkpointing.incarnation import Incarnation
from checkpointing.load import Loaded
from checkpointing.restore import restore
from checkpointing.save import save
from storage.errors import (
    FencedError,
    NoUsableCheckpointError,
    StopRequestedError,
    StoreUnavailableError,
)
from storage.log import Log
from storage.store import LocalStore
from tests.groups import ThreadGroup, on_ranks
from tests.test_save import claimed, state


def with_checkpoints(store: LocalStore, *steps: int) -> Incarnation:
    owner = claimed(store)
    for step in steps:
        assert save(store, owner, Solo(), state(step), step=step, parent=None) is not None
    return claimed(store)


def damage(store: LocalStore, step: int) -> None:
    for key in store.list("checkpoints/"):
        if f"/s{step:08d}-" in key and key.endswith(".safetensors"):
            store.put(key, b"x" + store.get(key)[1:])


def quarantined(store: LocalStore) -> list[int]:
    return [c.step for c in history(Log(store).refresh()).checkpoints if c.quarantined]


def test_a_run_without_checkpoints_has_nothing_to_restore(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert restore(store, with_checkpoints(store), Solo()) is None


def test_all_ranks_restore_the_newest(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    owner = with_checkpoints(store, 1, 2)
    loaded = on_ranks(3, lambda g: restore(store, owner if g.rank == 0 else None, g))
    for one in loaded:
        assert isinstance(one, Loaded)
        assert one.exact["step"] == 2


def test_all_ranks_step_back_together_from_a_damaged_one(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    owner = with_checkpoints(store, 1, 2)
    damage(store, 2)
    loaded = on_ranks(3, lambda g: restore(store, owner if g.rank == 0 else None, g))
    assert [one.exact["step"] for one in loaded if isinstance(one, Loaded)] == [1, 1, 1]
    assert quarantined(store) == [2]


class LiesToOneReader(LocalStore):
    """The first readings of an object of step 2 come back changed."""

    def __init__(self, root: Path, lies: int) -> None:
        super().__init__(root)
        self.lies = lies

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        data = super().get(key, start, end)
        if "/s00000002-" in key and key.endswith(".safetensors") and self.lies:
            self.lies -= 1
            return b"x" + data[1:]
        return data

    def local_path(self, key: str) -> None:
        return None  # so that a load reads through `get`


def test_one_bad_reading_is_no_damage_and_two_are(tmp_path: Path) -> None:
    store = LiesToOneReader(tmp_path, lies=0)
    owner = with_checkpoints(store, 1, 2)
    store.lies = 1
    loaded = restore(store, owner, Solo())
    assert loaded is not None and loaded.exact["step"] == 2
    assert quarantined(store) == []
    store.lies = 2
    loaded = restore(store, owner, Solo())
    assert loaded is not None and loaded.exact["step"] == 1
    assert quarantined(store) == [2]


class Offline(LocalStore):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.offline = False

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        if self.offline and key.startswith("checkpoints/"):
            raise StoreUnavailableError("network is unreachable")
        return super().get(key, start, end)

    def local_path(self, key: str) -> None:
        return None  # so that a load reads through `get`


def test_a_network_error_quarantines_nothing(tmp_path: Path) -> None:
    store = Offline(tmp_path)
    owner = with_checkpoints(store, 1, 2)
    store.offline = True
    with pytest.raises(StoreUnavailableError, match="network is unreachable"):
        restore(store, owner, Solo())
    assert quarantined(store) == []


def test_two_damaged_ones_stop_the_start_and_the_next_one_goes_further_back(
    tmp_path: Path,
) -> None:
    store = LocalStore(tmp_path)
    owner = with_checkpoints(store, 1, 2, 3)
    damage(store, 2)
    damage(store, 3)
    with pytest.raises(NoUsableCheckpointError, match=r"steps \[2, 3\] are in quarantine"):
        restore(store, owner, Solo())
    loaded = restore(store, owner, Solo())
    assert loaded is not None and loaded.exact["step"] == 1


def test_a_run_whose_every_checkpoint_is_damaged_does_not_begin_anew_silently(
    tmp_path: Path,
) -> None:
    store = LocalStore(tmp_path)
    owner = with_checkpoints(store, 1)
    damage(store, 1)
    with pytest.raises(NoUsableCheckpointError, match="with a new name starts anew"):
        restore(store, owner, Solo())


def test_a_fenced_incarnation_restores_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    stale = with_checkpoints(store, 1)
    claimed(store)
    results = on_ranks(2, lambda g: restore(store, stale if g.rank == 0 else None, g))
    assert all(isinstance(result, FencedError) for result in results)


def test_damaged_records_do_not_begin_a_run_anew_silently(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with_checkpoints(store, 1)
    store.put("log/0000000002.json", b"{}")
    with pytest.raises(NoUsableCheckpointError, match=r"log records \[2\] are, and no checkpoint"):
        restore(store, claimed(store), Solo())


def test_a_damaged_claim_loses_no_checkpoint_of_its_generation(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with_checkpoints(store, 1, 2)
    store.put("log/0000000001.json", b"{}")
    loaded = restore(store, claimed(store), Solo())
    assert loaded is not None and loaded.exact["step"] == 2


class Bucket(LocalStore):
    """A store that is no disk; it counts the objects that were read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read: list[str] = []

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        if key.endswith(".safetensors"):
            self.read.append(key)
        return super().get(key, start, end)

    def local_path(self, key: str) -> None:
        return None


@pytest.mark.parametrize("size", [2, 3])
def test_from_a_bucket_each_object_is_read_once_and_given_to_all(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "OBJECT_BYTES", 1000)
    owner = with_checkpoints(LocalStore(tmp_path), 1, 2)
    bucket = Bucket(tmp_path)
    found = on_ranks(size, lambda g: restore(bucket, owner if g.rank == 0 else None, g))
    assert len(bucket.read) == len(set(bucket.read)) >= size
    for one in found:
        assert isinstance(one, Loaded)
        for name, tensor in state(2).tensors.items():
            assert torch.equal(one.tensors[name], tensor)


class Garbling(ThreadGroup):
    """A network that changes what rank 1 receives."""

    def share(self, place: torch.Tensor, source: int) -> None:
        super().share(place, source)
        if self.rank == 1 and source != 1:
            place[0] ^= 1


def test_what_the_network_changes_is_seen_on_every_rank(tmp_path: Path) -> None:
    owner = with_checkpoints(LocalStore(tmp_path), 1)
    bucket = Bucket(tmp_path)

    def work(group: ThreadGroup) -> object:
        garbling = Garbling(group.rank, group.size, group._slots, group._barrier)
        return restore(bucket, owner if group.rank == 0 else None, garbling)

    for error in on_ranks(2, work):
        assert isinstance(error, StoreUnavailableError)
        assert "has arrived differently on rank 1" in str(error) or "on rank 0" in str(error)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_rank_that_is_asked_to_stop_while_it_reads_ends_the_restore_on_all(
    asked: int, tmp_path: Path
) -> None:
    store = LocalStore(tmp_path)
    owner = with_checkpoints(store, 1)

    def work(group: ThreadGroup) -> object:
        def before_object() -> None:
            if group.rank == asked:
                raise StopRequestedError("asked to stop in phase 'restore'")

        mine = owner if group.rank == 0 else None
        return restore(store, mine, group, before_object=before_object)

    for found in on_ranks(2, work):
        assert isinstance(found, StopRequestedError)
        assert str(found) == "asked to stop in phase 'restore'"
    assert quarantined(store) == []
