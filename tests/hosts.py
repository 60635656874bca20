"""Hosts of a small network on this machine, to be cut off, healed and killed.

A host is a process 1 with namespaces of its own: network, processes, host name, mounts. Each has
`eth0` at 10.77.0.<n + 1>, a port of a bridge in a namespace that only holds the bridge. Nothing has
a name outside: when the processes 1 end, also because the tests were killed, everything is gone.

Covers: black holes (a port that is down answers nothing), hosts that lose power (all processes end,
and nobody is told), another host name and process namespace, so that nobody takes one host for
another. Does not cover: clocks and disks, which are this machine's.
"""

import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pytest

from tests.programs import ROOT, TIMEOUT_SECONDS

Made = TypeVar("Made")

GATEWAY = "10.77.0.254"
"""Of every host; the bridge itself, where `Network.inside` makes servers listen."""

_INIT = ("sh", "-c", "hostname $0; trap '' CHLD; echo ready; exec cat >/dev/null")
_UNSHARE = ("unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child")
"""Process 1 ends when its standard input does; ignoring SIGCHLD, it leaves no zombies."""
_CLONE_NEWNET = 0x40000000


class Running:
    """A program on a host. Its output is kept, and can be waited for."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
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
        try:
            code = self._process.wait(timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end: {self.output()}") from None
        self._reader.join()
        return code

    def output(self) -> str:
        """What it has printed so far."""
        return "".join(self._lines)

    def close(self) -> None:
        """After the end of its host."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with self._news:
                    self._lines.append(line)
                    self._news.notify_all()
        with self._news:
            self._closed = True
            self._news.notify_all()


class Host:
    """One host. `name` is its host name, `address` that of its only link."""

    def __init__(self, network: "Network", number: int) -> None:
        self.name = f"host{number}"
        self.address = f"10.77.0.{number + 1}"
        self._network = network
        self._port = f"port{number}"
        self._init = _Init(self.name)
        self._running: list[Running] = []
        network.ip(f"link add {self._port} type veth peer name eth0 netns {self._init.pid}")
        network.ip(f"link set {self._port} master lan up")
        self.call("ip", "link", "set", "lo", "up")
        self.call("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.call("ip", "link", "set", "eth0", "up")
        self.call("ip", "route", "add", "default", "via", GATEWAY)

    def start(self, *command: str | Path, **environment: str) -> Running:
        """Start a program, in the repository's root."""
        running = Running(self._init.entering(*map(str, command)), environment)
        self._running.append(running)
        return running

    def python(self, *arguments: str | Path, **environment: str) -> Running:
        """Start Python."""
        return self.start(sys.executable, *arguments, **environment)

    def call(self, *command: str | Path) -> str:
        """Run a command to its end; what it prints. Fails the test when it fails."""
        done = subprocess.run(
            self._init.entering(*map(str, command)), cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def process(self, number: int) -> int:
        """The process that a program of this host knows by this number, as this machine counts."""
        space = str(Path(f"/proc/{self._init.pid}/ns/pid").readlink())
        for pid in processes_of(space):
            with suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                if re.search(rf"^NSpid:.*\t{number}$", status, re.MULTILINE):
                    return pid
        raise AssertionError(f"{self.name} has no process {number}")

    @property
    def namespace(self) -> int:
        """Process 1, by which this machine finds the host's network."""
        return self._init.pid

    def cut(self) -> None:
        """From now on nothing comes or goes, and nobody is told."""
        self._network.ip(f"link set {self._port} down")

    def heal(self) -> None:
        """The link works again."""
        self._network.ip(f"link set {self._port} up")

    def kill(self) -> None:
        """As a loss of power: the link is down, and then every process ends at once."""
        self.cut()
        self._end()

    def _end(self) -> None:
        self._init.end()
        for running in self._running:
            running.close()


class Network:
    """Hosts, by number, and the bridge that joins them."""

    def __init__(self) -> None:
        self._bridge = _Init("bridge")
        self.hosts: list[Host] = []
        self.ip("link add lan type bridge")
        self.ip(f"address add {GATEWAY}/24 dev lan")
        self.ip("link set lan up")
        self.ip("link set lo up")

    def __getitem__(self, number: int) -> Host:
        return self.hosts[number]

    def add(self) -> Host:
        """One more host."""
        self.hosts.append(Host(self, len(self.hosts)))
        return self.hosts[-1]

    def ip(self, command: str) -> None:
        """An `ip` command where the bridge is."""
        enter = ["nsenter", "--target", str(self._bridge.pid), "--net", "ip"]
        done = subprocess.run([*enter, *command.split()], capture_output=True, text=True)
        assert done.returncode == 0, f"ip {command}: {done.stderr}"

    def inside(self, make: Callable[[], Made]) -> Made:
        """What `make` returns; sockets that it makes are on the bridge, at `GATEWAY`."""
        made: list[Made] = []

        def work() -> None:
            enter_network(self._bridge.pid)
            made.append(make())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return made[0]

    def close(self) -> None:
        """End everything on every host, and the hosts."""
        for host in self.hosts:
            host._end()
        self._bridge.end()


@contextmanager
def network(count: int) -> Iterator[Network]:
    """Hosts 0 to `count - 1`. Skips the test, with the reason, where they cannot be made."""
    if why_not := _why_not():
        pytest.skip(f"hosts cannot be made here: {why_not}")
    made = Network()
    try:
        for _ in range(count):
            made.add()
        yield made
    finally:
        made.close()


def enter_network(pid: int) -> None:
    """Move this thread, for good, into the network of a process."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net") as place:
        if libc.setns(place.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns failed")


class _Init:
    """Process 1 of a host."""

    def __init__(self, name: str) -> None:
        self._process: subprocess.Popen[str] = subprocess.Popen(
            [*_UNSHARE, "--mount-proc", *_INIT, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self.pid = int(children.read_text())

    def entering(self, *command: str) -> list[str]:
        """The command line that runs a command on this host, as a process of it."""
        spaces = ["--net", "--uts", "--ipc", "--pid", "--mount"]
        return ["nsenter", "--target", str(self.pid), *spaces, f"--wd={ROOT}", *command]

    def end(self) -> None:
        """End it, and every process of the host with it: the system kills them all first."""
        if self._process.poll() is None:
            ended = os.pidfd_open(self.pid)
            os.kill(self.pid, signal.SIGKILL)
            assert select.select([ended], [], [], TIMEOUT_SECONDS)[0]
            os.close(ended)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def _why_not() -> str:
    """Why hosts cannot be made, "" when they can."""
    try:
        tried = subprocess.run(
            [*_UNSHARE, "--mount-proc", "ip", "link", "add", "lan", "type", "bridge"],
            capture_output=True,
            text=True,
        )
    except OSError as error:
        return str(error)
    return re.sub(r"\s+", " ", tried.stderr).strip() if tried.returncode else ""


def processes_of(namespace: str) -> list[int]:
    """Processes whose process namespace is this one, as /proc names it."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if str((place / "ns" / "pid").readlink()) == namespace:
                found.append(int(place.name))
        except OSError:
            continue  # it has ended
    return found
