"""A trace replayed with processes: started and killed when the trace says so."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.accounting import account, lives_of
from launch.goodput import main
from launch.spot_processes import replay_with_processes
from launch.spot_simulation import Segment, segments
from storage.errors import ConfigurationError
from tests.programs import final_digest, train

ROOT = Path(__file__).resolve().parents[1]


class Time:
    """A clock that only waiting moves on."""

    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Fake:
    """A program that would end by itself after so many seconds, with a code."""

    def __init__(self, time: Time, seconds: float, code: int) -> None:
        self._time, self._seconds, self._code = time, seconds, code
        self.killed = False

    def wait(self, timeout: float | None = None) -> int:
        if timeout is not None and timeout < self._seconds:
            self._time.now += timeout
            raise subprocess.TimeoutExpired("train", timeout)
        if not self.killed:
            self._time.now += self._seconds
        return self._code

    def kill(self) -> None:
        self.killed = True


class Started:
    """Starts fakes that live so long and end with such codes; remembers when."""

    def __init__(self, time: Time, *fates: tuple[float, int]) -> None:
        self._time, self._fates = time, iter(fates)
        self.at: list[float] = []
        self.fakes: list[Fake] = []
        self.commands: list[Sequence[str]] = []

    def __call__(self, command: Sequence[str]) -> Fake:
        self.at.append(self._time.now - 100.0)
        self.commands.append(command)
        self.fakes.append(Fake(self._time, *next(self._fates)))
        return self.fakes[-1]


TRACE = segments([1, 1, 0, 1, 1, 1], 100.0, "single", 1)


def replayed(
    time: Time, start: Started, stretches: Sequence[Segment] = TRACE, compress: float = 10.0
) -> dict[str, object]:
    return replay_with_processes(
        "runs/x",
        ["--max_steps=3"],
        stretches,
        compress,
        start=start,
        clock=time.clock,
        sleep=time.sleep,
    )


def test_it_is_started_and_killed_when_the_trace_says_so() -> None:
    time = Time()
    start = Started(time, (1e9, 0), (1e9, 0))
    assert replayed(time, start) == {
        "url": "runs/x",
        "starts": 2,
        "kills": 2,
        "complete": False,
    }
    assert start.at == [0.0, 30.0]
    assert all(fake.killed for fake in start.fakes)
    assert time.now == 160.0
    assert list(start.commands[0][-3:]) == ["--run", "runs/x", "--max_steps=3"]


def test_a_program_that_asks_for_it_is_started_again_and_a_complete_run_ends() -> None:
    time = Time()
    start = Started(time, (5.0, 75), (1e9, 0), (12.0, 0))
    found = replayed(time, start)
    assert (found["starts"], found["kills"], found["complete"]) == (3, 1, True)
    assert start.at == [0.0, 5.0, 30.0]


@pytest.mark.parametrize(
    ("code", "why"), [(78, "change something first"), (76, "another job"), (1, "a defect")]
)
def test_an_error_that_no_restart_helps_ends_it(code: int, why: str) -> None:
    time = Time()
    with pytest.raises(ConfigurationError, match=f"exit code {code} .{why}"):
        replayed(time, Started(time, (1.0, code)))


def test_who_is_interrupted_leaves_no_program_behind() -> None:
    class Interrupted(Fake):
        def wait(self, timeout: float | None = None) -> int:
            if not self.killed:
                raise KeyboardInterrupt
            return -9

    time = Time()
    fake = Interrupted(time, 0.0, 0)
    with pytest.raises(KeyboardInterrupt):
        replay_with_processes("r", [], TRACE, 1.0, start=lambda _: fake, clock=time.clock)
    assert fake.killed


REPLAY = """
import sys
from launch.spot_processes import started
started([sys.executable, "-c", sys.argv[1]]).wait()
"""
PROGRAM = "import os, signal; print(os.getpid(), flush=True); signal.pause()"


def test_a_replay_that_is_killed_leaves_no_program_behind() -> None:
    command = [sys.executable, "-c", REPLAY, PROGRAM]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as replay:
        assert replay.stderr is not None
        pidfd = os.pidfd_open(int(replay.stderr.readline()))
        replay.kill()
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        gone = poll.poll(60_000)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL) if not gone else None
        os.close(pidfd)
    assert gone


@pytest.mark.parametrize("compress", [0.0, -1.0, float("nan"), float("inf")])
def test_time_is_compressed_by_a_number_above_0(compress: float) -> None:
    time = Time()
    with pytest.raises(ConfigurationError, match="--compress must be a number above 0"):
        replayed(time, Started(time), compress=compress)


@pytest.mark.soak
def test_the_real_program_killed_along_a_trace_ends_with_the_digest_of_one_never_killed(
    tmp_path: Path, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine lives for 0.6 of what the whole run takes here, so that at least one is lost."""
    training = (*data, "--max_steps=100", "--save_interval_steps=5", "--sample_interval_steps=0")
    begun = time.monotonic()
    train("--run", tmp_path / "whole", *training)
    seconds = time.monotonic() - begun
    trace = tmp_path / "trace.json"
    counts = ([1] * 60 + [0]) * 40
    trace.write_text(json.dumps({"metadata": {"gap_seconds": 1}, "data": counts}))
    run = str(tmp_path / "killed")
    compress = f"--compress={100 / seconds}"
    arguments = ["replay", run, "--trace", str(trace), "--processes", compress, "--json"]
    assert main([*arguments, "--", *training]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["complete"] and report["kills"] >= 1
    assert final_digest(run) == final_digest(tmp_path / "whole")
    found = account(lives_of(run))
    assert found.incarnations <= report["starts"]
    assert sum(found.parts.values()) == found.wall
    assert found.parts["step"] > 0 and found.parts["gap"] > 0
