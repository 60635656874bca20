"""Tasks of contestants, each rank in a process of its own, ended at a limit of time or memory."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.checkpoint_memory import memory_bytes
from benchmarks.data_tasks import Task

ROOT = Path(__file__).resolve().parents[1]
LOOK_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """When a task is ended."""

    seconds: float = 600.0
    bytes: int = 16 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a task: an answer of each rank, or why there is none."""

    answers: list[dict[str, Any]]
    seconds: float
    peak_bytes: int
    failure: str = ""


def run_task(task: Task, limits: Limits) -> Outcome:
    """One process."""
    return run_ranks([task], limits)


def run_ranks(tasks: Sequence[Task], limits: Limits) -> Outcome:
    """Processes that know each other by torchrun's environment variables, all at once."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        port = _free_port()
        processes = [
            _started(task, rank, len(tasks), port, Path(folder)) for rank, task in enumerate(tasks)
        ]
        peak, failure = 0, ""
        try:
            while any(process.poll() is None for process in processes):
                now = sum(memory_bytes(process.pid) for process in processes)
                peak = max(peak, now)
                if time.monotonic() - begun > limits.seconds:
                    failure = f"> {limits.seconds:.0f} s"
                elif now > limits.bytes:
                    failure = f"> {limits.bytes / 2**30:.0f} GiB"
                if failure:
                    break
                time.sleep(LOOK_SECONDS)
        finally:
            for process in processes:
                _end(process)
        seconds = time.monotonic() - begun
        answers = []
        for rank, process in enumerate(processes):
            output = (Path(folder) / f"out-{rank}").read_text().splitlines()
            if process.returncode == 0 and output:
                answers.append(json.loads(output[-1]))
            elif not failure:
                errors = (Path(folder) / f"err-{rank}").read_text()
                print(errors[-3000:], file=sys.stderr)
                failure = f"failed: {_last_line(errors)}"
    return Outcome(answers=answers, seconds=seconds, peak_bytes=peak, failure=failure)


def _started(task: Task, rank: int, world: int, port: int, folder: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",  # as torchrun sets it
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    if world > 1:
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    with open(folder / f"out-{rank}", "wb") as out, open(folder / f"err-{rank}", "wb") as err:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.data_tasks"),
                replace(task, started=time.time()).to_json(),
            ],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a task and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "without a word"
