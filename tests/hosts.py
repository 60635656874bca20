"""Hosts for tests: programs on them whose output is waited for, and servers on their bridge."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from launch.chaos import hosts
from launch.chaos.hosts import Host, Network, why_no_hosts
from tests.programs import ROOT, TIMEOUT_SECONDS

Made = TypeVar("Made")
_CLONE_NEWNET = 0x40000000


class Running:
    """A program on a host. Its output is kept, and can be waited for; it ends with its host."""

    def __init__(self, host: Host, *command: str | Path, **environment: str) -> None:
        self._process = subprocess.Popen(
            host.entering(*command),
            cwd=ROOT,
            env={**os.environ, **environment},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._lines: list[str] = []
        self._closed = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The program's process, as this machine counts: the only child of what entered the host"""
        entered = self._process.pid
        children = Path(f"/proc/{entered}/task/{entered}/children")
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (found := children.read_text().split()):
            assert self._process.poll() is None and time.monotonic() < deadline, self.output()
            os.sched_yield()
        return int(found[0])

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the program."""
        os.kill(self.pid, number)

    def says(self, text: str, times: int = 1, others: Sequence["Running"] = ()) -> None:
        """Wait until so many lines with this text have been printed; fails when it ends before.

        Or when one of the `others` does.
        """
        deadline = time.monotonic() + TIMEOUT_SECONDS
        with self._news:
            while sum(text in line for line in self._lines) < times:
                left = deadline - time.monotonic()
                assert not self._closed and left > 0, f"never said {text!r}: {self.output()}"
                ended = [other.output() for other in others if other._closed]
                assert not ended, f"ended before {text!r} was said: {ended[0]}"
                self._news.wait(min(left, 1.0))

    def end(self) -> int:
        """Wait for the end; the exit code."""
        self._reader.join(TIMEOUT_SECONDS)
        assert self._closed, f"it did not end: {self.output()}"
        return self._process.wait()

    def output(self) -> str:
        """What it has printed so far."""
        return "".join(self._lines)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with self._news:
                    self._lines.append(line)
                    self._news.notify_all()
        self._process.wait()
        with self._news:
            self._closed = True
            self._news.notify_all()


def python(host: Host, *arguments: str | Path, **environment: str) -> Running:
    """Start Python on a host."""
    return Running(host, sys.executable, *arguments, **environment)


@contextmanager
def network(count: int) -> Iterator[Network]:
    """Hosts 0 to `count - 1`. Skips the test, with the reason, where they cannot be made."""
    if why_not := why_no_hosts():
        pytest.skip(f"hosts cannot be made here: {why_not}")
    with hosts.network(count) as made:
        yield made


def inside(lan: Network, make: Callable[[], Made]) -> Made:
    """What `make` returns; sockets that it makes are on the bridge, at `hosts.GATEWAY`."""
    made: list[Made] = []

    def work() -> None:
        enter_network(lan.namespace)
        made.append(make())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return made[0]


def enter_network(pid: int) -> None:
    """Move this thread, for good, into the network of a process."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net") as place:
        if libc.setns(place.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns failed")
