"""A program under measurement: each line it prints has a time, and its ranks can be killed."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import CLOCK_BOOTTIME, clock_gettime

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 180.0
_STEP = re.compile(r"\bstep (\d+)/\d+ ")


def now() -> float:
    """Seconds on the clock that /proc gives the starts of processes in."""
    return clock_gettime(CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Line:
    """One line, and when it came."""

    at: float
    text: str

    @property
    def step(self) -> int | None:
        """The step that it tells of, if it does."""
        found = _STEP.search(self.text)
        return int(found[1]) if found else None


class Program:
    """Started in the repository's root; use it with `with`, which ends all of its processes."""

    def __init__(
        self, command: Sequence[str | Path], environment: Mapping[str, str] | None = None
    ) -> None:
        self.begun = now()
        self._process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._lines: list[Line] = []
        self._closed = False
        self._news = threading.Condition()  # its lock is reentrant
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *error: object) -> None:
        while left := [self._process.pid, *_below(self._process.pid)]:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self._process.poll() is not None:
                break
        self._reader.join()

    @property
    def lines(self) -> list[Line]:
        """All lines so far."""
        with self._news:
            return list(self._lines)

    def tail(self) -> str:
        """The last lines, to be shown with an error."""
        return "\n".join(line.text for line in self.lines[-30:])

    def highest_step(self) -> int:
        """That it has told of so far."""
        return max((line.step or 0 for line in self.lines), default=0)

    def line(self, wanted: Callable[[Line], bool], after: int = 0) -> Line:
        """The first line from number `after` on that is wanted; waits for it."""
        end = now() + LIMIT_SECONDS
        seen = after
        with self._news:
            while True:
                for line in self._lines[seen:]:
                    if wanted(line):
                        return line
                seen = len(self._lines)
                if self._closed or now() > end:
                    raise RuntimeError(f"it never said what was waited for: {self.tail()}")
                self._news.wait(1.0)

    def end(self) -> int:
        """Wait for its end; the exit code."""
        code = self._process.wait(timeout=LIMIT_SECONDS)
        self._reader.join()
        return code

    def ranks(self) -> list[int]:
        """The processes that torchrun has started, by rank."""
        found = {}
        for pid in _below(self._process.pid):
            with suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                rank = next((v[5:] for v in variables if v.startswith(b"RANK=")), None)
                if rank is not None:
                    found[int(rank)] = pid
        return [found[rank] for rank in sorted(found)]

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for text in stream:
                with self._news:
                    self._lines.append(Line(now(), text.rstrip("\n")))
                    self._news.notify_all()
        with self._news:
            self._closed = True
            self._news.notify_all()


def started_at(pid: int) -> float:
    """When a process was started."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def parent_of(pid: int) -> int:
    """The process that started it."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _below(pid: int) -> list[int]:
    """Every process below this one."""
    found = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *_below(int(child))]
    return found


TRAINING = (
    "--log_interval_steps=1",
    "--save_interval_steps=20",
    "--max_steps=1000000",
    "--eval_interval_steps=0",
    "--sample_interval_steps=0",
)
"""Of the preset `tiny`: a line for each step, a save every 20."""
SAVE_EVERY = 20


def supervised(*torchrun: str) -> list[str]:
    """The command line of the supervisor, up to the training program."""
    return [sys.executable, "-m", "launch.supervise", "--metadata=none", "--", *torchrun, "--"]


def torchrun_alone(*arguments: str, python: str = sys.executable) -> list[str]:
    """The command line of torchrun, up to the training program."""
    return [python, "-m", "torch.distributed.run", *arguments, "--"]
