"""Finds the newest checkpoint that can be proved whole, on all ranks together.

Rank 0 reads the log and decides; every rank reads and verifies, from a disk everything, from a
bucket 1/N, which it then gives to the others; one vote. A checkpoint that a rank reads damaged
twice is put in QUARANTINE, and all step back to the one before. A store that fails quarantines
nothing. Two quarantines in one start mean that something else is wrong: stop.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from checkpointing.group import Group, Solo
from checkpointing.history import Checkpoint, history
from checkpointing.incarnation import Incarnation
from checkpointing.load import Loaded, load, spread
from storage.errors import (
    FencedError,
    IntegrityError,
    NoUsableCheckpointError,
    RangeFlowError,
    StopRequestedError,
    StoreUnavailableError,
)
from storage.store import Store

logger = logging.getLogger(__name__)

MOST_QUARANTINES = 2


def restore(
    store: Store,
    incarnation: Incarnation | None,
    group: Group,
    *,
    announce: Callable[[str], None] = lambda phase: None,
    before_object: Callable[[], None] = lambda: None,
) -> Loaded | None:
    """The newest whole checkpoint, the same on every rank; None when the run never had one.

    Raises NoUsableCheckpointError when the run has checkpoints and none can be used, or when two
    were found damaged in this start; StoreUnavailableError when the store fails. `before_object` is
    called before each object is read; StopRequestedError that it raises on one rank ends the
    restore on all.
    """
    for quarantines in range(MOST_QUARANTINES + 1):
        announce("restore")
        candidate = _choose(store, incarnation, group, gave_up=quarantines == MOST_QUARANTINES)
        if candidate is None:
            return None
        apart = store.local_path(candidate.manifest_key) is None
        loaded, outcome = _try(store, candidate, group if apart else Solo(), before_object)
        outcomes = group.gather(outcome)
        for stopped in (o["stopped"] for o in outcomes if "stopped" in o):
            raise StopRequestedError(stopped)
        damage = [f"rank {r}: {o['damaged']}" for r, o in enumerate(outcomes) if "damaged" in o]
        if damage:
            _quarantine(incarnation, group, candidate, damage[0])
            continue
        failures = [o["unavailable"] for o in outcomes if "unavailable" in o]
        if failures:
            raise StoreUnavailableError(f"no checkpoint could be read: {failures[0]}")
        assert loaded is not None, "what is neither damaged nor out of reach was read"
        if apart:
            spread(loaded, group)
        return loaded
    raise AssertionError("the last round either returns or raises")


def _choose(
    store: Store, incarnation: Incarnation | None, group: Group, *, gave_up: bool
) -> Checkpoint | None:
    choice: dict[str, Any] = {}
    if incarnation is not None:
        try:
            past = history(incarnation.check())
            if past.live and not gave_up:
                choice = {"checkpoint": asdict(past.live[-1])}
            elif past.checkpoints:
                quarantined = [c.step for c in past.checkpoints if c.quarantined]
                choice = {"error": f"steps {quarantined} are in quarantine"}
            elif incarnation.damaged_records and store.list("checkpoints/"):
                records = list(incarnation.damaged_records)
                choice = {"error": f"log records {records} are, and no checkpoint is left"}
        except FencedError as error:
            choice = {"fenced": str(error)}
    choice = group.broadcast(choice)
    if "fenced" in choice:
        raise FencedError(choice["fenced"])
    if "error" in choice:
        raise NoUsableCheckpointError(
            f"checkpoints of this run are damaged ({choice['error']}). Find out why (disk, memory, "
            "network); `python -m checkpointing.runs show RUN` lists what is left. Starting again "
            "goes on from an older checkpoint if one is live; `--run` with a new name starts anew"
        )
    return Checkpoint(**choice["checkpoint"]) if choice else None


def _try(
    store: Store, checkpoint: Checkpoint, readers: Group, before_object: Callable[[], None]
) -> tuple[Loaded | None, dict[str, str]]:
    """Read this rank's part; what looks damaged is read a second time before it is called so."""
    for again in (True, False):
        try:
            rank, size = readers.rank, readers.size
            return load(store, checkpoint, rank=rank, size=size, before_object=before_object), {}
        except IntegrityError as error:
            if not again:
                return None, {"damaged": str(error)}
        except StopRequestedError as error:
            return None, {"stopped": str(error)}
        except RangeFlowError as error:
            return None, {"unavailable": str(error)}
    raise AssertionError("the second reading always returns")


def _quarantine(
    incarnation: Incarnation | None, group: Group, checkpoint: Checkpoint, reason: str
) -> None:
    logger.warning(
        "the checkpoint of step %d is damaged and goes into quarantine: %s", checkpoint.step, reason
    )
    if incarnation is not None:
        body = {"checkpoints": [checkpoint.index], "reason": reason}
        incarnation.append("QUARANTINE", lambda _: body)
    group.gather(None)
