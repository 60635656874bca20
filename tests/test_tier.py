"""The local tier: what counts is committed to the run first, and what does not is left alone."""

import shutil
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing.group import Solo
from checkpointing.history import Checkpoint, history
from checkpointing.incarnation import Incarnation, claim_run
from checkpointing.load import load
from checkpointing.save import TrainingState, save
from checkpointing.tier import adopt, claim_tier, for_tier, tier_context, tier_store
from launch.running import Tier
from storage.errors import FencedError, StoreUnavailableError
from storage.log import Log
from storage.store import LocalStore, Store
from tests.groups import ThreadGroup, on_ranks
from tests.programs import (
    Program,
    checkpoints,
    curve,
    final_digest,
    rows,
    train,
    train_here,
    train_until_killed,
)

SHAPE = (
    "--max_steps=24",
    "--eval_interval_steps=0",
    "--sample_interval_steps=0",
    "--save_interval_steps=10",
    "--local_interval_steps=3",
    "--n_embd=32",
    "--context=32",
    "--global_batch_size=8",
    "--warmup_steps=2",
    "--wait_for_saves",
)


def state(step: int) -> TrainingState:
    tensors = {"w": torch.full((5,), float(step))}
    return TrainingState(tensors=tensors, exact={"step": step}, extra={"rng": [step]})


def owner_of(store: Store) -> Incarnation:
    return claim_run(store, Log(store), body={}, take_over=True)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "run")


@pytest.fixture
def tier(tmp_path: Path) -> Store:
    return tier_store(str(tmp_path / "tier"), "a", LocalStore(tmp_path / "run"))


def snapshot(tier: Store, owner: Incarnation, step: int) -> Checkpoint:
    """What the tier gets from an owner of the run at a step."""
    mine = claim_tier(tier, owner.generation)
    content = for_tier(state(step), tier_context(history(owner.check())))
    saved = save(tier, mine, Solo(), content, step=step)
    assert saved is not None
    return saved


def commit(store: Store, owner: Incarnation, step: int) -> Checkpoint:
    saved = save(store, owner, Solo(), state(step), step=step)
    assert saved is not None
    return saved


def test_a_newer_snapshot_of_the_last_owner_is_committed(store: Store, tier: Store) -> None:
    first = owner_of(store)
    base = commit(store, first, 10)
    local = snapshot(tier, first, 14)
    adopted = adopt(tier, store, owner_of(store))
    assert adopted is not None
    assert (adopted.step, adopted.digest, adopted.parent) == (14, local.digest, base.index)
    loaded = load(store, adopted)
    assert loaded.exact == {"step": 14} and loaded.extra == {"rng": [14]}
    assert torch.equal(loaded.tensors["w"], state(14).tensors["w"])


def test_the_cursor_of_a_snapshot_reaches_the_runs_log(store: Store, tier: Store) -> None:
    first = owner_of(store)
    content = replace(state(4), cursor={"digest": "d"})
    content = for_tier(content, tier_context(history(first.check())))
    save(tier, claim_tier(tier, first.generation), Solo(), content, step=4)
    adopted = adopt(tier, store, owner_of(store))
    assert adopted is not None and adopted.cursor == {"digest": "d"}


def test_a_run_that_never_committed_is_saved_by_its_tier(store: Store, tier: Store) -> None:
    snapshot(tier, owner_of(store), 4)
    adopted = adopt(tier, store, owner_of(store))
    assert adopted is not None and adopted.step == 4


def test_an_empty_tier_gives_nothing(store: Store, tier: Store) -> None:
    assert adopt(tier, store, owner_of(store)) is None


def stale_owner(store: Store, tier: Store) -> None:
    """Another incarnation went on in between, perhaps another way."""
    first = owner_of(store)
    commit(store, first, 10)
    snapshot(tier, first, 14)
    commit(store, owner_of(store), 12)


def older_than_the_commit(store: Store, tier: Store) -> None:
    first = owner_of(store)
    snapshot(tier, first, 14)
    commit(store, first, 14)


def base_retired(store: Store, tier: Store) -> None:
    first = owner_of(store)
    base = commit(store, first, 10)
    snapshot(tier, first, 14)
    first.append("QUARANTINE", lambda _: {"checkpoints": [base.index], "reason": "damaged"})


def other_plan(store: Store, tier: Store) -> None:
    first = owner_of(store)
    first.append("PLAN", lambda _: {"edit": 1})
    snapshot(tier, first, 14)
    for key in store.list("log/"):
        if b'"PLAN"' in store.get(key):
            store.delete(key)


def damaged(store: Store, tier: Store) -> None:
    snapshot(tier, owner_of(store), 14)
    spoil_object(tier)


def spoil_object(tier: Store) -> None:
    [key] = [k for k in tier.list("checkpoints/") if k.endswith("safetensors")]
    data = bytearray(tier.get(key))
    data[-1] ^= 1
    tier.put(key, bytes(data))


@pytest.mark.parametrize(
    "spoil", [stale_owner, older_than_the_commit, base_retired, other_plan, damaged]
)
def test_a_snapshot_that_does_not_count_is_left_alone(
    spoil: Any, store: Store, tier: Store
) -> None:
    spoil(store, tier)
    owner = owner_of(store)
    before = store.list("")
    assert adopt(tier, store, owner) is None
    assert store.list("") == before


def test_a_start_that_only_claimed_leaves_the_snapshot_of_the_one_before(
    store: Store, tier: Store
) -> None:
    snapshot(tier, owner_of(store), 4)
    owner_of(store)
    adopted = adopt(tier, store, owner_of(store))
    assert adopted is not None and adopted.step == 4


def test_a_tier_of_another_run_or_of_a_copy_is_another_place(tmp_path: Path) -> None:
    run, copy = LocalStore(tmp_path / "run"), LocalStore(tmp_path / "copy")
    places = [(("a"), run), ("b", run), ("a", copy)]
    assert len({tier_store(str(tmp_path), name, store).url for name, store in places}) == 3


def test_whoever_had_the_tier_is_fenced(store: Store, tier: Store) -> None:
    owner = owner_of(store)
    before = claim_tier(tier, owner.generation)
    claim_tier(tier, owner.generation)
    with pytest.raises(FencedError):
        save(tier, before, Solo(), state(1), step=1)


def test_a_tier_keeps_no_more_records_than_it_needs(
    store: Store, tier: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("checkpointing.incarnation.BASE_RECORDS", 10)
    owner = owner_of(store)
    mine = claim_tier(tier, owner.generation)
    kept = Tier(store=tier, owner=mine, group=Solo())
    for step in range(1, 60):
        assert (
            save(tier, mine, Solo(), for_tier(state(step), tier_context(history(()))), step=step)
            is not None
        )
        kept.retire()
        assert len(tier.list("log/")) < 30
    adopted = adopt(tier, store, owner_of(store))
    assert adopted is not None and adopted.step == 59
    kept.clear()
    assert tier.list("") == []


def on_hosts(
    store: Store, tiers: list[Store], owner: Incarnation, *, world: int = 0
) -> list[Checkpoint | Exception | None]:
    """What `adopt` gives or raises on each rank; the first has the incarnation.

    Ranks beyond the number of tiers share the last host.
    """

    def one(group: ThreadGroup) -> Checkpoint | None:
        tier = tiers[min(group.rank, len(tiers) - 1)]
        mine = owner if group.rank == 0 else None
        return adopt(tier, store, mine, group, holds=group.rank < len(tiers))

    return on_ranks(world or len(tiers), one)


@pytest.fixture
def tiers(tmp_path: Path) -> list[Store]:
    run = LocalStore(tmp_path / "run")
    return [tier_store(str(tmp_path / f"host{n}"), "a", run) for n in range(3)]


def test_the_newest_snapshot_of_any_host_is_committed_by_who_has_it(
    store: Store, tiers: list[Store]
) -> None:
    first = owner_of(store)
    base = commit(store, first, 10)
    for tier, step in zip(tiers, (12, 16, 14), strict=True):
        snapshot(tier, first, step)
    adopted, *others = on_hosts(store, tiers, owner_of(store), world=4)
    assert isinstance(adopted, Checkpoint) and others == [None, None, None]
    assert (adopted.step, adopted.generation, adopted.parent) == (16, 2, base.index)
    [key] = [k for k in store.list("checkpoints/g0002/") if k.endswith(".safetensors")]
    assert "/r001-" in key, "rank 1 has it"
    loaded = load(store, adopted)
    assert loaded.exact == {"step": 16} and loaded.extra == {"rng": [16]}
    assert torch.equal(loaded.tensors["w"], state(16).tensors["w"])


def test_where_the_newest_is_damaged_the_next_host_helps(store: Store, tiers: list[Store]) -> None:
    first = owner_of(store)
    for tier, step in zip(tiers, (12, 16, 14), strict=True):
        snapshot(tier, first, step)
    spoil_object(tiers[1])
    adopted, *_ = on_hosts(store, tiers, owner_of(store))
    assert isinstance(adopted, Checkpoint) and adopted.step == 14


def test_snapshots_of_one_step_that_differ_are_not_used(
    store: Store, tiers: list[Store], caplog: pytest.LogCaptureFixture
) -> None:
    first = owner_of(store)
    for tier, step in zip(tiers, (16, 16, 14), strict=True):
        snapshot(tier, first, step)
    mine = claim_tier(tiers[1], first.generation)
    wrong = replace(state(16), tensors={"w": torch.zeros(5)})
    content = for_tier(wrong, tier_context(history(first.check())))
    assert save(tiers[1], mine, Solo(), content, step=16) is not None
    adopted, *_ = on_hosts(store, tiers, owner_of(store))
    assert isinstance(adopted, Checkpoint) and adopted.step == 14
    assert "step 16 are not the same on all hosts" in caplog.text


def test_a_host_that_was_away_while_others_went_on_does_not_count(
    store: Store, tiers: list[Store]
) -> None:
    first = owner_of(store)
    commit(store, first, 10)
    snapshot(tiers[0], first, 18)
    second = owner_of(store)
    commit(store, second, 12)
    snapshot(tiers[1], second, 14)
    adopted, *_ = on_hosts(store, tiers, owner_of(store))
    assert isinstance(adopted, Checkpoint) and adopted.step == 14


def test_who_is_fenced_or_has_no_store_says_so_on_every_rank(
    store: Store, tiers: list[Store]
) -> None:
    first = owner_of(store)
    snapshot(tiers[1], first, 14)
    stale = owner_of(store)
    newest = owner_of(store)
    assert [type(e) for e in on_hosts(store, tiers, stale)] == [FencedError] * 3
    outcomes = on_hosts(Full(Path(store.url)), tiers, newest)
    assert [type(e) for e in outcomes] == [StoreUnavailableError] * 3
    adopted, *_ = on_hosts(store, tiers, newest)
    assert isinstance(adopted, Checkpoint), "it was kept for later"


class Full(LocalStore):
    """A place without room."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        raise StoreUnavailableError("no space left")

    def put(self, key: str, data: bytes | memoryview) -> None:
        raise StoreUnavailableError("no space left")


def test_a_tier_without_room_stops_no_start(
    tmp_path: Path,
    data: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full, run = Full(tmp_path / "tier"), tmp_path / "run"
    monkeypatch.setattr("launch.running.tier_store", lambda *place: full)
    assert train_here("--run", run, *data, *SHAPE, "--local_tier", tmp_path / "tier") == 0
    assert "no local snapshots in this start: no space left" in capsys.readouterr().err


def test_a_complete_run_leaves_nothing_in_its_tier(tmp_path: Path, data: tuple[str, ...]) -> None:
    tier = tmp_path / "tier"
    assert train_here("--run", tmp_path / "run", *data, *SHAPE, "--local_tier", tier) == 0
    assert not [path for path in tier.rglob("*") if path.is_file()]


def test_a_tier_is_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here("--run", tmp_path / "run", "--local_tier=gs://bucket/x") == 78
    assert "local_tier must be a folder of this host" in capsys.readouterr().err


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_a_killed_program_goes_on_from_its_local_snapshot(
    world: int, tmp_path: Path, data: tuple[str, ...]
) -> None:
    """Snapshots run beside training; each is waited for here, to know which the kill leaves."""
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert train_here("--run", unbroken, *data, *SHAPE) == 0
    flags = ("--run", killed, *data, *SHAPE, "--local_tier", tmp_path / "tier")
    waits = "whole_snapshots"
    place = train_until_killed(*flags, phase="step", nth=10, world=world, control=waits)
    assert place.step == 9 and checkpoints(killed) == []
    train(*flags, world=world)
    adopted = checkpoints(killed)[0]
    assert adopted.generation == 2 and adopted.step == 9
    assert final_digest(killed) == final_digest(unbroken)
    assert rows(killed) == rows(unbroken)
    assert curve(killed) == curve(unbroken)


def test_a_snapshot_whose_curve_a_start_without_the_tier_has_dropped_is_not_used(
    tmp_path: Path, data: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    """That start committed nothing: only the curve tells of it, and would keep a gap for ever."""
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert train_here("--run", unbroken, *data, *SHAPE) == 0
    flags, tier = ("--run", killed, *data, *SHAPE), ("--local_tier", tmp_path / "tier")
    train_until_killed(*flags, *tier, phase="step", nth=6, control="whole_snapshots")
    train_until_killed(*flags, phase="step", nth=2)
    assert train_here(*flags, *tier) == 0
    assert "is not used: a later start has dropped its curve" in capfd.readouterr().err
    assert final_digest(killed) == final_digest(unbroken)
    assert rows(killed) == rows(unbroken)
    assert curve(killed) == curve(unbroken)


def test_when_rank_0s_host_is_lost_the_snapshot_of_the_host_that_is_left_saves_the_run(
    tmp_path: Path,
) -> None:
    """Two processes that know of each other only that they are first on their hosts."""
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    assert train_here("--run", unbroken, *SHAPE) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    places = [{**world, "RANK": rank, "LOCAL_RANK": "0"} for rank in ("0", "1")]
    tiers = [("--local_tier", tmp_path / f"host{number}") for number in range(2)]
    flags = ("--run", run, *SHAPE)
    with (
        Program(*flags, *tiers[0], stops=[("step", 10)], environment=places[0]) as lost,
        Program(*flags, *tiers[1], environment=places[1]) as left,
    ):
        place = lost.stopped()
        place.send(signal.SIGKILL)
        assert left.end() != 0
    assert place.step == 9 and checkpoints(run) == []
    shutil.rmtree(tmp_path / "host0")
    train(*flags, *tiers[1])
    adopted = checkpoints(run)[0]
    assert adopted.generation == 2 and adopted.step in (6, 9)
    assert final_digest(run) == final_digest(unbroken)
    assert rows(run) == rows(unbroken)
    assert curve(run) == curve(unbroken)
    assert not [path for path in (tmp_path / "host1").rglob("*") if path.is_file()]
