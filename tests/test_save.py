"""Saving: nothing exists before the COMMIT, and the digest does not know who wrote it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing import save as save_module
from checkpointing.group import Solo
from checkpointing.history import history
from checkpointing.incarnation import Incarnation, claim_run
from checkpointing.load import load
from checkpointing.save import TrainingState, save
from storage.errors import FencedError, StoreUnavailableError
from storage.log import Log
from storage.store import LocalStore, Store
from tests.groups import on_ranks


def state(seed: int = 0) -> TrainingState:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (7, 5), "b": (5,), "scalar": (), "empty": (0,), "big": (100, 30)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["state"] = torch.arange(300, dtype=torch.uint8)
    tensors["half"] = torch.randn(9, generator=generator).bfloat16()
    return TrainingState(tensors=tensors, exact={"step": seed, "scale": 0.1}, extra={"rng": [1]})


def claimed(store: Store, *, take_over: bool = True) -> Incarnation:
    return claim_run(store, Log(store), body={}, take_over=take_over)


def save_on(size: int, store: Store, owner: Incarnation, seed: int = 0) -> list[Any]:
    return on_ranks(
        size,
        lambda group: save(
            store, owner if group.rank == 0 else None, group, state(seed), step=seed, parent=None
        ),
    )


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    saved = save(store, claimed(store), Solo(), state(3), step=3, parent=None)
    assert saved is not None
    loaded = load(store, saved)
    expected = state(3)
    assert loaded.exact == expected.exact and loaded.extra == expected.extra
    assert loaded.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)


@pytest.mark.parametrize("size", [2, 3, 5, 9])
def test_any_number_of_ranks_gives_the_same_digest(size: int, tmp_path: Path) -> None:
    alone, together = LocalStore(tmp_path / "1"), LocalStore(tmp_path / "n")
    (one,) = save_on(1, alone, claimed(alone))
    many = save_on(size, together, claimed(together))
    assert many[0].digest == one.digest
    assert all(not isinstance(result, Exception) for result in many)
    assert load(together, many[0]).tensors.keys() == load(alone, one).tensors.keys()


def test_objects_have_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_module, "OBJECT_BYTES", 1000)
    store = LocalStore(tmp_path)
    saved = save(store, claimed(store), Solo(), state(), step=0, parent=None)
    assert saved is not None
    assert len(store.list("checkpoints/")) > 2
    assert load(store, saved).tensors.keys() == state().tensors.keys()


class Crash(BaseException):
    """Leaves at a phase, as a kill would leave the store."""


PHASES = ("save:begin", "save:object", "save:uploaded", "save:manifest", "save:committed")


@pytest.mark.parametrize("phase", PHASES)
def test_left_at_any_phase_the_store_has_the_old_or_the_new_checkpoint(
    phase: str, tmp_path: Path
) -> None:
    store = LocalStore(tmp_path)
    owner = claimed(store)
    save(store, owner, Solo(), state(1), step=1, parent=None)

    def announce(entered: str) -> None:
        if entered == phase:
            raise Crash

    with pytest.raises(Crash):
        save(store, owner, Solo(), state(2), step=2, parent=None, announce=announce)
    live = history(Log(store).refresh()).live
    assert [c.step for c in live] == ([1, 2] if phase == "save:committed" else [1])
    for checkpoint in live:
        load(store, checkpoint)


class Refuses(LocalStore):
    """A place that takes no object of a given kind."""

    def __init__(self, root: Path, refused: str) -> None:
        super().__init__(root)
        self._refused = refused

    def put(self, key: str, data: bytes | memoryview) -> None:
        if self._refused in key:
            raise StoreUnavailableError(f"{key}: no space left")
        super().put(key, data)


@pytest.mark.parametrize("refused", ["r000", "r001", "manifest"])
def test_an_upload_that_fails_on_one_rank_gives_the_save_up_on_all(
    refused: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Refuses(tmp_path, refused)
    owner = claimed(store)
    assert save_on(2, store, owner) == [None, None]
    assert "the save of step 0 failed" in caplog.text
    assert "no space left" in caplog.text
    assert history(Log(store).refresh()).checkpoints == ()


def test_an_object_that_is_gone_after_its_upload_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalStore(tmp_path)

    def announce(phase: str) -> None:
        if phase == "save:uploaded":
            store.delete(store.list("checkpoints/")[0])

    owner = claimed(store)
    assert save(store, owner, Solo(), state(), step=0, parent=None, announce=announce) is None
    assert "is not in the store after its upload" in caplog.text


def test_ranks_at_different_steps_do_not_commit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalStore(tmp_path)
    owner = claimed(store)
    results = on_ranks(
        2,
        lambda group: save(
            store,
            owner if group.rank == 0 else None,
            group,
            state(),
            step=group.rank,
            parent=None,
        ),
    )
    assert results == [None, None]
    assert "rank 1 saved step 1, expected 0" in caplog.text


def test_a_fenced_incarnation_writes_nothing_on_any_rank(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    stale = claimed(store)
    claimed(store)
    before = store.list("")
    results = save_on(2, store, stale)
    assert all(isinstance(result, FencedError) for result in results)
    assert store.list("") == before


@pytest.mark.parametrize("when", ["save:uploaded", "save:manifest"])
def test_a_claim_during_the_save_prevents_the_commit(when: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    owner = claimed(store)

    def announce(phase: str) -> None:
        if phase == when:
            claimed(store)

    with pytest.raises(FencedError):
        save(store, owner, Solo(), state(), step=0, parent=None, announce=announce)
    assert history(Log(store).refresh()).checkpoints == ()


def test_tensors_overwritten_after_the_save_do_not_change_it(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    mine = state()
    saved = save(store, claimed(store), Solo(), mine, step=0, parent=None)
    for tensor in mine.tensors.values():
        tensor.zero_()
    assert saved is not None
    assert torch.equal(load(store, saved).tensors["w"], state().tensors["w"])


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_saved_as_unhealthy(loss: float, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    saved = save(store, claimed(store), Solo(), state(), step=0, parent=None, validation_loss=loss)
    assert saved is not None
    assert (saved.healthy, saved.validation_loss) == (False, None)
