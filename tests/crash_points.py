"""Lets one thing go wrong at one instant of an operation on a store, at every instant in turn.

A `Case` is an operation on places below one folder. `explore` runs it once for each fault and each
store operation that the fault can hit, from a copy of the same start, until the operation ends
before the fault comes; after each it calls the case's check, which restarts and looks.

Covers: one fault a run; what another process does at one instant.
Does not cover: two faults in one run; faults between two store operations, which the next one sees.
"""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Literal

from storage.store import LocalStore, Store
from tests.faulty_store import (
    Crash,
    CrashAfter,
    CrashBefore,
    Delay,
    Fault,
    FaultyStore,
    Hang,
    LoseResponse,
    Operation,
    Refuse,
    TruncateWrite,
)

Kind = Literal["crash before", "crash after", "lose", "refuse", "truncate", "delay", "pin", "hang"]
ALWAYS: tuple[Kind, ...] = ("crash before", "crash after", "lose", "refuse", "delay", "hang")
WAIT_SECONDS = 60.0
"""After which a test that hangs has failed."""

_WRITES = ("put", "put_if_absent")


class Violation(AssertionError):
    """What must never be, and at which point it was."""


class Instant:
    """The script of a store that goes wrong at the nth operation after `arm` that `kind` can hit.

    A process that has crashed does nothing more: every later operation crashes, too.
    """

    def __init__(self, kind: Kind, number: int, meanwhile: Callable[[], object]) -> None:
        self._kind = kind
        self._left = number
        self._meanwhile = meanwhile
        self._armed = False
        self._dead = False
        self.reached = threading.Event()
        self.release = threading.Event()
        self.operation: Operation | None = None

    def arm(self) -> None:
        """From now on operations count."""
        self._armed = True

    def __call__(self, operation: Operation) -> Fault | None:
        if self._dead:
            return CrashBefore()
        if not self._armed or (self._kind == "truncate" and operation.name not in _WRITES):
            return None
        self._left -= 1
        if self._left:
            return None
        self.operation = operation
        self._dead = self._kind in ("crash before", "crash after", "truncate")
        self.reached.set()
        match self._kind:
            case "crash before":
                return CrashBefore()
            case "crash after":
                return CrashAfter()
            case "lose":
                return LoseResponse()
            case "refuse":
                return Refuse()
            case "truncate":
                return TruncateWrite()
            case "hang":
                return Hang(self.release)
            case _:
                return Delay(self._meanwhile)


@dataclass
class Places:
    """The stores below a folder: `faulty` by its name through `instant`, the others as they are.

    `trained` is set by an operation once training would go on beside it. `held` is closed at the
    end of a point: what others hold meanwhile.
    """

    folder: Path
    faulty: str
    instant: Instant
    atomic: bool
    trained: threading.Event = field(default_factory=threading.Event)
    held: ExitStack = field(default_factory=ExitStack)
    acknowledged: list[int] = field(default_factory=list)

    def store(self, name: str) -> Store:
        """As the operation sees it. `run:0` and `run:1` are one place, each seen by a rank."""
        store = self.plain(name.partition(":")[0])
        return FaultyStore(store, self.instant) if name == self.faulty else store

    def plain(self, name: str) -> LocalStore:
        """As everybody else sees it."""
        store = LocalStore(self.folder / name)
        store.creates_atomically = self.atomic
        return store


Outcome = object
"""What the operation returned, or the exception that it ended with."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operation, and how to judge what it leaves.

    `make` prepares it on the places, without faults, and returns what is then explored.
    `meanwhile` is another process's doing for "delay" and "hang". `check` raises when something is
    wrong; it is given the outcome.
    """

    name: str
    faulty: str
    start: Callable[[Path], None]
    make: Callable[[Places], Callable[[], object]]
    meanwhile: Callable[[Places], object]
    check: Callable[[Places, Kind, Outcome], None]
    kinds: tuple[Kind, ...] = ALWAYS
    pin: Callable[[Places], object] = lambda places: None
    trains: bool = False
    """Whether training goes on beside the operation, and must, also while a call hangs."""


def explore(case: Case, folder: Path) -> dict[Kind, int]:
    """Run every point; how many there were of each kind. Raises Violation at the first bad one."""
    start = folder / "start"
    if not start.exists():
        case.start(start)
    points: dict[Kind, int] = {}
    for kind in case.kinds:
        for number in count(1):
            operation = _run(case, start, folder / "point", kind, number)
            if operation is None:
                break
            points[kind] = number
    return points


def _run(case: Case, start: Path, folder: Path, kind: Kind, number: int) -> Operation | None:
    """One point; the operation that was hit, None when the case ended before."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(start, folder)
    places: Places

    def meanwhile() -> object:
        return (case.pin if kind == "pin" else case.meanwhile)(places)

    instant = Instant(kind, number, meanwhile)
    places = Places(folder, case.faulty, instant, atomic=kind != "truncate")
    try:
        with places.held:
            act = case.make(places)
            instant.arm()
            outcome = _act(case, places, act, kind)
            case.check(places, kind, outcome)
    except Exception as error:
        raise Violation(f"{case.name}: {kind} at {instant.operation}: {error!r}") from error
    return instant.operation


def _act(case: Case, places: Places, act: Callable[[], object], kind: Kind) -> Outcome:
    """What the operation came to. One that hangs is released after the others went on."""
    if kind != "hang":
        return _outcome(act)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(_outcome, act)
        running.add_done_callback(lambda _: places.instant.reached.set())
        assert places.instant.reached.wait(WAIT_SECONDS), "neither hung nor over"
        try:
            if places.instant.operation is not None:
                if case.trains:
                    assert places.trained.wait(WAIT_SECONDS), "a call that hangs holds up training"
                case.meanwhile(places)
        finally:
            places.instant.release.set()
        return running.result(WAIT_SECONDS)


def _outcome(act: Callable[[], object]) -> Outcome:
    try:
        return act()
    except (Exception, Crash) as error:
        return error
