"""Fetches one object of a source: in pieces, each within a time, and verified on arrival.

Places are tried in the order given. One that fails, or has no such object, is left for the next;
one that gives other bytes than the index names is asked once more first. The stores repeat what
may pass by themselves (`storage/patience.py`).

Covers: truncated, changed, missing objects; stores that fail, and that never answer.
Does not cover: waiting for a store to recover; `cache.py` comes back.
"""

import hashlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy.typing as npt

from storage.errors import (
    ConfigurationError,
    DataError,
    IntegrityError,
    RangeFlowError,
    StoreUnavailableError,
)
from storage.store import Store

PIECE_BYTES = 2**24
"""What one thread holds in memory; also what is fetched again after an attempt that failed."""
PIECE_SECONDS = 270.0
"""Longer than gs:// and s3:// stores need to give up a piece: for places that have no limits."""
_LOOK_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Remote:
    """An object of a source, as its index names it, and the places that may have it."""

    source: str
    key: str
    sha256: str
    size_bytes: int
    stores: tuple[Store, ...] = field(compare=False)
    check: Callable[[npt.NDArray[Any]], None] = field(compare=False, default=lambda array: None)
    """Raises DataError for an array that is not of the kind its source says."""

    def __str__(self) -> str:
        return f"source {self.source!r}: shard {self.key}"


class WrongBytesError(IntegrityError):
    """A place gave other bytes than the index names."""


def download(
    remote: Remote,
    write: Callable[[int, bytes], None],
    *,
    piece_bytes: int = PIECE_BYTES,
    piece_seconds: float = PIECE_SECONDS,
    seconds: float = math.inf,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Give all bytes of the object to `write(start, data)`, in order; again from 0 if repeated.

    `seconds` limits all of it, and `stopped` ends it. Raises StoreUnavailableError when a place
    failed for a reason that may pass, IntegrityError when the bytes were wrong, DataError when
    there is no such object.
    """
    causes: list[RangeFlowError] = []
    deadline = time.monotonic() + seconds

    def get(store: Store, start: int, end: int) -> bytes:
        ends_at = min(time.monotonic() + piece_seconds, deadline)
        return _within(ends_at, stopped, store, remote.key, start, end)

    for store in remote.stores:
        try:
            try:
                _fetch(remote, partial(get, store), store.url, write, piece_bytes)
            except WrongBytesError:
                _fetch(remote, partial(get, store), store.url, write, piece_bytes)
            return
        except (StoreUnavailableError, ConfigurationError, IntegrityError) as error:
            causes.append(error)
    text = f"{remote} cannot be had: {'; '.join(str(cause) for cause in causes)}"
    if any(isinstance(cause, StoreUnavailableError) for cause in causes):
        raise StoreUnavailableError(text) from causes[-1]
    if any(isinstance(cause, IntegrityError) for cause in causes):
        raise IntegrityError(f"{text}; copy it there again") from causes[-1]
    raise DataError(f"{text}; copy it there again") from causes[-1]


def _fetch(
    remote: Remote,
    get: Callable[[int, int], bytes],
    url: str,
    write: Callable[[int, bytes], None],
    piece_bytes: int,
) -> None:
    sha256 = hashlib.sha256()
    for start in range(0, remote.size_bytes, piece_bytes):
        end = min(start + piece_bytes, remote.size_bytes)
        data = get(start, end)
        if len(data) != end - start:
            raise WrongBytesError(
                f"{url} has it truncated: {start + len(data)} bytes, the index names "
                f"{remote.size_bytes}"
            )
        sha256.update(data)
        write(start, data)
    if sha256.hexdigest() != remote.sha256:
        raise WrongBytesError(
            f"{url} has it with sha256 {sha256.hexdigest()[:12]}, the index names "
            f"{remote.sha256[:12]}"
        )


def _within(
    ends_at: float, stopped: Callable[[], bool], store: Store, key: str, start: int, end: int
) -> bytes:
    """A range of an object, or StoreUnavailableError when it takes too long; it is then abandoned.

    A read that hangs cannot be ended, only left to itself: it writes nothing.
    """
    outcome: list[bytes | Exception] = []

    def get() -> None:
        try:
            outcome.append(store.get(key, start, end))
        except Exception as error:  # raised again in the caller's thread
            outcome.append(error)

    begun = time.monotonic()
    thread = threading.Thread(target=get, name=f"get {key}", daemon=True)
    thread.start()
    while thread.is_alive() and time.monotonic() < ends_at and not stopped():
        thread.join(max(0.0, min(_LOOK_SECONDS, ends_at - time.monotonic())))
    if not outcome:
        seconds = time.monotonic() - begun
        raise StoreUnavailableError(f"{store.url} gave no answer within {seconds:.3g} s")
    if isinstance(outcome[0], FileNotFoundError):
        raise DataError(f"{store.url} has no such object") from outcome[0]
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]
