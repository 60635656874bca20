import errno
import json
import logging
import os
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checkpointing.history import history
from checkpointing.incarnation import Incarnation, claim_run
from launch.config import parse_config
from launch.phase import Phase
from launch.running import Keeper, finish, open_metrics, surroundings
from launch.world import World
from storage.canonical import sha256_hex
from storage.errors import FencedError, RangeFlowError, StoreUnavailableError
from storage.log import Log
from storage.store import FsspecStore, LocalStore
from tests.programs import checkpoints, curve, final_digest, train_here
from trainer.metrics import Metrics

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU, "none")
SHAPE = (
    "--max_steps=6",
    "--eval_interval_steps=0",
    "--sample_interval_steps=0",
    "--save_interval_steps=1",
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
    nothing: Any = None
    config = parse_config([f"--run={store.url}"])
    return Keeper(config, world, store, owner, metrics, nothing, nothing, Phase(), None)


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


def test_a_fenced_incarnation_writes_no_rows(store: LocalStore) -> None:
    owner = claimed(store)
    with Metrics(store.root, generation=1, step=0) as metrics:
        kept = keeper(store, ALONE, owner, metrics)
        kept.record({"step": 1, "loss": 2.5})
        claimed(store)
        with pytest.raises(FencedError, match="generation 1 is fenced: generation 2 has claimed"):
            kept.flush()
        with pytest.raises(FencedError, match="generation 1 is fenced"):
            kept.save(1, None, True)
    assert lines(store) == []


def test_other_ranks_record_and_flush_nothing(store: LocalStore) -> None:
    kept = keeper(store, World(1, 1, CPU, "none"), None, None)
    kept.record({"step": 1})
    kept.flush()
    assert store.list("") == []


class Other(World):
    """Rank 1 of a world, told by rank 0 that its flush failed."""

    def __init__(self, told: dict[str, str]) -> None:
        super().__init__(1, 1, CPU, "none")
        self._told = told

    def broadcast(self, value: Any) -> Any:
        assert value == {}, "only rank 0 flushes"
        return self._told


class Told(World):
    """Rank 0, of which we read what it tells the others."""

    def __init__(self) -> None:
        super().__init__(0, 1, CPU, "none")
        self.told: Any = None

    def broadcast(self, value: Any) -> Any:
        self.told = json.loads(json.dumps(value))
        return value


@pytest.mark.parametrize("kind", [FencedError, StoreUnavailableError])
def test_a_flush_that_failed_on_rank_0_stops_every_rank(
    kind: type[RangeFlowError], store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, first = claimed(store), Told()
    with Metrics(store.root, generation=1, step=0) as metrics:
        kept = keeper(store, first, owner, metrics)
        kept.record({"step": 3, "loss": 2.5})
        if kind is FencedError:
            claimed(store)
        else:
            monkeypatch.setattr(os, "fsync", no_space)
        with pytest.raises(kind) as here:
            kept.save(3, None, True)
        monkeypatch.undo()
    with pytest.raises(kind) as there:
        keeper(store, Other(first.told), None, None).save(3, None, True)
    assert type(there.value) is type(here.value) is kind
    assert str(there.value) == str(here.value) != ""


def no_space(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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
    assert "[rank 0 step 3] old checkpoints were not retired: " in warned
    assert "pins/loop.json: Too many levels of symbolic links" in warned
    assert [c.step for c in checkpoints(run)] == [1, 2, 3, 4, 5, 6], "none were lost by it"
    assert train_here("--run", unbroken, *data, *SHAPE) == 0
    assert [c.step for c in checkpoints(unbroken)] == [5, 6]
    assert final_digest(run) == final_digest(unbroken)


def test_a_save_is_told_with_its_step_and_digest(
    tmp_path: Path, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train_here("--run", run, *data, *SHAPE) == 0
    told = capsys.readouterr().err
    assert f"step 6 is saved, digest {final_digest(run)[:12]}" in told
    assert f"complete: 6 steps, digest {final_digest(run)}" in told


@pytest.mark.parametrize(
    ("noticed", "fenced", "stops"),
    [(False, False, False), (True, False, True), (False, True, True), (False, None, False)],
)
def test_a_notice_or_a_fence_asks_the_loop_to_stop(
    noticed: bool, fenced: bool | None, stops: bool, store: LocalStore
) -> None:
    notice: Any = SimpleNamespace(requested=lambda: noticed)
    beats: Any = None if fenced is None else SimpleNamespace(fenced=fenced)
    around = surroundings(ALONE, keeper(store, ALONE, None, None), notice, Phase(), beats)
    assert around.stop_requested() == stops


def test_the_loop_sees_this_place_in_the_world(store: LocalStore) -> None:
    world, phase = World(2, 1, CPU, "none"), Phase()
    world.size = 3
    kept = keeper(store, world, None, None)
    notice: Any = SimpleNamespace(requested=lambda: False)
    around = surroundings(world, kept, notice, phase, None)
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
    with pytest.raises(ValueError, match="closed file"):  # the stack has closed it
        metrics.add({"step": 9})
        metrics.flush()


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
