"""Saving: nothing exists before the COMMIT, and the digest does not know who wrote it.

A save beside training stores the state of its instant, in memory allocated once.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpointing.group import Solo
from checkpointing.history import Checkpoint, history
from checkpointing.incarnation import Incarnation, claim_run
from checkpointing.load import load
from checkpointing.save import Saver, TrainingState, save
from storage.errors import DivergenceError, FencedError, StoreUnavailableError
from storage.log import Log, record_key
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
    monkeypatch.setattr("checkpointing.layout.OBJECT_BYTES", 1000)
    for module in ("digest", "layout", "load"):
        monkeypatch.setattr(f"checkpointing.{module}.CHUNK_BYTES", 500)
    store = LocalStore(tmp_path)
    saved = save(store, claimed(store), Solo(), state(), step=0, parent=None)
    assert saved is not None
    objects = [key for key in store.list("checkpoints/") if key.endswith("safetensors")]
    assert len(objects) > 10
    assert all(store.stat(key).size_bytes < 1000 + 500 for key in objects), "with their headers"
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


def test_ranks_at_different_steps_do_not_commit(tmp_path: Path) -> None:
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
    assert [type(result) for result in results] == [DivergenceError, DivergenceError]
    assert {str(result) for result in results} == {"rank 1 saved step 1, rank 0 0"}
    assert history(Log(store).refresh()).checkpoints == ()


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


def test_a_commit_says_where_the_data_stood_in_a_small_record(tmp_path: Path) -> None:
    """The manifest goes with its checkpoint; the log stays."""
    store = LocalStore(tmp_path)
    owner = claimed(store)
    cursor = {"plan": "e" * 64, "digest": "f" * 64}
    with_cursor = replace(state(2**31), cursor=cursor)
    first = save(store, owner, Solo(), with_cursor, step=2**31, parent=10**9, validation_loss=1 / 3)
    second = save(store, owner, Solo(), state(3), step=3)
    assert first is not None and second is not None
    assert (first.cursor, second.cursor) == (cursor, None)
    assert first.digest == checkpoint_digest_of(store, first), "it decides no digest"
    assert len(store.get(record_key(first.index))) < 1200
    reread = history(Log(store).refresh()).checkpoints
    assert [c.cursor for c in reread] == [cursor, None]


def checkpoint_digest_of(store: Store, checkpoint: Checkpoint) -> str:
    """The digest of the same state without a cursor, in another run."""
    other = LocalStore(Path(store.url).with_name("other"))
    saved = save(other, claimed(other), Solo(), state(checkpoint.step), step=checkpoint.step)
    assert saved is not None
    return saved.digest


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


class Held(LocalStore):
    """A store that takes no object before it is let go; knows from where in memory each came."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked = threading.Event()
        self.let_go = threading.Event()
        self.addresses: list[int] = []
        self.fails = 0

    def put(self, key: str, data: bytes | memoryview) -> None:
        if key.endswith("safetensors"):
            self.asked.set()
            assert self.let_go.wait(60)
            if self.fails:
                self.fails -= 1
                raise StoreUnavailableError(f"{key}: no answer")
            self.addresses.append(np.frombuffer(data, np.uint8).ctypes.data)
        super().put(key, data)


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    monkeypatch.setattr("checkpointing.write.PATIENCE_SECONDS", (0.0,))
    store = Held(tmp_path)
    yield store
    store.let_go.set()


def steps_of(store: Store) -> list[int]:
    return [c.step for c in history(Log(store).refresh()).checkpoints]


def assert_stored(store: Store, step: int, expected: TrainingState) -> None:
    """The checkpoint of that step is this state, bit for bit."""
    (found,) = (c for c in history(Log(store).refresh()).checkpoints if c.step == step)
    loaded = load(store, found).tensors
    assert all(torch.equal(loaded[name], t) for name, t in expected.tensors.items())


def overwrite(mine: TrainingState) -> None:
    for tensor in mine.tensors.values():
        tensor.fill_(1)


def test_begin_returns_while_the_store_has_not_answered(held: Held) -> None:
    with Saver(held, claimed(held), Solo()) as saver:
        assert not saver.busy
        saver.begin(state(1), step=1)
        assert held.asked.wait(60)
        assert saver.busy
        assert steps_of(held) == []
        held.let_go.set()
        assert saver.finish() == 1
        assert not saver.busy
        assert saver.newest is not None and saver.newest.step == saver.newest_step == 1
    assert_stored(held, 1, state(1))


def test_how_long_saves_take_is_measured(held: Held) -> None:
    now = 0.0
    held.let_go.set()
    with Saver(held, claimed(held), Solo(), clock=lambda: now) as saver:
        assert (saver.seconds_until_durable, saver.seconds_left) == (0.0, 0.0)
        for step, seconds in enumerate([3.0, 900.0, 5.0], 1):  # an outage does not count for all
            hold = threading.Event()
            saver._writer.submit(hold.wait, 60)
            saver.begin(state(step), step=step)
            left = saver.seconds_left
            now += seconds
            hold.set()
            saver.finish()
        assert left == 451.5, "the median of 3 and 900"
        assert (saver.seconds_until_durable, saver.seconds_left) == (5.0, 0.0)


def test_tensors_overwritten_while_the_upload_waits_do_not_change_what_is_stored(
    held: Held,
) -> None:
    mine = state(1)
    with Saver(held, claimed(held), Solo()) as saver:
        saver.begin(mine, step=1)
        saver.wait_for_copy()
        overwrite(mine)
        held.let_go.set()
        saver.finish()
    assert_stored(held, 1, state(1))


@pytest.mark.parametrize("waits", [True, False])
def test_without_the_wait_for_the_copy_another_state_is_stored(waits: bool, held: Held) -> None:
    """The control, made certain: the copy cannot begin before the state is overwritten."""
    mine, copied = state(1), threading.Event()
    held.let_go.set()
    with Saver(held, claimed(held), Solo()) as saver:
        saver._copier.submit(copied.wait, 60)
        saver.begin(mine, step=1)
        if waits:
            copied.set()
            saver.wait_for_copy()
        overwrite(mine)
        copied.set()
        saver.finish()
    if waits:
        assert_stored(held, 1, state(1))
    else:
        assert_stored(held, 1, mine)


def test_a_second_save_takes_other_memory_and_its_turn(held: Held) -> None:
    phases: list[str] = []
    first, second = state(1), state(2)
    with Saver(held, claimed(held), Solo(), announce=phases.append) as saver:
        saver.begin(first, step=1)
        saver.wait_for_copy()
        overwrite(first)
        assert held.asked.wait(60)
        saver.begin(second, step=2)
        saver.wait_for_copy()
        overwrite(second)
        assert phases == ["save:begin"], "one is written at a time"
        held.let_go.set()
        assert saver.finish() == 2
    assert phases.index("save:committed") < len(phases) - 1 - phases[::-1].index("save:begin")
    assert phases.count("save:begin") == phases.count("save:committed") == 2
    assert len(set(held.addresses)) == 2
    assert steps_of(held) == [1, 2]
    assert_stored(held, 1, state(1))
    assert_stored(held, 2, state(2))


def test_fifty_saves_use_the_memory_of_two(held: Held) -> None:
    held.let_go.set()
    with Saver(held, claimed(held), Solo()) as saver:
        for step in range(50):
            saver.begin(state(step), step=step)
            saver.wait_for_copy()
            if step % 3:
                saver.finish()
        saver.finish()
    assert len(held.addresses) == 50
    assert len(set(held.addresses)) <= 2
    assert steps_of(held) == list(range(50))
    assert_stored(held, 49, state(49))


def test_a_state_of_another_layout_gets_other_memory(held: Held) -> None:
    """As after the first step, when the optimizer's moments appear."""
    held.let_go.set()
    small = TrainingState(tensors={"w": torch.ones(3)}, exact={}, extra={})
    with Saver(held, claimed(held), Solo()) as saver:
        saver.begin(small, step=0)
        saver.begin(state(1), step=1)
        saver.finish()
    assert_stored(held, 0, small)
    assert_stored(held, 1, state(1))


@pytest.mark.parametrize("times", [1, 5])
def test_an_outage_is_told_once_and_so_is_its_end(
    times: int, held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    held.fails = times
    held.let_go.set()
    with Saver(held, claimed(held), Solo()) as saver:
        saver.begin(state(1), step=1)
        saver._writes[0][0].result(60)
        saver.begin(state(2), step=2)
        saver.finish()
    assert held.fails == 0
    assert steps_of(held) == [1, 2], "the same save was tried again"
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(told) == 2
    assert told[0].startswith("the save of step 1 failed, and training goes on: rank 0: ")
    assert told[1] == "saves succeed again, with step 1"


def test_a_store_that_fails_for_good_holds_up_nothing(
    held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    """Given up for a newer state, which fails as well; an outage of two saves is told once."""
    held.fails = 10**9
    held.let_go.set()
    with Saver(held, claimed(held), Solo()) as saver:
        saver.begin(state(1), step=1)
        saver.wait_for_copy()
        assert saver.busy
        saver.give_up()
        saver._writes[0][0].result(60)
        assert not saver.busy and not saver.broken
        saver.begin(state(2), step=2)
        assert saver.finish() is None
        held.fails = 0
        saver.begin(state(3), step=3)
        assert saver.finish() == 3
    assert steps_of(held) == [3]
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(told) == 2
    assert "the save of step 1 failed" in told[0] and told[1].endswith("with step 3")


def test_leaving_gives_up_what_fails(held: Held) -> None:
    held.fails = 10**9
    held.let_go.set()
    with Saver(held, claimed(held), Solo()) as saver:
        saver.begin(state(1), step=1)
    assert not saver.busy
    assert steps_of(held) == []


def test_a_save_that_failed_after_one_that_did_not_is_no_newer_step(held: Held) -> None:
    held.let_go.set()
    with Saver(held, claimed(held), Solo()) as saver:
        saver.begin(state(1), step=1)
        saver.finish()
        held.fails = 10**9
        saver.begin(state(2), step=2)
        assert saver.finish() == 1


@pytest.mark.parametrize("call", ["begin", "finish"])
@pytest.mark.parametrize("error", [FencedError("a later one"), ZeroDivisionError("a defect")])
def test_an_error_of_the_writing_thread_is_raised_at_the_next_call(
    error: Exception, call: str, held: Held
) -> None:
    def announce(phase: str) -> None:
        if phase == "save:uploaded":
            raise error

    held.let_go.set()
    calls: dict[str, Callable[[Saver], object]] = {
        "begin": lambda saver: saver.begin(state(2), step=2),
        "finish": lambda saver: saver.finish(),
    }
    with Saver(held, claimed(held), Solo(), announce=announce) as saver:
        assert not saver.broken
        saver.begin(state(1), step=1)
        saver._writes[0][0].result(60)
        assert saver.broken
        for _ in range(2):
            with pytest.raises(type(error), match=str(error)):
                calls[call](saver)
    assert steps_of(held) == []


def test_after_a_commit_and_before_it_rank_0_is_called(held: Held) -> None:
    held.let_go.set()
    called: list[tuple[int, list[int]]] = []
    others: list[object] = []

    def work(group: Any) -> int | None:
        first = group.rank == 0
        with Saver(
            held,
            owner if first else None,
            group,
            before_commit=lambda: (called if first else others).append((0, steps_of(held))),  # type: ignore[attr-defined]
            after_commit=lambda c: (called if first else others).append((c.step, steps_of(held))),  # type: ignore[attr-defined]
        ) as saver:
            saver.begin(state(7), step=7)
            return saver.finish()

    owner = claimed(held)
    assert on_ranks(3, work) == [7, 7, 7]
    assert called == [(0, []), (7, [7])]
    assert others == []


def test_a_divergence_is_raised_on_every_rank(held: Held) -> None:
    held.let_go.set()

    def work(group: Any) -> int | None:
        mine = state(1)
        mine.tensors["w"].add_(group.rank)
        with Saver(held, owner if group.rank == 0 else None, group) as saver:
            saver.begin(mine, step=1)
            return saver.finish()

    owner = claimed(held)
    results = on_ranks(2, work)
    assert [type(result) for result in results] == [DivergenceError] * 2
    assert str(results[0]).startswith("w after step 1 is not the same on rank 1 and rank 0")
    assert steps_of(held) == []


def test_memory_made_ready_beforehand_is_the_first_saves(held: Held) -> None:
    held.let_go.set()
    with Saver(held, claimed(held), Solo()) as saver:
        saver.prepare(state(1))
        ready = saver._free[-1]
        saver.begin(state(1), step=1)
        saver.finish()
        assert saver._free[-1] is ready
    assert_stored(held, 1, state(1))


def test_what_was_not_finite_before_a_save_that_was_given_up_is_said_by_the_next(
    held: Held,
) -> None:
    held.let_go.set()
    with Saver(held, claimed(held), Solo()) as saver:
        held.fails = 10**9
        saver.begin(state(1), step=1, healthy=False)
        saver.finish()
        held.fails = 0
        for step in (2, 3):
            saver.begin(state(step), step=step)
            saver.finish()
    assert [c.healthy for c in history(Log(held).refresh()).live] == [False, True]
