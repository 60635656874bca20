"""Copies a run to another store, verified, so that it can be resumed there.

What arrives is what the run was at one instant: a prefix of its log, every checkpoint that was not
retired then, its data and curves, and pins for ever. Record 1 of the log goes first and says whose
copy it is, then everything that the other records name, then those in order, and `run.json` last:
without it the place is no run. Heartbeats, requests and leases stay behind.

Covers: a source that trains meanwhile, kills at any instant (the same command goes on), a later
copy that brings an older one up to date. Does not cover: two copies to one place at once.
"""

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from checkpointing.destination import (
    RECORD_KEY,
    another_run,
    put_once,
    put_record,
    refuse_other,
    refuse_overlap,
)
from checkpointing.history import Checkpoint, History
from checkpointing.naming import RUN_KEY, read_run
from checkpointing.pins import all_pins, pinned_together
from checkpointing.retention import folder_of
from storage.canonical import canonical_json, sha256_hex
from storage.errors import ConfigurationError, IntegrityError
from storage.log import Log, Record
from storage.store import Store, check_key

logger = logging.getLogger(__name__)

THREADS = 4
"""Each holds one object in memory: at most 256 MB, or what else lies in the run."""

Advance = Callable[[str, int, int], None]
"""Hears what is being done, how far it is, and of how much: bytes, checkpoints or records."""

_CHECKPOINT = re.compile(r"checkpoints/g\d{4,}/s\d{8,}-[0-9a-f]{12}")
_NOT_COPIED = (
    *("log/", "checkpoints/", "beats/", "requests/", "answers/", "pins/", "probe/"),
    "rendezvous/",
)


@dataclass(kw_only=True, slots=True)
class _Sum:
    """What a copy has moved, and what was there already."""

    copied: int = 0
    copied_bytes: int = 0
    present: int = 0
    present_bytes: int = 0
    damaged: list[int] = field(default_factory=list)


def copy_run(
    source: Store, destination: Store, *, advance: Advance = lambda phase, done, total: None
) -> dict[str, Any]:
    """Copy or go on copying the run of `source`; returns what was copied and what is damaged.

    Raises ConfigurationError when the destination holds something else, or a run that has gone on
    by itself; IntegrityError when what arrived is not what was sent.
    """
    run = read_run(source)
    refuse_overlap(source, destination)
    log = Log(source, whole=True)
    prefix: list[Record] = []

    def choose(past: History) -> Sequence[Checkpoint]:
        prefix[:] = log.records
        return [c for c in past.checkpoints if not c.retired]

    with pinned_together(source, log, choose) as checkpoints:
        if not prefix:
            raise ConfigurationError(f"{source.url} has never been trained: start it where it is")
        records = _records(source, prefix[-1].index)
        refuse_other(source, destination, records)
        done = _Sum()
        put_record(destination, records[0], source.get(records[0]))
        _copy_objects(source, destination, checkpoints, done, advance)
        _verify(source, destination, checkpoints, done, advance)
        _copy_pins(source, destination, checkpoints)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="copy") as threads:
            contents = threads.map(source.get, records)
            for place, (key, data) in enumerate(zip(records, contents, strict=True), start=1):
                put_record(destination, key, data)
                advance("copying the log", place, len(records))
    _compare_logs(destination, prefix)
    if not put_once(destination, RUN_KEY, source.get(RUN_KEY)):
        raise another_run(destination)
    return {
        "run": run["run"],
        "source": source.url,
        "destination": destination.url,
        "records": len(records),
        "checkpoints": [
            {
                "step": c.step,
                "index": c.index,
                "digest": c.digest,
                "quarantined": c.quarantined,
                "verdict": "damaged" if c.index in done.damaged else "whole",
            }
            for c in checkpoints
        ],
        "copied_objects": done.copied,
        "copied_bytes": done.copied_bytes,
        "present_objects": done.present,
        "present_bytes": done.present_bytes,
    }


def _records(store: Store, last: int) -> list[str]:
    """Keys of the log's records up to `last`, in order."""
    found: dict[int, str] = {}
    for key in store.list("log/"):
        match = RECORD_KEY.fullmatch(key)
        if match is not None and int(match[1]) <= last:
            found[int(match[1])] = key
    return [key for _, key in sorted(found.items())]


def _copy_objects(
    source: Store,
    destination: Store,
    checkpoints: Sequence[Checkpoint],
    done: _Sum,
    advance: Advance,
) -> None:
    """Copy the checkpoints' objects and everything else that belongs to a run but its log."""
    objects = [key for c in checkpoints for key in _objects(source, c)]
    files = [key for key in source.list("") if key != RUN_KEY and not key.startswith(_NOT_COPIED)]
    files = [key for key in files if _is_key(key)]
    moves = [(key, True) for key in objects] + [(key, False) for key in files]
    expected = _total(source, [key for key, _ in moves])
    with ThreadPoolExecutor(THREADS, thread_name_prefix="copy") as threads:
        running = [threads.submit(_move, source, destination, *move) for move in moves]
        try:
            for future in as_completed(running):
                moved, size_bytes = future.result()
                done.copied += moved
                done.copied_bytes += size_bytes * moved
                done.present += not moved
                done.present_bytes += size_bytes * (not moved)
                advance("copying", done.copied_bytes + done.present_bytes, expected)
        finally:
            threads.shutdown(cancel_futures=True)


def _move(source: Store, destination: Store, key: str, immutable: bool) -> tuple[bool, int]:
    """Copy one object unless it is there; whether it was copied, and its size.

    An object of a checkpoint is known by its size here: `_verify` reads it with its digests.
    Others are compared byte by byte.
    """
    there = _size(destination, key)
    if immutable and there is not None and there == _size(source, key):
        return False, there
    try:
        data = source.get(key)
    except FileNotFoundError:
        if immutable:
            raise IntegrityError(f"{source.url}: {key} went away while it was copied") from None
        return False, 0  # a file that its owner has replaced
    if there == len(data) and destination.get(key) == data:
        return False, len(data)
    destination.put(key, data)
    if not immutable and sha256_hex(destination.get(key)) != sha256_hex(data):
        raise IntegrityError(f"{destination.url}: {key} is not what was written; copy again")
    return True, len(data)


def _verify(
    source: Store,
    destination: Store,
    checkpoints: Sequence[Checkpoint],
    done: _Sum,
    advance: Advance,
) -> None:
    """Read every checkpoint back, and send again what is damaged."""
    for place, checkpoint in enumerate(checkpoints, start=1):
        if not _arrived(source, destination, checkpoint):
            logger.warning("step %d is damaged in the source, and so in the copy", checkpoint.step)
            done.damaged.append(checkpoint.index)
        advance("verifying", place, len(checkpoints))


def _arrived(source: Store, destination: Store, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is whole at the destination; False when it is not at the source."""
    from checkpointing.load import load  # torch takes seconds, and other commands need none of it

    for again in (True, False):
        try:
            load(destination, checkpoint)
            return True
        except IntegrityError as error:
            if again:
                for key in _objects(source, checkpoint):
                    destination.put(key, source.get(key))
            elif _is_whole(source, checkpoint):
                raise IntegrityError(
                    f"{destination.url}: the checkpoint of step {checkpoint.step} did not arrive "
                    f"whole in two attempts: {error}"
                ) from error
    return False


def _is_whole(store: Store, checkpoint: Checkpoint) -> bool:
    from checkpointing.load import load

    try:
        load(store, checkpoint)
    except IntegrityError:
        return False
    return True


def _copy_pins(source: Store, destination: Store, checkpoints: Sequence[Checkpoint]) -> None:
    """Copy pins for ever; those that the destination has of its own stay."""
    copied = {c.index for c in checkpoints}
    for pin in all_pins(source):
        if pin.until is None and pin.checkpoint in copied:
            content = {"checkpoint": pin.checkpoint, "until": None, "reason": pin.reason}
            destination.put(pin.key, canonical_json(content))


def _compare_logs(destination: Store, prefix: Sequence[Record]) -> None:
    """Refuse a log that does not end as the source's: each record names the one before it."""
    arrived = [record.sha256 for record in Log(destination, whole=True).refresh()]
    sent = [record.sha256 for record in prefix]
    if not arrived or sent[-len(arrived) :] != arrived:
        raise IntegrityError(f"{destination.url}: the log did not arrive whole; copy again")


def _objects(store: Store, checkpoint: Checkpoint) -> list[str]:
    """Keys of all that lies in a checkpoint's folder."""
    folder = folder_of(checkpoint)
    if not _CHECKPOINT.fullmatch(folder):
        raise IntegrityError(f"{checkpoint.manifest_key!r} is not the key of a manifest")
    return [key for key in store.list(f"{folder}/") if _is_key(key)]


def _is_key(key: str) -> bool:
    """Whether a name from a listing is a key: a folder may hold anybody's hidden files."""
    try:
        check_key(key)
    except ConfigurationError:
        return False
    return True


def _total(store: Store, keys: Iterable[str]) -> int:
    with ThreadPoolExecutor(THREADS, thread_name_prefix="copy") as threads:
        return sum(threads.map(lambda key: _size(store, key) or 0, keys))


def _size(store: Store, key: str) -> int | None:
    try:
        return store.stat(key).size_bytes
    except FileNotFoundError:
        return None
