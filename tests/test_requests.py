"""What operators ask of a run that trains is done, and answered once it is done."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from checkpointing.asks import ask
from checkpointing.incarnation import claim_run
from checkpointing.runs import main
from checkpointing.save import TrainingState
from launch.config import parse_config
from launch.phase import Phase
from launch.running import Keeper
from launch.world import World
from storage.log import Log
from storage.store import LocalStore, open_store
from tests.programs import (
    TIMEOUT_SECONDS,
    Program,
    checkpoints,
    final_digest,
    train,
    train_here,
)

SHAPE = (
    "--max_steps=8",
    "--eval_interval_steps=0",
    "--sample_interval_steps=0",
    "--save_interval_steps=0",
    "--n_embd=32",
    "--context=32",
    "--global_batch_size=8",
    "--warmup_steps=2",
    "--wait_for_saves",
)


@pytest.fixture(autouse=True)
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpointing.beats.BEAT_SECONDS", 0.01)


def seen(place: str) -> list[str]:
    return open_store(place).list("requests/")


def train_asked(run: Path, data: tuple[str, ...], what: str, at_step: int) -> int:
    """Train; ask at a step, and let the step begin when a heartbeat has had the time to look."""
    asked: list[str] = []

    def listener(phase: str, step: int) -> None:
        if phase == "step" and step == at_step and not asked:
            asked.append(ask(open_store(str(run)), what))
            _wait_for_beats(run, 2)

    return train_here("--run", run, *data, *SHAPE, listener=listener)


def _wait_for_beats(run: Path, more: int) -> None:
    """Until so many more heartbeats have been written, each followed by a look for requests."""

    def count() -> int:
        return max(json.loads(p.read_text())["count"] for p in (run / "beats").glob("*.json"))

    first, deadline = count(), time.monotonic() + TIMEOUT_SECONDS
    while count() <= first + more:
        assert time.monotonic() < deadline, "no heartbeat in all this time"
        os.sched_yield()


def test_a_save_is_made_when_an_operator_asks(tmp_path: Path, data: tuple[str, ...]) -> None:
    run = tmp_path / "run"
    assert train_asked(run, data, "save", at_step=3) == 0
    assert [c.step for c in checkpoints(run)] == [4, 8]
    assert seen(str(run)) == []


def test_a_run_asked_to_stop_saves_and_leaves_and_goes_on_later(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    unbroken, stopped = tmp_path / "unbroken", tmp_path / "stopped"
    assert train_here("--run", unbroken, *data, *SHAPE) == 0
    assert train_asked(stopped, data, "stop", at_step=3) == 0, "nobody is to start it again"
    assert [c.step for c in checkpoints(stopped)] == [4]
    assert seen(str(stopped)) == []
    assert train_here("--run", stopped, *data, *SHAPE) == 0
    assert final_digest(stopped) == final_digest(unbroken)


def test_what_is_asked_after_the_last_look_waits_for_the_next_save(tmp_path: Path) -> None:
    """As during a long evaluation: nobody has acted on it yet, so it is not answered."""
    store = LocalStore(tmp_path)
    empty = TrainingState(tensors={}, exact={}, extra={})
    owner = claim_run(store, Log(store), body={}, take_over=True)
    config = parse_config([f"--run={tmp_path}"])
    alone = World(0, 1, torch.device("cpu"), "none")
    with Keeper(config, alone, store, owner, None, lambda step: empty, Phase(), None) as kept:
        assert not kept.flags().save_due
        ask(store, "save")
        kept.beat()
        assert kept.save(1, validation_loss=None, healthy=True, wait=True)
        kept.beat()
        assert seen(str(tmp_path)) and kept.flags().save_due
        assert kept.save(2, validation_loss=None, healthy=True, wait=True)
        assert not seen(str(tmp_path))


def test_a_start_that_is_killed_while_it_stops_has_answered_nothing(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    """So the next start, which nobody but a supervisor has wanted, stops as well."""
    run = tmp_path / "run"
    stops = [("retire:chosen", 1)]  # after the commit
    arguments = ("--run", run, *data, *SHAPE, "--keep_last=2")
    assert train_here(*arguments, "--max_steps=2", "--save_interval_steps=1") == 0
    ask(open_store(str(run)), "stop")
    with Program(*arguments, stops=stops, control="prompt") as program:
        program.stopped().send(signal.SIGKILL)
        program.end()
    assert seen(str(run)) != []
    train(*arguments, world=2, control="prompt")
    assert seen(str(run)) == []
    assert [c.step for c in checkpoints(run)] == [3, 4]


def test_a_stop_that_comes_with_the_last_step_is_answered_by_the_end(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    assert train_asked(run, data, "stop", at_step=7) == 0
    assert final_digest(run) and seen(str(run)) == []


def test_the_command_asks_and_says_who_will_answer(
    tmp_path: Path, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train_here("--run", run, *data, *SHAPE) == 0
    capsys.readouterr()
    assert main(["ask", str(run), "save"]) == 0
    assert "nobody trains this run now, so the next start answers" in capsys.readouterr().out
    assert main(["ask", str(run), "stop", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["request"] in seen(str(run))
    assert main(["ask", str(run), "dance"]) == 78
    assert main(["ask", str(tmp_path / "none"), "save"]) == 78


def test_an_interval_by_the_clock_saves_without_an_interval_in_steps(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    assert train_here("--run", run, *data, *SHAPE, "--save_interval_seconds=0.000001") == 0
    assert [c.step for c in checkpoints(run)][-1] == 8
    assert len(open_store(str(run)).list("log/")) > 8


def test_an_interval_that_is_no_number_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here("--run", tmp_path / "run", "--save_interval_seconds=-1") == 78
    assert "save_interval_seconds must be a number from 0" in capsys.readouterr().err
