"""Starts the supervisor over stand-ins for torchrun and its ranks, and watches what is left."""

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_SECONDS = 120.0


class Supervised:
    """`fake_torchrun.py` below the real supervisor; stdout and stderr come as one text.

    `prefix` is a command that starts it, `control` what is left out. Use it with `with`.
    """

    def __init__(
        self,
        world: int,
        starts: str,
        *flags: str,
        control: str = "fake",
        prefix: Sequence[str] = (),
    ) -> None:
        command = [*prefix, sys.executable, str(ROOT / "tests" / "supervised.py"), control]
        if not any(flag.startswith("--metadata") for flag in flags):
            flags = (*flags, "--metadata=none")
        self._process = subprocess.Popen(
            [*command, *flags, "--", str(world), starts],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
        self.pid = self._process.pid
        self._seen = b""
        self._pidfds: list[int] = []

    def __enter__(self) -> "Supervised":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        for pidfd in self._pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)

    def line(self, containing: str) -> str:
        """Wait for the next line with this text in it."""
        assert self._process.stdout is not None
        while True:
            line = self._process.stdout.readline()
            assert line, f"no {containing!r} in: {self._seen.decode()}"
            self._seen += line
            if containing in line.decode():
                return line.decode().rstrip()

    def pid_of(self, containing: str) -> int:
        """The process id at the end of the next line with this text in it; its end is watched."""
        pid = int(self.line(containing).rpartition(" ")[2])
        self._pidfds.append(os.pidfd_open(pid))
        return pid

    def pidfd(self, pid: int) -> int:
        """To signal a process by, whose end is watched."""
        self.watch(pid)
        return self._pidfds[-1]

    def end_of_supervisor(self) -> int:
        """The exit code, whoever still holds its output."""
        return self._process.wait(timeout=TIMEOUT_SECONDS)

    def children(self) -> list[int]:
        """The processes that it has started itself."""
        return children(self.pid)

    def watch(self, *pids: int) -> None:
        """Watch the end of these processes as well."""
        self._pidfds += [os.pidfd_open(pid) for pid in pids]

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        """The exit code."""
        rest, _ = self._process.communicate(timeout=TIMEOUT_SECONDS)
        self._seen += rest
        return self._process.returncode

    def output(self) -> str:
        """What was printed until the last line that was waited for, or until the end."""
        return self._seen.decode()

    def left(self, seconds: float = TIMEOUT_SECONDS) -> int:
        """How many of the watched processes do not end by themselves in that time."""
        count = 0
        for pidfd in self._pidfds:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            count += not poll.poll(seconds * 1000)
        return count


def children(pid: int) -> list[int]:
    """The children of a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found
