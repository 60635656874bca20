"""Finds out what a store can do: whether it can fence, before a run trusts it, and how well."""

import os
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from storage.checksum import matches
from storage.contract import Store
from storage.errors import ConfigurationError, RangeFlowError, StoreRefusedError

_SMALL_PUTS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was examined. `detail` says what was found, and if not `ok`, what to do."""

    name: str
    ok: bool
    detail: str


def probe(store: Store) -> None:
    """Raise ConfigurationError unless a second creation of a key fails and the first is listed.

    Also when the store does not permit it. Leaves nothing behind. Does not cover stores that keep
    the condition only some of the time.
    """
    key = f"probe/{uuid.uuid4().hex}"
    try:
        try:
            fences, listed = _excludes(store, key), key in store.list("probe/")
        finally:
            store.delete(key)
    except StoreRefusedError as error:
        raise ConfigurationError(str(error)) from error
    if not fences:
        raise ConfigurationError(
            f"{store.url} cannot fence: creating a key twice must fail the second time, and it did "
            "not, so two processes could both believe that they own the run. Keep the run in a "
            "local folder, gs:// or s3:// bucket, or pass --allow_unfenced_store to take the risk"
        )
    if not listed:
        raise ConfigurationError(
            f"{store.url} cannot fence: a listing does not show a key just created, so a restart "
            "could miss the newest checkpoint. Use another store, or pass --allow_unfenced_store"
        )


def examine(
    store: Store, *, megabytes: int = 64, clock: Callable[[], float] = time.perf_counter
) -> list[Finding]:
    """What the store can do, and how fast an object of `megabytes` MB goes there and back.

    A store out of reach is one finding, and ends the examination. Leaves nothing behind.
    """
    folder = f"probe/{uuid.uuid4().hex}"
    findings: list[Finding] = []
    try:
        findings += _examined(store, folder, megabytes * 10**6, clock)
    except (RangeFlowError, FileNotFoundError) as error:
        findings.append(Finding(name="access", ok=False, detail=str(error)))
    try:
        left = store.list(f"{folder}/")
        for key in left:
            store.delete(key)
        gone = not left or not store.list(f"{folder}/")
        findings.append(_delete_finding(gone, folder))
    except RangeFlowError as error:
        findings.append(Finding(name="delete", ok=False, detail=str(error)))
    return findings


def _examined(
    store: Store, folder: str, size: int, clock: Callable[[], float]
) -> Iterator[Finding]:
    first = f"{folder}/first"
    fences = _excludes(store, first)
    yield Finding(
        name="conditional create",
        ok=fences,
        detail="creating a key twice fails the second time"
        if fences
        else "a key can be created twice, so two processes could both believe that they own the "
        "run: keep runs elsewhere; data may be read from here",
    )
    yield Finding(
        name="whole creation",
        ok=store.creates_atomically,
        detail="an object is there whole or not at all"
        if store.creates_atomically
        else "no hard links here (Google Drive, FAT): a crash can leave a torn object, and "
        "two machines can both create one: train from one machine at a time",
    )
    seen = first in store.list(f"{folder}/")
    yield Finding(
        name="listing",
        ok=seen,
        detail="shows an object as soon as it is created"
        if seen
        else "does not show an object just created, so a restart could miss the newest checkpoint: "
        "keep runs elsewhere",
    )

    waits = []
    for number in range(_SMALL_PUTS):
        begin = clock()
        store.put(f"{folder}/small-{number}", b"small")
        waits.append(clock() - begin)
    milliseconds = statistics.median(waits) * 1e3
    yield Finding(
        name="latency",
        ok=True,
        detail=f"a small put takes {milliseconds:.1f} ms (median of {_SMALL_PUTS})",
    )

    large, data = f"{folder}/large", os.urandom(size)
    begin = clock()
    store.put(large, data)
    uploaded = clock()
    checksum = store.stat(large).checksum
    asked = clock()
    again = store.get(large)
    downloaded = clock()
    yield _speed("upload", size, uploaded - begin)
    yield _speed("download", size, downloaded - asked)
    whole = again == data and store.get(large, 1, 4) == data[1:4]
    yield Finding(
        name="read back",
        ok=whole,
        detail="the bytes that were written, and ranges of them"
        if whole
        else "other bytes come back than were written: do not use this store, and look for a cache "
        "or a proxy on the way",
    )
    yield _checksum_finding(data, checksum)


def _excludes(store: Store, key: str) -> bool:
    """Whether the first to create a key keeps it; after a lost response "exists" may be we."""
    mine = uuid.uuid4().hex.encode()
    store.put_if_absent(key, mine)
    second = store.put_if_absent(key, b"second")
    try:
        return not second and store.get(key) == mine
    except FileNotFoundError:
        return False


def _speed(direction: str, size: int, seconds: float) -> Finding:
    speed = f"{size / 1e6 / seconds:.1f} MB/s" if seconds > 0 else "too fast to measure"
    return Finding(
        name=f"{direction} bandwidth", ok=True, detail=f"{speed} for an object of {size / 1e6:g} MB"
    )


def _checksum_finding(data: bytes, checksum: str) -> Finding:
    if checksum and not matches(data, checksum):
        detail = (
            f"{checksum} is not that of the bytes written: do not use this store, and look for "
            "a proxy that changes what passes"
        )
        return Finding(name="checksum", ok=False, detail=detail)
    detail = "the store gives none: objects are verified by reading them back"
    if checksum:
        detail = f"{checksum.partition(':')[0]}, and it is right"
    return Finding(name="checksum", ok=True, detail=detail)


def _delete_finding(gone: bool, folder: str) -> Finding:
    detail = (
        "takes objects away"
        if gone
        else f"objects below {folder} are still listed after their deletion: remove them by hand, "
        "and look for a retention policy or a permission that is missing"
    )
    return Finding(name="delete", ok=gone, detail=detail)
