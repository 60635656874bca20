"""Starts the real programs, kills them, and reads what they left."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checkpointing.history import Checkpoint, history
from launch.train import main
from storage.log import Log
from storage.store import open_store

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class Killed:
    """Where a process was when it was killed."""

    pid: int
    step: int


def train_here(*arguments: str | Path, listener: object = None) -> int:
    """The training program in this process; returns its exit code."""
    return main([str(a) for a in arguments], listener)  # type: ignore[arg-type]


def train(*arguments: str | Path, world: int = 1, control: str = "none") -> None:
    """The training program, to its end, in `world` processes. Fails the test on another end."""
    process = _start(arguments, "nothing", "never", 1, world, control)
    output = process.communicate(timeout=TIMEOUT_SECONDS)[0]
    assert process.returncode == 0, output


def train_until_killed(
    *arguments: str | Path, phase: str, nth: int = 1, world: int = 1, control: str = "none"
) -> Killed:
    """Start the training program; SIGKILL its rank 0 when it enters `phase` for the nth time."""
    with tempfile.TemporaryDirectory() as folder:
        fifo = Path(folder, "announcements")
        os.mkfifo(fifo)
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        process = _start(arguments, fifo, phase, nth, world, control)
        ended = os.pidfd_open(process.pid)
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        poll.register(ended, select.POLLIN)
        try:
            ready = {fd for fd, _ in poll.poll(TIMEOUT_SECONDS * 1000)}
            if reader not in ready:
                process.kill()
                raise AssertionError(f"{phase!r} was not entered: {process.communicate()[0]}")
            pid, step = os.read(reader, 100).split()
            os.kill(int(pid), signal.SIGKILL)
            process.communicate(timeout=TIMEOUT_SECONDS)
        finally:
            os.close(reader)
            os.close(ended)
    if world == 1:
        assert process.returncode == -signal.SIGKILL
    return Killed(pid=int(pid), step=int(step))


def _start(
    arguments: Sequence[str | Path],
    fifo: str | Path,
    phase: str,
    nth: int,
    world: int,
    control: str,
) -> "subprocess.Popen[str]":
    program = [ROOT / "tests" / "killable.py", fifo, phase, str(nth), control, *arguments]
    command = [sys.executable, *program]
    if world > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, f"--nproc_per_node={world}", "--", *program]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def checkpoints(run: Path | str) -> list[Checkpoint]:
    """The live checkpoints of a run, oldest first."""
    return list(history(Log(open_store(str(run))).refresh()).live)


def final_digest(run: Path | str) -> str:
    """The digest that the run ended with; fails when it has not ended."""
    past = history(Log(open_store(str(run))).refresh())
    assert past.end is not None, "the run has no END record"
    assert past.end.body["digest"] == past.live[-1].digest
    digest: str = past.end.body["digest"]
    return digest


def curve(run: Path, name: str = "loss") -> list[tuple[int, float]]:
    """(step, value) as TensorBoard's own reader gives them."""
    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(name)]


def rows(run: Path) -> list[dict[str, object]]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in found:
        del row["time"], row["tokens_per_second"]
    return found
