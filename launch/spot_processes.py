"""Replays a spot trace with the real training program, in compressed time.

The program is started when the trace has a machine, and killed with SIGKILL when it has none.

Covers: one process on this machine.
Does not cover: several hosts; `launch.chaos` does that.
"""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from launch.exit_codes import COMPLETE, FENCED, PERMANENT, START_AGAIN
from launch.minded import die_with_parent
from launch.spot_simulation import Segment
from storage.errors import ConfigurationError

_MEANING = {PERMANENT: "change something first", FENCED: "another job has claimed the run"}

_PROGRAM = Path(__file__).resolve().with_name("train.py")


class Process(Protocol):
    """What is needed of a program that was started."""

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


def replay_with_processes(
    url: str,
    training: Sequence[str],
    stretches: Sequence[Segment],
    compress: float,
    *,
    start: Callable[[Sequence[str]], Process] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Start and kill the program as the trace says, until the run is complete or the trace ends.

    `compress` seconds of the trace pass in one. A program that asks to be started again is. Raises
    ConfigurationError when it ends with an error that no restart helps.
    """
    if not 0 < compress < math.inf:
        raise ConfigurationError(f"--compress must be a number above 0, got {compress:g}")
    command = [sys.executable, str(_PROGRAM), "--run", url, *training]
    begun = clock()
    report: dict[str, Any] = {"url": url, "starts": 0, "kills": 0, "complete": False}
    for here in stretches:
        end = begun + here.end / 1e6 / compress
        if not here.nodes:
            sleep(max(0.0, end - clock()))
            continue
        while clock() < end:
            process = (start or started)(command)
            report["starts"] += 1
            code = _ended(process, end - clock())
            if code is None:
                report["kills"] += 1
            elif code == COMPLETE:
                return {**report, "complete": True}
            elif code != START_AGAIN:
                change = _MEANING.get(code, "a defect")
                raise ConfigurationError(
                    f"the training program ended with exit code {code} ({change}); its messages "
                    "are above"
                )
    return report


def started(command: Sequence[str]) -> Process:
    """`--json` has stdout for itself. A replay that is killed leaves no program behind."""
    return subprocess.Popen(command, stdout=2, preexec_fn=partial(die_with_parent, os.getpid()))


def _ended(process: Process, seconds: float) -> int | None:
    """The exit code of a process that ends in time; None, and it is killed, if it does not."""
    try:
        return process.wait(timeout=max(0.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None
    except BaseException:  # whoever interrupts this must not leave it behind
        process.kill()
        process.wait()
        raise
