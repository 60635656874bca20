"""Does by hand what retention does after each save, and sweeps; safe beside a training owner.

The RETIRE is an operator's: it fences nobody, and is decided on the log as it is when it lands.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from checkpointing.history import History, history
from checkpointing.pins import all_pins, ended, pinned_checkpoints
from checkpointing.retention import (
    Attempt,
    RetentionConfig,
    recorded_policy,
    remove,
    unneeded,
    victims,
)
from storage.errors import ConfigurationError
from storage.log import Draft, Log, Record
from storage.store import Store

THREADS = 8

Advance = Callable[[str, int, int], None]
"""Hears what is being done, how many objects are done, and of how many."""


def policy_of(
    past: History, *, keep_last: int | None = None, keep_every_steps: int | None = None
) -> RetentionConfig:
    """What the run itself keeps, as its last start recorded it; what is given here goes before."""
    policy = recorded_policy(past)
    if policy is None and (keep_last is None or keep_every_steps is None):
        raise ConfigurationError(
            "the run's log does not say what the run keeps (it was never started, or its last "
            "CLAIM is damaged); pass both --keep_last and --keep_every_steps"
        )
    policy = policy or RetentionConfig()
    return RetentionConfig(
        keep_last=policy.keep_last if keep_last is None else keep_last,
        keep_every_steps=policy.keep_every_steps if keep_every_steps is None else keep_every_steps,
    )


def prune(
    store: Store,
    log: Log,
    *,
    keep_last: int | None = None,
    keep_every_steps: int | None = None,
    dry_run: bool = False,
    wall_clock: Callable[[], float],
    advance: Advance = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Retire what the policy lets go, then remove what no checkpoint needs; tells what and why.

    With `dry_run` nothing is changed. What a reader holds stays, and goes with the next prune.
    """
    given = {"keep_last": keep_last, "keep_every_steps": keep_every_steps}
    policy = policy_of(history(log.refresh()), **given)
    if dry_run:
        past = history(log.refresh())
        pinned = {p.checkpoint for p in all_pins(store) if not ended(p, wall_clock())}
        chosen = victims(past, policy, pinned)
        past = _as_retired(past, chosen)
    else:
        chosen = _retire(store, log, policy, wall_clock)
        past = history(log.refresh())
        pinned = pinned_checkpoints(store, wall_clock=wall_clock)
    found = unneeded(store, past, pinned, damaged=bool(log.damaged))
    rows = [_row(store, attempt, chosen) for attempt in found]
    if not dry_run:
        total, done = sum(len(attempt.keys) for attempt in found), 0

        def removed() -> None:
            nonlocal done
            done += 1
            advance("removing", done, total)

        for attempt in found:
            remove(store, attempt, advance=removed)
    return {
        "dry_run": dry_run,
        **dataclasses.asdict(policy),
        "retired": [c.step for c in past.checkpoints if c.index in chosen],
        "removed": rows,
        "objects": sum(row["objects"] for row in rows),
        "size_bytes": sum(row["size_bytes"] for row in rows),
    }


def sizes(store: Store, keys: Sequence[str]) -> list[int]:
    """The size of each object; 0 for one that is gone."""
    with _threads() as threads:
        return list(threads.map(lambda key: _size(store, key), keys))


def _retire(
    store: Store, log: Log, policy: RetentionConfig, wall_clock: Callable[[], float]
) -> list[int]:
    def draft(records: Sequence[Record]) -> Draft | None:
        pinned = pinned_checkpoints(store, wall_clock=wall_clock)
        chosen = victims(history(records), policy, pinned)
        return Draft(kind="RETIRE", generation=0, body={"checkpoints": chosen}) if chosen else None

    record = log.append(draft)
    return [] if record is None else list(record.body["checkpoints"])


def _as_retired(past: History, chosen: Sequence[int]) -> History:
    """The history as it would be after a RETIRE."""
    after = tuple(
        dataclasses.replace(c, retired=c.retired or c.index in chosen) for c in past.checkpoints
    )
    return dataclasses.replace(past, checkpoints=after)


def _row(store: Store, attempt: Attempt, chosen: Sequence[int]) -> dict[str, Any]:
    checkpoint = attempt.checkpoint
    if checkpoint is None:
        why = "never committed"
    else:
        why = "retired now" if checkpoint.index in chosen else "retired before"
    return {
        "step": attempt.step,
        "generation": attempt.generation,
        "why": why,
        "folder": attempt.folder,
        "objects": len(attempt.keys),
        "size_bytes": sum(sizes(store, attempt.keys)),
    }


def _size(store: Store, key: str) -> int:
    try:
        return store.stat(key).size_bytes
    except FileNotFoundError:
        return 0


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="sizes")
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)
