"""Retention: what may go goes, and what somebody needs stays."""

import builtins
import dataclasses
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointing.group import Solo
from checkpointing.history import Checkpoint, history
from checkpointing.incarnation import claim_run
from checkpointing.load import load
from checkpointing.pins import pinned
from checkpointing.retention import RetentionConfig, recorded_policy, retire, sweep, victims
from checkpointing.save import save
from storage.errors import ConfigurationError
from storage.log import Log
from storage.store import LocalStore, ObjectInfo
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


KEEP_2 = RetentionConfig(keep_last=2)


def chosen(
    *checkpoints: Checkpoint, policy: RetentionConfig = KEEP_2, pins: set[int] | None = None
) -> list[int]:
    past = dataclasses.replace(history([]), checkpoints=checkpoints)
    return victims(past, policy, pins or set())


def test_the_newest_are_kept() -> None:
    assert chosen(*(made(i) for i in range(1, 6))) == [1, 2, 3]
    assert chosen(made(1), made(2)) == []


def test_the_newest_healthy_one_is_kept() -> None:
    sick = [made(i, healthy=False) for i in (3, 4, 5)]
    assert chosen(made(1), made(2), *sick) == [1, 3]


def test_the_newest_verified_one_is_kept() -> None:
    read_back = [made(i, verified=True) for i in (1, 2)]
    assert chosen(*read_back, made(3), made(4), made(5)) == [1, 3]


def test_every_so_many_steps_one_is_kept_for_ever() -> None:
    policy = RetentionConfig(keep_last=2, keep_every_steps=20)
    steps = (made(i, step=10 * i) for i in range(1, 9))
    assert chosen(*steps, policy=policy) == [1, 3, 5]


def test_of_saves_that_were_put_off_the_first_after_each_multiple_is_kept() -> None:
    """Also while others come and go, and not those of a multiple that has been passed before."""
    policy = RetentionConfig(keep_last=2, keep_every_steps=50)
    steps = [10, 52, 60, 99, 101, 110, 60, 100, 160, 170, 180]
    found = [made(i, step=step) for i, step in enumerate(steps, start=1)]
    kept = {c.step for c in found} - {found[i - 1].step for i in chosen(*found, policy=policy)}
    assert kept == {52, 101, 160, 170, 180}
    found[1] = dataclasses.replace(found[1], quarantined=True)
    assert 3 not in chosen(*found, policy=policy), "the next takes its place"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_last": 1}, "keep_last must be at least 2, because the newest .*; got 1"),
        ({"keep_every_steps": -1}, r"keep_every_steps must be at least 0 \(off\); got -1"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        RetentionConfig(**fields)


@pytest.mark.parametrize(
    ("said", "policy"),
    [
        (None, None),
        ("much", None),
        ({}, RetentionConfig()),
        ({"keep_last": 5}, RetentionConfig(keep_last=5)),
        ({"keep_last": 1, "keep_every_steps": 0}, None),
        ({"keep_last": True, "keep_every_steps": 0}, None),
        (
            {"keep_last": 5, "keep_every_steps": 9, "of_a_later_version": 1},
            RetentionConfig(keep_last=5, keep_every_steps=9),
        ),
    ],
)
def test_the_policy_of_a_run_is_what_its_last_start_said(
    said: object, policy: RetentionConfig | None, tmp_path: Path
) -> None:
    store = LocalStore(tmp_path)
    claim_run(store, Log(store), body={"retention": said}, take_over=True)
    assert recorded_policy(history(Log(store).refresh())) == policy


def test_what_an_earlier_version_kept_is_known_and_what_a_damaged_claim_says_is_not(
    tmp_path: Path,
) -> None:
    store = LocalStore(tmp_path)
    assert recorded_policy(history(Log(store).refresh())) is None
    claimed(store)
    assert recorded_policy(history(Log(store).refresh())) == RetentionConfig()
    with_checkpoints(store, 1)
    store.put("log/0000000002.json", b"{}")
    assert recorded_policy(history(Log(store).refresh())) is None


def test_the_best_by_validation_loss_is_kept_the_newest_of_equals() -> None:
    losses = {1: 3.0, 2: 2.0, 3: 2.0, 4: 2.5, 5: None, 6: None}
    assert chosen(*(made(i, validation_loss=loss) for i, loss in losses.items())) == [1, 2, 4]


def test_the_parent_and_the_pinned_are_kept() -> None:
    assert chosen(*(made(i) for i in (1, 2, 3, 4)), made(5, parent=2), pins={1}) == [3]


def test_what_is_retired_or_in_quarantine_is_no_victim_and_does_not_count() -> None:
    rest = [made(3), made(4)]
    assert chosen(made(1, retired=True), made(2, quarantined=True), *rest) == []


class Interleaved(LocalStore):
    """Does something else just before its nth operation from a moment on."""

    def at(self, nth: int, action: Callable[[], None]) -> None:
        self._left, self._action = nth, action

    def _count(self) -> None:
        self._left = getattr(self, "_left", 0) - 1
        if self._left == 0:
            self._action()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._count()
        return super().put_if_absent(key, data)

    def put(self, key: str, data: bytes | memoryview) -> None:
        self._count()
        super().put(key, data)

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self._count()
        return super().get(key, start, end)

    def list(self, prefix: str, start_after: str = "") -> builtins.list[str]:
        self._count()
        return super().list(prefix, start_after)

    def delete(self, key: str) -> None:
        self._count()
        super().delete(key)

    def stat(self, key: str) -> ObjectInfo:
        self._count()
        return super().stat(key)


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
    retire(store, owner, KEEP_2)
    assert live_steps(store) == steps_with_objects(store) == [3, 4]
    for checkpoint in history(Log(store).refresh()).live:
        load(store, checkpoint)


def test_a_pinned_checkpoint_is_neither_retired_nor_removed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    owner = with_checkpoints(store, 1, 2, 3, 4)
    with pinned(store, Log(store), lambda past: past.live[0]) as checkpoint:
        retire(store, owner, KEEP_2)
        assert live_steps(store) == [1, 3, 4]
        load(store, checkpoint)
    retire(store, owner, KEEP_2)
    assert live_steps(store) == steps_with_objects(store) == [3, 4]


def test_a_pin_set_between_retire_and_delete_keeps_the_objects(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    owner = with_checkpoints(store, 1, 2, 3)
    first = history(Log(store).refresh()).live[0]

    def announce(phase: str) -> None:
        if phase == "retire:recorded":
            store.put("pins/late.json", b'{"checkpoint": %d, "until": null}' % first.index)

    retire(store, owner, KEEP_2, announce=announce)
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
        retire(store, owner, KEEP_2, announce=announce)
    for checkpoint in history(Log(store).refresh()).live:
        load(store, checkpoint)
    next_owner = claimed(store)
    sweep(store, next_owner)
    retire(store, next_owner, KEEP_2)
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


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "healthy": st.booleans(),
                "verified": st.booleans(),
                "quarantined": st.booleans(),
                "retired": st.booleans(),
                "validation_loss": st.none() | st.sampled_from([0.0, 0.5, 1.0]),
                "parent": st.none() | st.integers(1, 8),
            }
        ),
        max_size=8,
    ),
    st.integers(2, 4),
    st.integers(0, 3),
    st.sets(st.integers(1, 8)),
)
def test_over_any_history_whatever_somebody_needs_survives(
    fields: list[dict[str, Any]], keep_last: int, keep_every_steps: int, pins: set[int]
) -> None:
    checkpoints = [made(i, **more) for i, more in enumerate(fields, start=1)]
    policy = RetentionConfig(keep_last=keep_last, keep_every_steps=keep_every_steps)
    gone = set(chosen(*checkpoints, policy=policy, pins=pins))
    live = [c for c in checkpoints if c.live]
    assert gone <= {c.index for c in live}
    left = [c for c in live if c.index not in gone]
    assert left[-keep_last:] == live[-keep_last:]
    assert not gone & pins
    if live:
        assert live[-1].parent not in gone
    for kind in (
        [c for c in live if c.healthy][-1:],
        [c for c in live if c.verified][-1:],
        [
            c
            for c in live
            if keep_every_steps
            and c.step // keep_every_steps
            > max(
                (
                    o.step // keep_every_steps
                    for o in checkpoints
                    if o.index < c.index and not o.quarantined
                ),
                default=0,
            )
        ],
    ):
        assert all(c in left for c in kind)
    losses = [c.validation_loss for c in live if c.validation_loss is not None]
    if losses:
        assert min(losses) in [c.validation_loss for c in left]


@pytest.mark.parametrize("over", [1, 2])
def test_a_reader_at_any_instant_of_a_retirement_reads_to_its_end(
    over: int, tmp_path: Path
) -> None:
    """It comes before each operation of the owner on the store, and reads after `over` others."""
    for nth in itertools.count(1):
        store = Interleaved(tmp_path / str(nth))
        owner = with_checkpoints(store, 1, 2, 3, 4)
        plain = LocalStore(store.root)
        with ExitStack() as reader:
            held: list[Checkpoint] = []

            def arrive(plain: LocalStore = plain, reader: ExitStack = reader) -> None:
                pin = pinned(plain, Log(plain), lambda past: past.live[0])
                held.append(reader.enter_context(pin))  # noqa: B023

            store.at(nth, arrive)
            retire(store, owner, KEEP_2)
            for _ in range(over):
                sweep(store, owner)
            if not held:
                assert nth > 10
                return
            load(plain, held[0])
        sweep(plain, claimed(plain))
        assert {3, 4} <= set(steps_with_objects(plain)) == set(live_steps(plain))


def test_a_retirement_at_any_instant_of_a_reader_takes_nothing_that_it_reads(
    tmp_path: Path,
) -> None:
    for nth in itertools.count(1):
        store = Interleaved(tmp_path / str(nth))
        owner = with_checkpoints(LocalStore(store.root), 1, 2, 3, 4)
        retired: list[int] = []

        def retire_now(root: Path = store.root, owner: Any = owner) -> None:
            retire(LocalStore(root), owner, KEEP_2)
            retired.append(1)  # noqa: B023

        store.at(nth, retire_now)
        with pinned(store, Log(store), lambda past: past.live[0]) as checkpoint:
            load(store, checkpoint)
        if not retired:
            assert nth > 10
            return
