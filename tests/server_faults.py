"""What a test can make a loopback object server do wrong, once each, in the order that it says."""

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Status:
    """The server answers with an error, and does nothing. `code` is S3's name of it."""

    status: int
    code: str = ""


@dataclass(frozen=True)
class Reset:
    """The connection is reset; what was asked is done before (a lost response), or never."""

    done: bool


@dataclass(frozen=True)
class Broken:
    """The body of the answer ends after so many bytes, and the connection is closed."""

    after_bytes: int


@dataclass(frozen=True)
class Silence:
    """The server answers nothing until the event is set; what was asked is never done."""

    until: threading.Event


@dataclass(frozen=True)
class First:
    """Somebody else does something first, then the server goes on as usual."""

    act: Callable[[], object]


Fault = Status | Reset | Broken | Silence | First


class Faults:
    """The faults to come, by operation, and the operations that came. Operations are named
    "create", "write", "read", "list", "delete" and "look up", as the store names them, and
    "begin", "part" and "take back" within a resumable upload."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._coming: dict[str, list[Fault]] = defaultdict(list)
        self.seen: list[str] = []

    def add(self, operation: str, *faults: Fault) -> None:
        """The next operations of this name go wrong in these ways."""
        with self._lock:
            self._coming[operation] += faults

    def next(self, operation: str) -> Fault | None:
        """Called by the server for each request."""
        with self._lock:
            self.seen.append(operation)
            coming = self._coming[operation]
            return coming.pop(0) if coming else None
