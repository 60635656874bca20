"""A store that goes wrong where a test's script says so, for tests of what uses a store.

    def script(operation):
        return CrashAfter() if operation.number == 7 else None

    store = FaultyStore(LocalStore(folder), script)

Every call is an operation, numbered from 1 in the order in which the calls came. A fault that means
nothing for an operation, such as a flipped byte of a listing, is an error of the test's.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from storage.contract import ObjectInfo, Store
from storage.errors import StoreUnavailableError


class Crash(BaseException):
    """The process ends here. Not an `Exception`, so that nothing on the way out handles it."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One call: its number, the method's name, and the key (for `list`, the prefix)."""

    number: int
    name: str
    key: str


@dataclass(frozen=True, slots=True)
class CrashBefore:
    """Crashes, and nothing was done."""


@dataclass(frozen=True, slots=True)
class CrashAfter:
    """Crashes, and it was done."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Not done, and said so."""

    message: str = "refused"


@dataclass(frozen=True, slots=True)
class LoseResponse:
    """Done, and said that it could not be."""


@dataclass(frozen=True, slots=True)
class TruncateWrite:
    """Stores the first half and crashes; for `put`, and `put_if_absent` if it is not atomic."""


@dataclass(frozen=True, slots=True)
class TruncateRead:
    """Gives the first half of what was asked for."""


@dataclass(frozen=True, slots=True)
class FlipByte:
    """Gives what was asked for with the byte at `index` inverted (-1 is the last)."""

    index: int = 0


@dataclass(frozen=True, slots=True)
class Delay:
    """Calls, then goes on as usual."""

    call: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Hang:
    """Does nothing until the event is set, then is refused."""

    until: threading.Event


Fault = (
    CrashBefore
    | CrashAfter
    | Refuse
    | LoseResponse
    | TruncateWrite
    | TruncateRead
    | FlipByte
    | Delay
    | Hang
)
Script = Callable[[Operation], Fault | None]
"""Called for each operation, under a lock: it may count, and must not call the store."""

Result = TypeVar("Result")


class FaultyStore:
    """`inner` with faults; `operations` are the calls so far. Any thread may call it."""

    def __init__(self, inner: Store, script: Script = lambda operation: None) -> None:
        self._inner = inner
        self._script = script
        self._lock = threading.Lock()
        self.operations: list[Operation] = []
        self.url = inner.url

    @property
    def creates_atomically(self) -> bool:
        return self._inner.creates_atomically

    @creates_atomically.setter
    def creates_atomically(self, value: bool) -> None:
        self._inner.creates_atomically = value

    def put_if_absent(self, key: str, data: bytes) -> bool:
        def half() -> None:
            assert not self.creates_atomically, "no half object can be created here"
            self._inner.put_if_absent(key, data[: len(data) // 2])

        return self._do("put_if_absent", key, lambda: self._inner.put_if_absent(key, data), half)

    def put(self, key: str, data: bytes | memoryview) -> None:
        def half() -> None:
            self._inner.put(key, bytes(data)[: len(data) // 2])

        self._do("put", key, lambda: self._inner.put(key, data), half)

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        return self._do("get", key, lambda: self._inner.get(key, start, end))

    def list(self, prefix: str, start_after: str = "") -> list[str]:
        return self._do("list", prefix, lambda: self._inner.list(prefix, start_after))

    def delete(self, key: str) -> None:
        self._do("delete", key, lambda: self._inner.delete(key))

    def stat(self, key: str) -> ObjectInfo:
        return self._do("stat", key, lambda: self._inner.stat(key))

    def local_path(self, key: str) -> Path | None:
        """None, so that what is read is read through here. No operation."""
        self._inner.local_path(key)
        return None

    def _do(
        self,
        name: str,
        key: str,
        act: Callable[[], Result],
        write_half: Callable[[], None] | None = None,
    ) -> Result:
        with self._lock:
            operation = Operation(len(self.operations) + 1, name, key)
            self.operations.append(operation)
            fault = self._script(operation)
        match fault:
            case CrashBefore():
                raise Crash(operation)
            case Refuse(message):
                raise StoreUnavailableError(f"{self.url}: {key}: {message}")
            case Hang(until):
                until.wait()
                raise StoreUnavailableError(f"{self.url}: {key}: no answer in time")
            case TruncateWrite():
                assert write_half is not None, f"{name} writes nothing that could be cut"
                write_half()
                raise Crash(operation)
            case Delay(call):
                call()
        result = act()
        match fault:
            case CrashAfter():
                raise Crash(operation)
            case LoseResponse():
                raise StoreUnavailableError(f"{self.url}: {key}: the response was lost")
            case TruncateRead() | FlipByte():
                return _damaged(fault, result)
        return result


def _damaged(fault: TruncateRead | FlipByte, result: Result) -> Result:
    assert isinstance(result, bytes), "only what is read can be damaged on the way"
    if isinstance(fault, TruncateRead):
        return type(result)(result[: len(result) // 2])
    damaged = bytearray(result)
    damaged[fault.index] ^= 0xFF
    return type(result)(damaged)
