"""Takes old checkpoints out of use, and removes what no checkpoint needs.

A checkpoint is first retired in the log, then its objects are deleted unless a reader has pinned
them: a crash in between leaves objects that the next sweep finds, never a checkpoint half there.
"""

import logging
import re
from collections.abc import Callable, Sequence

from checkpointing.history import Checkpoint, History, history
from checkpointing.incarnation import Incarnation
from checkpointing.pins import pinned_checkpoints
from storage.errors import RangeFlowError
from storage.log import Record
from storage.store import Store

logger = logging.getLogger(__name__)

_ATTEMPT = re.compile(r"checkpoints/g(\d{4,})/s\d{8,}-[0-9a-f]{12}")


def victims(past: History, *, keep_last: int, pinned: set[int]) -> list[int]:
    """Indices of the live checkpoints to retire.

    Never one of the newest `keep_last`, the newest healthy, the parent of the newest, the best by
    validation loss, or a pinned one.
    """
    live = past.live
    if len(live) <= keep_last:
        return []
    kept = {c.index for c in live[-keep_last:]} | pinned
    kept |= {c.index for c in [c for c in live if c.healthy][-1:]}
    if live[-1].parent is not None:
        kept.add(live[-1].parent)
    scored = [c for c in live if c.validation_loss is not None]
    if scored:
        kept.add(min(scored, key=lambda c: (c.validation_loss or 0.0, -c.index)).index)
    return [c.index for c in live if c.index not in kept]


def retire(
    store: Store,
    incarnation: Incarnation,
    *,
    keep_last: int,
    announce: Callable[[str], None] = lambda phase: None,
) -> None:
    """Retire what is beyond `keep_last` and delete its objects. Call on rank 0, after a commit."""
    pinned = pinned_checkpoints(store)

    def choose(records: Sequence[Record]) -> dict[str, list[int]] | None:
        chosen = victims(history(records), keep_last=keep_last, pinned=pinned)
        announce("retire:chosen")
        return {"checkpoints": chosen} if chosen else None

    record = incarnation.append("RETIRE", choose)
    if record is None:
        return
    announce("retire:recorded")
    retired = set(record.body["checkpoints"])
    _delete(store, [c for c in history(incarnation.records).checkpoints if c.index in retired])
    announce("retire:deleted")


def sweep(store: Store, incarnation: Incarnation) -> None:
    """Remove objects of attempts that never committed, and leftovers of retired checkpoints.

    Only generations below this one are looked at, so a save in flight is never touched. What is in
    quarantine stays; and when a record of the log is damaged, so does every attempt without a
    COMMIT, because the damaged record may have been that.
    """
    checkpoints = history(incarnation.check()).checkpoints
    owners = {c.manifest_key.rpartition("/")[0]: c for c in checkpoints}
    pinned = pinned_checkpoints(store)
    for key in store.list("checkpoints/"):
        attempt = _ATTEMPT.match(key)
        if attempt is None:
            continue
        owner = owners.get(attempt[0])
        if owner is None:
            needed = bool(incarnation.damaged_records) or int(attempt[1]) >= incarnation.generation
        else:
            needed = not owner.retired or owner.quarantined or owner.index in pinned
        if not needed:
            store.delete(key)


def _delete(store: Store, checkpoints: Sequence[Checkpoint]) -> None:
    """Delete the objects of retired checkpoints that nobody has pinned since."""
    pinned = pinned_checkpoints(store)
    for checkpoint in checkpoints:
        if checkpoint.index in pinned:
            continue
        try:
            for key in store.list(f"{checkpoint.manifest_key.rpartition('/')[0]}/"):
                store.delete(key)
        except RangeFlowError as error:
            logger.warning("step %d was retired but not yet removed: %s", checkpoint.step, error)
