"""Readers' leases: a pinned checkpoint keeps its objects while somebody reads it.

A reader chooses, pins, and reads the log again; when the checkpoint has been retired meanwhile,
its objects may be gone and the reader chooses anew. Whoever deletes lists pins after the RETIRE.
"""

import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from checkpointing.history import Checkpoint, History, history
from storage.canonical import canonical_json
from storage.errors import ConfigurationError, StoreUnavailableError
from storage.log import Log
from storage.store import Store

logger = logging.getLogger(__name__)

LEASE_SECONDS = 3600.0
"""A reader that was killed holds its checkpoint for at most this long."""


def pinned_checkpoints(store: Store, *, wall_clock: Callable[[], float] = time.time) -> set[int]:
    """Indices of checkpoints that a reader holds now."""
    held: set[int] = set()
    for key in store.list("pins/"):
        try:
            pin = json.loads(store.get(key))
            checkpoint, until = int(pin["checkpoint"]), pin["until"]
        except (FileNotFoundError, ConfigurationError, ValueError, KeyError, TypeError):
            continue  # gone since it was listed, or somebody else's file
        if until is None or until > wall_clock():
            held.add(checkpoint)
        else:
            store.delete(key)
    return held


@contextmanager
def pinned(
    store: Store,
    log: Log,
    choose: Callable[[History], Checkpoint],
    *,
    wall_clock: Callable[[], float] = time.time,
) -> Iterator[Checkpoint]:
    """Hold the checkpoint that `choose` picks, while the body reads it.

    Where no pin can be written, as in a read-only copy of a run, it is read without one.
    """
    while True:
        checkpoint = choose(history(log.refresh()))
        key = f"pins/{uuid.uuid4().hex}.json"
        pin = {"checkpoint": checkpoint.index, "until": wall_clock() + LEASE_SECONDS}
        try:
            store.put(key, canonical_json(pin))
        except StoreUnavailableError as error:
            logger.warning("reading without a pin: %s", error)
            yield checkpoint
            return
        try:
            now = {c.index: c for c in history(log.refresh()).checkpoints}
            if now[checkpoint.index].retired == checkpoint.retired:
                yield checkpoint
                return
        finally:
            store.delete(key)
