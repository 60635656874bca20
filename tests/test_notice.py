"""A notice makes the program save and leave; a second one makes it leave at once."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpointing.beats import read_beat
from checkpointing.history import history
from data_service.batches import Batches, Rows
from launch.notice import Notice
from storage.log import Log
from storage.store import LocalStore
from tests.programs import (
    ROOT,
    TIMEOUT_SECONDS,
    Program,
    checkpoints,
    curve,
    final_digest,
    rows,
    train,
    train_here,
)

PATIENT = "--grace_seconds=600"
"""No deadline: for what is not about it, on a machine that may be slow."""

SHAPE = (
    PATIENT,
    "--max_steps=12",
    "--eval_interval_steps=0",
    "--sample_interval_steps=0",
    "--save_interval_steps=0",
    "--n_embd=32",
    "--context=32",
    "--global_batch_size=8",
    "--warmup_steps=4",
    "--dropout=0.1",
)


@pytest.mark.parametrize(
    "notice",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.soak),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.soak),
    ],
)
def test_a_notice_saves_the_step_and_exits_75(
    notice: signal.Signals, tmp_path: Path, data: tuple[str, ...]
) -> None:
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    stops = [("micro_batch", 6)]
    with Program("--run", run, *data, *SHAPE, stops=stops) as program:
        place = program.stopped()
        place.send(notice, signal.SIGCONT)
        assert program.end() == 75, program.output()
    assert [c.step for c in checkpoints(run)] == [place.step + 1]
    train("--run", run, *data, *SHAPE)
    assert train_here("--run", unbroken, *data, *SHAPE) == 0
    assert final_digest(run) == final_digest(unbroken)
    assert curve(run) == curve(unbroken)


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_notice_to_one_of_two_processes_stops_both_at_the_same_step(
    fresh: bool, tmp_path: Path, data: tuple[str, ...]
) -> None:
    """Fresh, of torchrun, whose exit code depends on those of its processes."""
    run, stops = tmp_path / "run", [("micro_batch", 3)]
    with Program("--run", run, *data, *SHAPE, stops=stops, world=2, fresh=fresh) as program:
        place = program.stopped()
        place.send(signal.SIGTERM, signal.SIGCONT)
        assert program.end() != 0, "a preempted run must not look finished"
    assert [c.step for c in checkpoints(run)] == [place.step + 1]


def test_a_second_notice_ends_the_program_at_once(tmp_path: Path, data: tuple[str, ...]) -> None:
    run = tmp_path / "run"
    stops = [("micro_batch", 3), ("update:before", 1)]
    with Program("--run", run, *data, *SHAPE, stops=stops) as program:
        program.stopped().send(signal.SIGTERM, signal.SIGCONT)
        program.stopped().send(signal.SIGTERM, signal.SIGCONT)
        assert program.end() == 75
    assert checkpoints(run) == []


def test_a_rank_of_torchruns_leaves_in_order_though_a_second_notice_comes(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    """As torchrun gives it to rank 0 when rank 1 has left first."""
    run = tmp_path / "run"
    stops = [("micro_batch", 3), ("save:begin", 1)]
    with Program("--run", run, *data, *SHAPE, stops=stops, world=2) as program:
        place = program.stopped()
        place.send(signal.SIGTERM, signal.SIGCONT)
        program.stopped().send(signal.SIGTERM, signal.SIGCONT)
        assert program.end() != 0, "a preempted run must not look finished"
    assert [c.step for c in checkpoints(run)] == [place.step + 1]
    assert last_notice(run)["met"] is True


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    pipes = len(os.listdir("/proc/self/fd"))
    with Notice() as notice:
        assert not notice.requested()
        signal.raise_signal(signal.SIGTERM)
        assert notice.requested()
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1
    assert len(os.listdir("/proc/self/fd")) == pipes


def test_another_thread_hears_of_a_notice_once() -> None:
    heard = threading.Event()
    with Notice() as notice:
        notice.heard = heard.set
        signal.raise_signal(signal.SIGUSR1)
        assert heard.wait(60)
        assert notice.asked_at is not None


@pytest.mark.parametrize("phase", ["open", "claim", "prepare:unit"])
def test_a_notice_before_training_ends_the_program_without_a_step(
    phase: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with Program("--run", run, *SHAPE, stops=[(phase, 1)]) as program:
        program.stopped().send(signal.SIGTERM, signal.SIGCONT)
        assert program.end() == 75
        # Python runs the handler a few instructions after the signal: perhaps in the next phase.
        assert re.search(r"asked to stop in phase '.*', before training began", program.output())
        assert "Traceback" not in program.output()
    assert checkpoints(run) == []


def notice_at(phase: str, step: int) -> Callable[[str, int], None]:
    """A listener that gives notice when a phase is entered after so many steps, once."""
    given: list[bool] = []

    def listener(name: str, at: int) -> None:
        if (name, at) == (phase, step) and not given:
            given.append(True)
            signal.raise_signal(signal.SIGTERM)

    return listener


def last_notice(run: Path, generation: int = 1) -> dict[str, Any]:
    beat = read_beat(LocalStore(run), generation)
    assert beat["left"]
    content: dict[str, Any] = beat["notice"]
    return content


def test_a_notice_while_data_is_waited_for_is_heard_at_once(
    tmp_path: Path, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data never come; the last finished step is saved."""
    run, read = tmp_path / "run", Batches.rows_of_steps
    asked_for, release = threading.Event(), threading.Event()

    def late(batches: Batches, first: int, end: int, lo: int, hi: int) -> Rows:
        if first == 3 and not release.is_set():
            asked_for.wait(TIMEOUT_SECONDS)
            signal.raise_signal(signal.SIGTERM)
            release.wait(TIMEOUT_SECONDS)
        return read(batches, first, end, lo, hi)

    def listener(phase: str, step: int) -> None:
        if (phase, step) == ("step", 3):
            asked_for.set()
        if phase == "save:begin":
            release.set()

    monkeypatch.setattr(Batches, "rows_of_steps", late)
    monkeypatch.setattr(Batches, "steps_together", lambda batches, step, sequences: step + 1)
    assert train_here("--run", run, *data, *SHAPE, listener=listener) == 75
    assert release.is_set()
    assert [c.step for c in checkpoints(run)] == [3]
    said = last_notice(run)
    assert (said["met"], said["saved_step"], said["deadline_seconds"]) == (True, 3, 600.0)


@pytest.mark.parametrize("phase", ["evaluate", pytest.param("sample", marks=pytest.mark.soak)])
def test_what_a_notice_cuts_short_is_said_by_the_next_start(
    phase: str, tmp_path: Path, data: tuple[str, ...]
) -> None:
    """The same curves, samples, validation losses in the log, and bits as without a notice."""
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    shape = ("--eval_interval_steps=4", "--sample_interval_steps=4", "--save_interval_steps=8")
    arguments = (*data, *SHAPE, *shape, "--sample_tokens=8", "--keep_last=9")
    assert train_here("--run", unbroken, *arguments) == 0
    assert train_here("--run", run, *arguments, listener=notice_at(phase, 8)) == 75
    assert [c.step for c in checkpoints(run)] == [8]
    assert [row["step"] for row in rows(run)] == list(range(1, 8))
    assert train_here("--run", run, *arguments) == 0
    assert rows(run) == rows(unbroken)
    assert final_digest(run) == final_digest(unbroken)
    assert losses_of(run) == losses_of(unbroken)


def losses_of(run: Path) -> dict[int, float | None]:
    """The validation loss of each step in the log, as its newest COMMIT has it."""
    past = history(Log(LocalStore(run)).refresh())
    return {c.step: c.validation_loss for c in past.checkpoints}


def test_a_notice_during_restore_is_heard_before_a_step_is_begun(
    tmp_path: Path, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ("--run", run, *data, *SHAPE)
    assert train_here(*arguments, listener=notice_at("micro_batch", 4)) == 75
    begun: list[str] = []
    notice = notice_at("restore", 0)

    def listener(phase: str, step: int) -> None:
        begun.append(phase)
        notice(phase, step)

    assert train_here(*arguments, listener=listener) == 75
    assert "step" not in begun
    assert "error: asked to stop in phase 'restore', with noth" in capsys.readouterr().err
    assert [c.step for c in checkpoints(run)] == [5]
    assert last_notice(run, 2)["met"] is True


def test_at_the_deadline_the_program_leaves_though_its_save_hangs(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    arguments = ("--run", run, *data, *SHAPE, "--grace_seconds=2")
    with Program(*arguments, stops=[("micro_batch", 6)], control="hung_save") as program:
        place = program.stopped()
        place.send(signal.SIGTERM, signal.SIGCONT)
        assert program.end() == 75, program.output()
        assert "as it is: there is no time left" in program.output()
    assert checkpoints(run) == []
    said = last_notice(run)
    assert (said["met"], said["saved_step"]) == (False, 0)


def test_samples_that_one_of_two_processes_gives_up_stop_both_at_the_same_step(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    """Rank 1 draws none, and is in the next step by then."""
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    arguments = (*data, *SHAPE, "--sample_interval_steps=3", "--sample_tokens=8")
    with Program("--run", run, *arguments, stops=[("sample", 1)], world=2) as program:
        program.stopped().send(signal.SIGTERM, signal.SIGCONT)
        assert program.end() != 0, "a preempted run must not look finished"
    assert [c.step for c in checkpoints(run)] == [3]
    assert train_here("--run", run, *arguments) == 0
    assert train_here("--run", unbroken, *arguments) == 0
    assert rows(run) == rows(unbroken)
    assert final_digest(run) == final_digest(unbroken)


def test_a_notice_while_other_processes_are_waited_for_ends_the_program_at_once(
    tmp_path: Path,
) -> None:
    """The main thread waits in torch, where no handler of Python's runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "launch/train.py", "--run", str(tmp_path), PATIENT]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **alone}) as program:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not listens(port):
            assert program.poll() is None and time.monotonic() < deadline
            os.sched_yield()
        program.send_signal(signal.SIGTERM)
        assert program.wait(TIMEOUT_SECONDS) == 75


def listens(port: int) -> bool:
    with socket.socket() as there:
        return there.connect_ex(("127.0.0.1", port)) == 0
