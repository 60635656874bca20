import errno
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checkpointing import beats, write
from checkpointing.asks import ask
from checkpointing.history import history
from checkpointing.incarnation import Incarnation, claim_run
from checkpointing.interval import PRIOR_SECONDS
from checkpointing.load import load
from checkpointing.save import TrainingState
from data_service.batches import Batches
from data_service.edits import KIND as EDIT
from launch.build import build_training
from launch.config import parse_config
from launch.phase import Phase
from launch.running import Keeper, finish, open_metrics, surroundings
from launch.world import World
from storage.canonical import sha256_hex
from storage.errors import FencedError, StoreUnavailableError
from storage.fsspec_store import FsspecStore
from storage.log import Log
from storage.requests import put_request
from storage.store import LocalStore
from tests.made_sources import made_source, plan_of
from tests.programs import checkpoints, curve, final_digest, train_here
from trainer.metrics import Metrics
from trainer.state import capture, unsaid
from trainer.step import Flags

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU, "none")
SHAPE = (
    "--max_steps=6",
    "--eval_interval_steps=0",
    "--sample_interval_steps=0",
    "--save_interval_steps=1",
    "--wait_for_saves",
    "--keep_last=2",
    "--n_embd=32",
    "--context=32",
    "--global_batch_size=8",
    "--warmup_steps=2",
)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def claimed(store: LocalStore) -> Incarnation:
    return claim_run(store, Log(store), body={}, take_over=True)


def keeper(
    store: LocalStore, world: World, owner: Incarnation | None, metrics: Metrics | None
) -> Keeper:
    """One that may record and flush; to save, it would need what trains."""
    empty = TrainingState(tensors={}, exact={}, extra={})
    config = parse_config([f"--run={store.url}"])
    return Keeper(config, world, store, owner, metrics, lambda step: empty, Phase(), None)


def lines(store: LocalStore) -> list[dict[str, Any]]:
    found = (store.root / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in found]


def test_rows_wait_for_the_flush(store: LocalStore) -> None:
    owner = claimed(store)
    with Metrics(store.root, generation=1, step=0) as metrics:
        kept = keeper(store, ALONE, owner, metrics)
        kept.record({"step": 1, "loss": 2.5})
        kept.record({"step": 2, "loss": 2.25})
        assert lines(store) == []
        kept.flush()
        assert [(row["step"], row["loss"]) for row in lines(store)] == [(1, 2.5), (2, 2.25)]
        kept.flush()
        assert len(lines(store)) == 2


def test_other_ranks_record_and_flush_nothing(store: LocalStore) -> None:
    kept = keeper(store, World(1, 1, CPU, "none"), None, None)
    kept.record({"step": 1})
    kept.flush()
    assert store.list("") == []


def test_a_heartbeat_tells_the_newest_loss_that_is_a_number_and_what_saves_cost(
    store: LocalStore,
) -> None:
    kept = keeper(store, ALONE, None, None)
    assert kept.told()["loss"] is None
    kept.record({"step": 1, "loss": 2.5})
    assert kept.told() == {
        "loss": 2.5,
        "saves": {"count": 0, "seconds": 1.0, "stalled_seconds": 0.0, "durable_seconds": 0.0},
    }
    kept.record({"step": 2, "loss": float("nan")})
    assert kept.told()["loss"] is None


def no_space_for_curves(descriptor: int, sync: Callable[[int], None] = os.fsync) -> None:
    """A disk that is full for the curves alone."""
    name = Path(f"/proc/self/fd/{descriptor}").readlink().name
    if "metrics" in name or "tfevents" in name:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    sync(descriptor)


def test_a_disk_that_is_full_for_the_curves_stops_neither_training_nor_commits(
    tmp_path: Path,
    data: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"

    def listener(phase: str, step: int) -> None:
        if (phase, step) == ("step", 1):
            monkeypatch.setattr(os, "fsync", no_space_for_curves)
        if (phase, step) == ("step", 4):
            monkeypatch.undo()

    assert train_here("--run", run, *data, *SHAPE, "--keep_last=9", listener=listener) == 0
    assert "the curves wait for a later time: metrics: No space left" in capsys.readouterr().err
    assert [c.step for c in checkpoints(run)] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in curve(run)] == [1, 2, 3, 4, 5, 6]


def test_rows_reach_the_disk_before_the_commit_of_their_step(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    on_disk: dict[int, list[int]] = {}

    def listener(phase: str, step: int) -> None:
        if phase == "save:manifest":
            on_disk[step] = [row["step"] for row in lines(LocalStore(run))]

    assert train_here("--run", run, *data, *SHAPE, listener=listener) == 0
    assert on_disk == {step: list(range(1, step + 1)) for step in range(1, 7)}


def test_rows_reach_the_disk_with_a_heartbeat(
    tmp_path: Path, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beats, "BEAT_SECONDS", 0.01)
    run = tmp_path / "run"
    seen: list[int] = []

    def listener(phase: str, step: int) -> None:
        if (phase, step) != ("step", 3):
            return
        deadline = time.monotonic() + 60
        while not (found := lines(LocalStore(run))) and time.monotonic() < deadline:
            os.sched_yield()
        seen.extend(row["step"] for row in found)
        assert checkpoints(run) == []

    arguments = ("--run", run, *data, *SHAPE, "--save_interval_steps=0")
    assert train_here(*arguments, listener=listener) == 0
    assert seen[0] == 1


def test_the_store_is_refused_only_to_the_saves_while_it_fails(
    trainable: Callable[..., Keeper], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log that cannot be read holds up no step: `save` returns, and the flags are told."""
    monkeypatch.setattr(write, "PATIENCE_SECONDS", (0.0,))
    store = Unreachable(tmp_path / "run")
    owner = claimed(store)
    with trainable(store, owner) as kept:
        store.fails = True
        assert kept.save(1, validation_loss=None, healthy=True, wait=False)
        kept.wait_for_copy()
        assert store.asked.wait(60)
        assert kept.flags() == Flags(saving=True)
        store.fails = False
        assert kept.save(2, validation_loss=None, healthy=True, wait=True)
        assert kept.flags() == Flags()
    assert [c.step for c in checkpoints(store.root)][-1] == 2


class Unreachable(LocalStore):
    """A store whose log cannot be read while it `fails`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.fails = False
        self.asked = threading.Event()

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        if self.fails and key.startswith("log/"):
            self.asked.set()
            raise StoreUnavailableError("network is unreachable")
        return super().get(key, start, end)


@pytest.fixture
def trainable(tmp_path: Path) -> Callable[..., Keeper]:
    """Makes keepers of a small model, which can save."""
    source = made_source(tmp_path / "source", "code")
    options = {"seed": 5, "context": 8, "global_batch_size": 2}
    batches = Batches(plan=plan_of([source]), sources={"code": source}, **options)  # type: ignore[arg-type]

    def make(store: LocalStore, owner: Incarnation | None, *flags: str, **options: Any) -> Keeper:
        shape = ("--n_layer=1", "--n_embd=16", "--n_head=2", "--context=8", "--virtual_ranks=1")
        config = parse_config([f"--run={store.url}", "--global_batch_size=2", *shape, *flags])
        training = build_training(config, ALONE, batches)
        metrics = options.pop("metrics", None)
        now = partial(capture, training, batches=batches, seed=5)
        return Keeper(config, ALONE, store, owner, metrics, now, Phase(), None, **options)

    return make


def test_a_save_is_due_by_the_clock_on_rank_0_alone_until_it_is_begun(
    store: LocalStore, trainable: Callable[..., Keeper]
) -> None:
    now = 100.0
    flags = ("--save_interval_seconds=30",)
    with (
        trainable(store, claimed(store), *flags, clock=lambda: now) as kept,
        trainable(store, None, *flags, clock=lambda: now) as other,
    ):
        due = []
        for now in (100.0, 129.9, 130.0, 131.0):  # noqa: B007
            due.append(kept.flags().save_due)
            assert not other.flags().save_due
        assert due == [False, False, True, True]
        assert kept.save(1, validation_loss=None, healthy=True, wait=True)
        assert not kept.flags().save_due
        now = 161.0
        assert kept.flags().save_due


@pytest.mark.parametrize(
    ("saves", "cost"),
    [({"seconds": 0.25}, 0.25), ({"seconds": "x"}, 1.0), ({"seconds": 1e999}, 1.0), ([], 1.0)],
)
def test_the_first_interval_of_a_start_is_that_of_what_the_run_knows(
    store: LocalStore, trainable: Callable[..., Keeper], saves: object, cost: float
) -> None:
    for _ in range(9):  # killed at once, each of them
        claimed(store)
    store.put("beats/g0009.json", json.dumps({"saves": saves}).encode())
    now = 0.0
    expected = math.sqrt(2 * cost * PRIOR_SECONDS / 10)
    with trainable(store, claimed(store), "--save_interval=auto", clock=lambda: now) as kept:
        now = expected - 2
        assert not kept.flags().save_due
        now = expected + 2
        assert kept.flags().save_due


def test_without_an_interval_no_save_is_due_by_the_clock(
    store: LocalStore, trainable: Callable[..., Keeper]
) -> None:
    times = iter([0.0, 1e9])
    with trainable(store, claimed(store), clock=lambda: next(times)) as kept:
        assert kept.flags() == Flags()


def test_saves_put_off_are_counted(
    store: LocalStore, trainable: Callable[..., Keeper], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with trainable(store, claimed(store)) as kept:
        kept.save(1, validation_loss=None, healthy=True, wait=True)
        kept.put_off(2)
        kept.put_off(3)
        kept.save(4, validation_loss=None, healthy=True, wait=True)
    told = [r.getMessage().partition("; ")[2] for r in caplog.records if "is saved" in r.message]
    assert told == ["", "2 saves put off so far"]


def test_a_fenced_incarnation_asks_to_stop_and_says_why_at_the_next_save(
    store: LocalStore, trainable: Callable[..., Keeper]
) -> None:
    owner = claimed(store)
    with Metrics(store.root, generation=1, step=0) as metrics:
        kept = trainable(store, owner, metrics=metrics)
        kept.record({"step": 1, "loss": 2.5})
        claimed(store)
        with kept, pytest.raises(FencedError, match="generation 1 is fenced: generation 2 has"):
            kept.save(1, validation_loss=None, healthy=True, wait=True)
        assert kept.flags().stop
        with pytest.raises(FencedError, match="generation 1 is fenced"):
            kept.save(2, validation_loss=None, healthy=True, wait=False)
    assert lines(store) == []


def test_what_cannot_be_retired_is_a_warning(
    tmp_path: Path, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"

    def listener(phase: str, step: int) -> None:
        if (phase, step) == ("save:committed", 3):
            (run / "pins").mkdir()
            (run / "pins" / "loop.json").symlink_to("loop.json")  # cannot be opened: ELOOP

    assert train_here("--run", run, *data, *SHAPE, listener=listener) == 0
    warned = capsys.readouterr().err
    assert "[rank 0 step 3] step 3 is saved, and not all that follows: " in warned
    assert "pins/loop.json: Too many levels of symbolic links" in warned
    assert [c.step for c in checkpoints(run)] == [1, 2, 3, 4, 5, 6], "none were lost by it"
    assert train_here("--run", unbroken, *data, *SHAPE) == 0
    assert [c.step for c in checkpoints(unbroken)] == [5, 6]
    assert final_digest(run) == final_digest(unbroken)


def test_edits_that_are_asked_for_are_told_and_taken_once(
    store: LocalStore, trainable: Callable[..., Keeper]
) -> None:
    with trainable(store, claimed(store)) as kept:
        assert not kept.flags().edit
        key = put_request(store, EDIT, {})
        ask(store, "save")
        kept.beat()
        assert kept.flags() == Flags(edit=True, save_due=True)
        assert kept.save(1, validation_loss=None, healthy=True, wait=True)
        assert store.list("requests/") == [key], "an edit is not answered by a save"
        assert [request.key for request in kept.take_edits()] == [key]
        kept.beat()
        assert kept.flags() == Flags(), "it is answered, whatever is still there"
        assert kept.take_edits() == []


def test_what_is_asked_too_late_is_answered_by_the_end_and_an_edit_waits(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    """A stop that stayed would stop the start that goes on with more steps."""
    store = LocalStore(tmp_path / "run")
    edits: list[str] = []

    def listener(phase: str, step: int) -> None:
        if (phase, step) == ("step", 5) and not edits:  # no heartbeat comes after it
            ask(store, "stop")
            ask(store, "save")
            edits.append(put_request(store, EDIT, {}))

    assert train_here("--run", store.root, *data, *SHAPE, listener=listener) == 0
    assert store.list("requests/") == edits


def test_a_save_is_told_with_its_step_and_digest(
    tmp_path: Path, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train_here("--run", run, *data, *SHAPE) == 0
    told = capsys.readouterr().err
    assert f"step 6 is saved, digest {final_digest(run)[:12]}" in told
    assert f"complete: 6 steps, digest {final_digest(run)}" in told


def grace_of(noticed: bool) -> Any:
    return SimpleNamespace(
        requested=lambda: noticed,
        no_time=lambda: noticed,
        gives_up=lambda done, of: False,
    )


@pytest.mark.parametrize(
    ("noticed", "fenced", "stops"),
    [(False, False, False), (True, False, True), (False, True, True), (False, None, False)],
)
def test_a_notice_or_a_fence_asks_the_loop_to_stop(
    noticed: bool, fenced: bool | None, stops: bool, store: LocalStore
) -> None:
    beating: Any = None if fenced is None else SimpleNamespace(fenced=fenced)
    kept = keeper(store, ALONE, None, None)
    data: Any = SimpleNamespace()
    proof: Any = SimpleNamespace(holds_back=False)
    around = surroundings(ALONE, kept, data, grace_of(noticed), Phase(), beating, proof)
    assert around.flags() == Flags(stop=stops, no_time=noticed)


@pytest.mark.parametrize("noticed", [False, True])
def test_what_is_not_proved_yet_is_not_saved(noticed: bool, store: LocalStore) -> None:
    kept = keeper(store, ALONE, None, None)
    data: Any = SimpleNamespace()
    proof: Any = SimpleNamespace(holds_back=True)
    grace = grace_of(noticed)
    grace.no_time = lambda: False
    around = surroundings(ALONE, kept, data, grace, Phase(), None, proof)
    expected = Flags(saving=True, saving_locally=True, stop=noticed, no_time=noticed)
    assert around.flags() == expected


def test_each_step_is_timed_and_proved_by_the_batch_that_it_had(store: LocalStore) -> None:
    told: list[Any] = []
    grace, data = grace_of(noticed=False), SimpleNamespace()
    grace.step_is_over = lambda: told.append("over")
    data.batches = SimpleNamespace(sample_digest=lambda position: b"%d" % position)
    proof: Any = SimpleNamespace(
        step=lambda step, samples, *bits: told.append((step, samples(), *bits))
    )
    kept = keeper(store, ALONE, None, None)
    around = surroundings(ALONE, kept, data, grace, Phase(), None, proof)  # type: ignore[arg-type]
    result: Any = SimpleNamespace(loss=2.5, gradient_norm=0.5)
    around.stepped(8, 7, result)
    assert told == ["over", (8, b"7", 2.5, 0.5)]


def test_a_keeper_knows_what_it_saved_and_how_long_a_save_takes(
    store: LocalStore, trainable: Callable[..., Keeper]
) -> None:
    row = {"step": 3, "loss": 2.5}
    with trainable(store, claimed(store)) as kept:
        assert (kept.saved_step, kept.finish_saves(), kept.save_seconds()) == (None, None, 0.0)
        assert kept.save(3, validation_loss=None, healthy=True, wait=True, unsaid=row)
        assert (kept.saved_step, kept.finish_saves()) == (3, 3)
        assert kept.save_seconds() > 0.0
    [saved] = checkpoints(store.root)
    assert unsaid(load(store, saved)) == row


def test_the_loop_sees_this_place_in_the_world(store: LocalStore) -> None:
    world, phase = World(2, 1, CPU, "none"), Phase()
    kept = keeper(store, world, None, None)
    world.size = 3
    asked: list[Any] = []
    data: Any = SimpleNamespace(answer=lambda edits, step: asked.append((edits, step)))
    proof: Any = SimpleNamespace()
    around = surroundings(world, kept, data, grace_of(noticed=False), phase, None, proof)
    around.edited(7)
    assert asked == [([], 7)]
    assert (around.rank, around.world_size, around.device) == (2, 3, CPU)
    assert around.announce is phase


def test_curves_of_a_local_run_lie_in_the_run(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    owner: Any = SimpleNamespace(generation=3, check=lambda: None)
    with ExitStack() as stack, caplog.at_level(logging.INFO):
        metrics = open_metrics(parse_config([f"--run={store.url}"]), store, owner, 7, stack)
        metrics.add({"step": 8, "loss": 1.5})
        metrics.flush()
    assert curve(store.root) == [(8, 1.5)]
    assert f"curves: tensorboard --logdir {store.root}/tensorboard" in caplog.text
    metrics.add({"step": 9})
    metrics.flush()  # as a heartbeat may, after the stack has closed it
    assert [row["step"] for row in lines(store)] == [8]


def test_curves_of_remote_runs_lie_each_in_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    owner: Any = SimpleNamespace(generation=1, check=lambda: None)
    urls = ("memory://bucket/runs/mine/", "memory://bucket/others/mine")
    for url in urls:
        with ExitStack() as stack:
            open_metrics(parse_config([f"--run={url}"]), FsspecStore(url), owner, 0, stack)
    folders = [f"mine-{sha256_hex(url.rstrip('/').encode())[:8]}" for url in urls]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(folders)
    assert all((tmp_path / "runs" / name / "metrics.jsonl").exists() for name in folders)


def test_the_end_names_the_newest_checkpoint(store: LocalStore) -> None:
    owner = claimed(store)
    for step in (2, 4):
        body = {
            **{"step": step, "digest": f"digest of {step}", "manifest_key": "k", "parent": None},
            **{"manifest_sha256": "s", "healthy": True, "validation_loss": None},
        }
        owner.append("COMMIT", lambda _, body=body: body)  # type: ignore[misc]
    finish(owner)
    end = history(Log(store).refresh()).end
    assert end is not None and end.body == {"step": 4, "digest": "digest of 4"}


def test_a_fenced_incarnation_does_not_end_the_run(store: LocalStore) -> None:
    owner = claimed(store)
    claimed(store)
    with pytest.raises(FencedError, match="generation 1 is fenced"):
        finish(owner)
    assert history(Log(store).refresh()).end is None
