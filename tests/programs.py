"""Starts the real programs, kills them, and reads what they left."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checkpointing.history import Checkpoint, history
from launch.train import main
from storage.log import Log
from storage.store import open_store
from tests.forks import ROOT, Fork
from tests.ranks import Ranks

TIMEOUT_SECONDS = 600.0


def train_here(*arguments: str | Path, listener: object = None) -> int:
    """The training program in this process; returns its exit code."""
    return main([str(a) for a in arguments], listener)  # type: ignore[arg-type]


class Program:
    """The training program in processes of its own, rank 0 of which stops at given phases.

    `stops` are (phase, n): the nth time it is entered, counted from the stop before; every start of
    a `supervised` program stops at them anew. `fresh` starts it as a user does, with an interpreter
    that has imported nothing, by torchrun for a larger world, as `supervised` does; other starts
    are forks, which are three seconds cheaper for each process.
    """

    def __init__(
        self,
        *arguments: str | Path,
        stops: Sequence[tuple[str, int]] = (),
        world: int = 1,
        control: str = "none",
        fresh: bool = False,
        supervised: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        fifo = Path(self._folder.name, "stops")
        os.mkfifo(fifo)
        self._reader = os.open(fifo, os.O_RDWR)
        places = ",".join(f"{phase}={n}" for phase, n in stops)
        program = [ROOT / "tests" / "killable.py", fifo, places, control, *arguments]
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        env = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[str] | Fork | Ranks
        if fresh or supervised:
            torchrun = ["--standalone", f"--nproc_per_node={world}", "--"]
            if supervised:
                minded = ["launch.supervise", "--metadata=none", "--grace_seconds=120", "--"]
                torchrun = ["-m", *minded, *torchrun]
            else:
                torchrun = ["-m", "torch.distributed.run", *torchrun] if world > 1 else []
            command = [sys.executable, *torchrun, *program]
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=env, text=True, stdout=self._output, stderr=subprocess.STDOUT
            )
        elif world > 1:
            self._process = Ranks(program, [self._output] * world, environment=env)
        else:
            self._process = Fork(program, env=env, output=self._output)

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._reader)
        self._output.close()
        self._folder.cleanup()

    def stopped(self) -> "Stopped":
        """Wait until rank 0 has stopped at the next place; fails when the program ends first."""
        process, poll = self._process, select.poll()
        fresh = isinstance(process, subprocess.Popen)
        ends = [os.pidfd_open(process.pid)] if fresh else process.pidfds
        for fd in (self._reader, *ends):
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(TIMEOUT_SECONDS * 1000)}
        if fresh:
            os.close(*ends)
        assert self._reader in ready, f"no stop: {self.output()}"
        pid, step = os.read(self._reader, 100).split()
        stat = Path(f"/proc/{int(pid)}/stat")
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, "it said that it would stop, and did not"
            os.sched_yield()
        return Stopped(pid=int(pid), step=int(step))

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the program; in several processes, to torchrun."""
        self._process.send_signal(number)

    def ended_within(self, seconds: float) -> bool:
        """Whether the program ends by itself in that time."""
        try:
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self) -> int:
        """Wait for the end; the exit code."""
        return self._process.wait(timeout=TIMEOUT_SECONDS)

    def output(self) -> str:
        """What it has printed so far."""
        self._output.seek(0)
        return self._output.read()


@dataclass(frozen=True)
class Stopped:
    """Rank 0 of a program, stopped after `step` finished steps."""

    pid: int
    step: int

    def send(self, *signals: signal.Signals) -> None:
        """Send signals, for example SIGTERM and then SIGCONT."""
        for number in signals:
            os.kill(self.pid, number)


def train(
    *arguments: str | Path, world: int = 1, control: str = "none", fresh: bool = False
) -> None:
    """The training program, to its end, in `world` processes. Fails the test on another end."""
    with Program(*arguments, world=world, control=control, fresh=fresh) as program:
        assert program.end() == 0, program.output()


def train_until_killed(
    *arguments: str | Path,
    phase: str,
    nth: int = 1,
    world: int = 1,
    control: str = "none",
    fresh: bool = False,
) -> Stopped:
    """Start the training program; SIGKILL its rank 0 when it enters `phase` for the nth time."""
    stops = [(phase, nth)]
    with Program(*arguments, stops=stops, world=world, control=control, fresh=fresh) as program:
        place = program.stopped()
        place.send(signal.SIGKILL)
        code = program.end()
        assert world > 1 or code == -signal.SIGKILL
        return place


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
    return [
        {name: value for name, value in row.items() if not name.startswith("data_")}
        for row in found
    ]
