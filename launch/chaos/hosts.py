"""Hosts of a small network on this machine, to be cut off, healed and killed.

A host is a process 1 with namespaces of its own: network, processes, host name, mounts. Each has
`eth0` at 10.77.0.<n + 1>, a port of a bridge in a namespace that only holds the bridge. Nothing has
a name outside: when the processes 1 end, also because whoever made them was killed, all is gone.

Covers: black holes (a port that is down answers nothing), hosts that lose power (all processes end,
and nobody is told), another host name and process namespace, so that nobody takes one host for
another. Does not cover: clocks and disks, which are this machine's.
"""

import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launch.chaos.marked import state

LOOK_SECONDS = 0.01
GATEWAY = "10.77.0.254"
"""Of every host: the bridge itself."""
END_SECONDS = 60.0

_INIT = """
hostname $0
mount --bind /dev/null /etc/resolv.conf 2>/dev/null
trap '' CHLD
echo ready
exec cat >/dev/null
"""
"""Process 1 ends when its standard input does; ignoring SIGCHLD, it leaves no zombies. Without name
servers, since none can be reached: each look-up of a name would wait 10 s for them."""
_UNSHARE = ("unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child")


class Host:
    """One host. `name` is its host name, `address` that of its only link."""

    def __init__(self, network: "Network", number: int) -> None:
        self.name = f"host{number}"
        self.address = f"10.77.0.{number + 1}"
        self._network = network
        self._port = f"port{number}"
        self._init = _Init(self.name)
        network.ip(f"link add {self._port} type veth peer name eth0 netns {self._init.pid}")
        network.ip(f"link set {self._port} master lan up")
        self.call("ip", "link", "set", "lo", "up")
        self.call("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.call("ip", "link", "set", "eth0", "up")
        self.call("ip", "route", "add", "default", "via", GATEWAY)

    @property
    def namespace(self) -> int:
        """Process 1, by which this machine finds the host's namespaces."""
        return self._init.pid

    def entering(self, *command: str | Path) -> list[str]:
        """The command line that runs a command on this host, in the folder that it is given in."""
        return self._init.entering(*map(str, command))

    def call(self, *command: str | Path) -> str:
        """Run a command to its end; what it prints. Raises RuntimeError when it fails."""
        return _called(self.entering(*command))

    def process(self, number: int) -> int:
        """The process that a program of this host knows by this number, as this machine counts."""
        space = str(Path(f"/proc/{self._init.pid}/ns/pid").readlink())
        for pid in processes_of(space):
            with suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                if re.search(rf"^NSpid:.*\t{number}$", status, re.MULTILINE):
                    return pid
        raise ProcessLookupError(f"{self.name} has no process {number}")

    def cut(self) -> None:
        """From now on nothing comes or goes, and nobody is told."""
        self._network.ip(f"link set {self._port} down")

    def heal(self) -> None:
        """The link works again."""
        self._network.ip(f"link set {self._port} up")

    def freeze(self) -> None:
        """Every process of it stops. Its kernel still takes connections, which nobody answers."""
        inside, above = self._processes()
        _signal(inside, signal.SIGSTOP)
        while any(state(pid) not in ("T", "Z", "") for pid in inside | above):
            time.sleep(LOOK_SECONDS)  # who entered the host stops as well, a little later

    def thaw(self) -> None:
        """They go on."""
        inside, above = self._processes()
        _signal(inside | above, signal.SIGCONT)

    def kill(self) -> None:
        """As a loss of power: the link is down, and then every process ends at once."""
        self.cut()
        self.end()

    def end(self) -> None:
        """End every process of it."""
        with suppress(OSError):
            self.thaw()  # who has stopped would never take note of the ends that it waits for
        self._init.end()

    def _processes(self) -> tuple[set[int], set[int]]:
        """All but process 1, and those outside that have entered the host and wait for them."""
        space = str(Path(f"/proc/{self._init.pid}/ns/pid").readlink())
        inside = set(processes_of(space))
        above = {_parent(pid) for pid in inside - {self._init.pid}} - inside - {0}
        return inside - {self._init.pid}, above


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

    @property
    def namespace(self) -> int:
        """The process whose network the bridge is in."""
        return self._bridge.pid

    def add(self) -> Host:
        """One more host."""
        self.hosts.append(Host(self, len(self.hosts)))
        return self.hosts[-1]

    def ip(self, command: str) -> None:
        """An `ip` command where the bridge is."""
        enter = ["nsenter", "--target", str(self._bridge.pid), "--net", "ip"]
        _called([*enter, *command.split()])

    def close(self) -> None:
        """End everything on every host, and the hosts."""
        for host in self.hosts:
            host.end()
        self._bridge.end()


@contextmanager
def network(count: int) -> Iterator[Network]:
    """Hosts 0 to `count - 1`. Raises where they cannot be made: ask `why_no_hosts` first."""
    made = Network()
    try:
        for _ in range(count):
            made.add()
        yield made
    finally:
        made.close()


def why_no_hosts() -> str:
    """Why hosts cannot be made here, "" when they can."""
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


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _parent(pid: int) -> int:
    """The process above this one; 0 when this one has ended."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


class _Init:
    """Process 1 of a host."""

    def __init__(self, name: str) -> None:
        self._process: subprocess.Popen[str] = subprocess.Popen(
            [*_UNSHARE, "--mount-proc", "sh", "-c", _INIT, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            self._close()
            raise RuntimeError(f"expected a host, but {' '.join(_UNSHARE)} failed")
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self.pid = int(children.read_text())

    def entering(self, *command: str) -> list[str]:
        spaces = ["--net", "--uts", "--ipc", "--pid", "--mount"]
        return ["nsenter", "--target", str(self.pid), *spaces, "--wd=.", *command]

    def end(self) -> None:
        """End it, and every process of the host with it: the system kills them all first."""
        if self._process.poll() is None:
            ended = os.pidfd_open(self.pid)
            os.kill(self.pid, signal.SIGKILL)
            gone = select.select([ended], [], [], END_SECONDS)[0]
            os.close(ended)
            if not gone:
                raise RuntimeError(f"process 1 of a host, {self.pid} here, is not ended by SIGKILL")
        self._close()

    def _close(self) -> None:
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def _called(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout
