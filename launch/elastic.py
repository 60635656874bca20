"""torchrun's arguments for a run on several hosts, agreed on anew for every start.

Where the user says where the hosts meet (`--rdzv-endpoint`), nothing is agreed on.
"""

import fcntl
import socket
import struct
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.rendezvous import LOOK_SECONDS, Membership, Owner, Place, Reach, Watch
from storage.errors import ConfigurationError, StoreUnavailableError
from storage.store import open_store

VARIABLE = "RANGEFLOW_RENDEZVOUS"
"""In the environment of the ranks: the number of the place where their world came together."""
JOB_VARIABLE = "RANGEFLOW_JOB"
"""There as well: the job, as the user named it."""

PORT = 29400
"""torchrun's own, or any that is free."""
CONNECT_SECONDS = 2.0
SETTINGS = "last_call_timeout=5"
"""A world that could begin waits so many seconds for more hosts; torchrun's own is 30."""
_SIOCGIFADDR = 0x8915  # linux/sockios.h


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """What torchrun is started with. `arguments` are all of its arguments."""

    place: Place
    arguments: tuple[str, ...]
    environment: dict[str, str]


class RunIsCompleteError(Exception):
    """The other hosts have brought the run to its end: nobody will come to train with this one."""


class Elastic:
    """torchrun's arguments for a run on several hosts, agreed on anew for every start."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Callable[[str], str | None],
        say: Callable[[str], None],
    ) -> None:
        """`environment` gives a variable of this process's."""
        self._arguments = list(arguments)
        self._environment = environment
        self._job = _option(arguments, "rdzv-id") or "rangeflow"
        self._given_address = _option(arguments, "local-addr")
        self._store = open_store(run_of(arguments))
        self._say = say
        self._membership: Membership | None = None
        self._deaf: set[int] = set()
        self._address = ""
        self._was_open = False

    def join(self, pause: Callable[[float], bool]) -> Joined | None:
        """Wait until it is known where the hosts meet; None when a notice came meanwhile.

        Raises as `Membership.look` does, RunIsCompleteError when the other hosts have ended the
        run, and ConfigurationError when this host never had an address that can be found out.
        """
        address = self._wait_for_address(pause)
        if address is None:
            return None
        if self._membership is None or self._membership.address != address:
            self._membership = self._member(address)
        found = self._membership.join(pause)
        if found is None:
            return None
        place, holds = found
        given = _option(self._arguments, "rdzv-conf") or ""
        settings = [SETTINGS, given, f"is_host={int(holds)}"]
        interface = self._environment("GLOO_SOCKET_IFNAME") or interface_of(address)
        return Joined(
            place=place,
            arguments=(
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={place.address}:{place.port}",
                f"--rdzv-id={'-'.join(filter(None, [self._job, place.token]))}",
                f"--rdzv-conf={','.join(filter(None, settings))}",
                f"--local-addr={address}",
                *_without(_without(self._arguments, "rdzv-conf"), "rdzv-id"),
            ),
            environment={VARIABLE: str(place.number), JOB_VARIABLE: self._job}
            | ({"GLOO_SOCKET_IFNAME": interface} if interface else {}),
        )

    def _member(self, address: str) -> Membership:
        watch = Watch(self._store)
        return Membership(
            self._store,
            job=self._job,
            address=address,
            host=socket.gethostname(),
            owner=lambda: self._unless_complete(watch()),
            reach=reached,
            free_port=free_port,
            say=self._say,
            deaf=self._deaf,
        )

    def outdated(self, joined: Joined) -> str:
        """Why torchrun, none of whose ranks lives, waits in vain; "" when it may go on.

        Takes two seconds at most, and what the store takes; call it every few seconds. A store
        that fails says nothing.
        """
        assert self._membership is not None, "who has joined is a member"
        try:
            return self._membership.outdated(joined.place)
        except StoreUnavailableError:
            return ""
        except RunIsCompleteError as error:
            return str(error)

    def not_reached(self, joined: Joined) -> None:
        """torchrun could not connect to this place: unless somebody lives there, make another."""
        self._deaf.add(joined.place.number)

    def still_ours(self) -> bool:
        """Whether the run's newest incarnation is of this job, as far as the store tells."""
        try:
            owner = Watch(self._store)()
        except StoreUnavailableError:
            return True
        return owner is None or owner.job == self._job

    def _wait_for_address(self, pause: Callable[[float], bool]) -> str | None:
        """This host's address; None when a notice came before it had one again."""
        if self._given_address:
            return self._given_address
        lost = False
        while True:
            try:
                self._address = own_address()
                return self._address
            except ConfigurationError:
                if not self._address:
                    raise
            if not lost:
                self._say("waiting: this host has lost its address")
                lost = True
            if not pause(LOOK_SECONDS):
                return None

    def _unless_complete(self, owner: Owner | None) -> Owner | None:
        """Raises RunIsCompleteError when this job's other hosts have ended it since it was open."""
        if owner is None or owner.ended_at is None:
            self._was_open = True
            return owner
        asked = _option(self._arguments, "max-steps") or "0"
        further = asked.isdecimal() and int(asked) > owner.ended_at
        if self._was_open and owner.job == self._job and not further:
            raise RunIsCompleteError("the run is complete")
        return owner


def for_several_hosts(arguments: Sequence[str]) -> bool:
    """Whether torchrun's arguments ask for several hosts, and leave open where they meet."""
    most = (_option(arguments, "nnodes") or "1").rpartition(":")[2]
    return most.isdigit() and int(most) > 1 and _option(arguments, "rdzv-endpoint") is None


def run_of(arguments: Sequence[str]) -> str:
    """The run that these arguments train, as `launch/train.py` will find it."""
    run = _option(arguments, "run")
    path = _option(arguments, "config")
    if run is None and path:
        try:
            run = tomllib.loads(Path(path).read_text(encoding="utf-8")).get("run")
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"--config {path} cannot be read: {error}") from error
    return str(run or "runs/default")


def own_address(towards: str = "192.0.2.1") -> str:
    """The IPv4 address by which this host sends to others (nothing is sent: RFC 5737)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 9))
        except OSError as error:
            raise ConfigurationError(
                f"this host's address is not known ({error.strerror}); give it to torchrun as "
                "--local-addr=ADDRESS, as the other hosts reach it"
            ) from error
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """The network interface that has an IPv4 address, "" when none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # it has none
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""


def free_port() -> int:
    """torchrun's usual port, or another one where that is taken."""
    for port in (PORT, 0):
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(("", port))
            except OSError:
                continue
            return int(tried.getsockname()[1])
    raise ConfigurationError("no TCP port is free on this host")


def reached(address: str, port: int) -> Reach:
    """What a place answers to a connection."""
    try:
        socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        return Reach.REFUSED
    except OSError:
        return Reach.SILENT
    return Reach.OPEN


def _option(arguments: Sequence[str], name: str) -> str | None:
    """The last value of `--name`, with `-` or `_`."""
    value = None
    for place, argument in enumerate(arguments):
        flag, equals, after = argument.partition("=")
        if _is_flag(flag, name):
            value = after if equals else "".join(arguments[place + 1 : place + 2])
    return value


def _without(arguments: Sequence[str], name: str) -> list[str]:
    """The arguments without `--name` and its value."""
    left: list[str] = []
    skip = False
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        if skip or _is_flag(flag, name):
            skip = not skip and not equals
        else:
            left.append(argument)
    return left


def _is_flag(flag: str, name: str) -> bool:
    return flag.startswith("--") and flag[2:].replace("_", "-") == name
