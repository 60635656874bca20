"""Takes old checkpoints out of use, and removes what no checkpoint needs.

A checkpoint is first retired in the log, then its objects are deleted unless somebody has pinned
them: a crash in between leaves objects that the next sweep finds, never a checkpoint half there.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from checkpointing.history import Checkpoint, History, history
from checkpointing.incarnation import Incarnation
from checkpointing.pins import pinned_checkpoints
from storage.errors import ConfigurationError, RangeFlowError
from storage.log import Record
from storage.store import Store

logger = logging.getLogger(__name__)

_ATTEMPT = re.compile(
    r"(checkpoints/g(\d{4,})/s(\d{8,})-[0-9a-f]{12})/[A-Za-z0-9_+=-][A-Za-z0-9._+=-]*"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionConfig:
    """Which checkpoints are kept besides the best, the healthy, the verified and the pinned."""

    keep_last: int = 3
    """Newest checkpoints to keep."""
    keep_every_steps: int = 0
    """Keep the first checkpoint at or after each multiple of this for ever; 0 turns it off."""

    def __post_init__(self) -> None:
        if self.keep_last < 2:
            raise ConfigurationError(
                "keep_last must be at least 2, because the newest checkpoint may turn out damaged; "
                f"got {self.keep_last}"
            )
        if self.keep_every_steps < 0:
            raise ConfigurationError(
                f"keep_every_steps must be at least 0 (off); got {self.keep_every_steps}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """The objects of one attempt to save; `checkpoint` is None when it never committed."""

    folder: str
    generation: int
    step: int
    keys: tuple[str, ...]
    checkpoint: Checkpoint | None


def victims(past: History, policy: RetentionConfig, pinned: set[int]) -> list[int]:
    """Indices of the live checkpoints to retire.

    Never one of the newest `keep_last`, the first at or after a multiple of `keep_every_steps`, the
    newest healthy, the newest verified, the parent that the newest was resumed from, the best by
    validation loss, or a pinned one.
    """
    live = past.live
    if len(live) <= policy.keep_last:
        return []
    kept = {c.index for c in live[-policy.keep_last :]} | pinned
    if policy.keep_every_steps:
        kept |= milestones(past, policy.keep_every_steps)
    kept |= {c.index for c in [c for c in live if c.healthy][-1:]}
    kept |= {c.index for c in [c for c in live if c.verified][-1:]}
    if live[-1].parent is not None:
        kept.add(live[-1].parent)
    scored = [c for c in live if c.validation_loss is not None]
    if scored:
        kept.add(min(scored, key=lambda c: (c.validation_loss or 0.0, -c.index)).index)
    return [c.index for c in live if c.index not in kept]


def milestones(past: History, every_steps: int) -> set[int]:
    """Indices of the first checkpoints at or after each multiple: a save may have been put off."""
    found: set[int] = set()
    reached = 0
    for checkpoint in past.checkpoints:
        if not checkpoint.quarantined and checkpoint.step // every_steps > reached:
            reached = checkpoint.step // every_steps
            found.add(checkpoint.index)
    return found


def retire(
    store: Store,
    incarnation: Incarnation,
    policy: RetentionConfig,
    *,
    announce: Callable[[str], None] = lambda phase: None,
) -> None:
    """Retire what the policy lets go and delete its objects. Call on rank 0, after a commit."""

    def choose(records: Sequence[Record]) -> dict[str, list[int]] | None:
        chosen = victims(history(records), policy, pinned_checkpoints(store))
        announce("retire:chosen")
        return {"checkpoints": chosen} if chosen else None

    record = incarnation.append("RETIRE", choose)
    if record is None:
        return
    announce("retire:recorded")
    past = history(incarnation.records)
    pinned = pinned_checkpoints(store)
    for checkpoint in past.checkpoints:
        if checkpoint.index not in record.body["checkpoints"]:
            continue
        try:
            for attempt in unneeded(
                store, past, pinned, damaged=False, below=folder_of(checkpoint)
            ):
                remove(store, attempt)
        except RangeFlowError as error:
            logger.warning("step %d was retired but not yet removed: %s", checkpoint.step, error)
    announce("retire:deleted")


def sweep(store: Store, incarnation: Incarnation) -> None:
    """Remove objects of attempts that never committed, and leftovers of retired checkpoints."""
    past = history(incarnation.check())
    pinned = pinned_checkpoints(store)
    for attempt in unneeded(store, past, pinned, damaged=bool(incarnation.damaged_records)):
        remove(store, attempt)


def unneeded(
    store: Store, past: History, pinned: set[int], *, damaged: bool, below: str = "checkpoints"
) -> list[Attempt]:
    """Attempts that no checkpoint needs; `pinned` must have been listed after `past` was read.

    Those that never committed only of generations below the last claimant's, so a save in flight
    is never touched. What is in quarantine stays; and when a record of the log is `damaged`, so
    does every attempt without a COMMIT, because the damaged record may have been that.
    """
    found: list[Attempt] = []
    for attempt in attempts(store, past, below=below):
        checkpoint = attempt.checkpoint
        if checkpoint is None:
            needed = damaged or attempt.generation >= past.generation
        else:
            needed = not checkpoint.retired or checkpoint.quarantined or checkpoint.index in pinned
        if not needed:
            found.append(attempt)
    return found


def attempts(store: Store, past: History, *, below: str = "checkpoints") -> list[Attempt]:
    """Every attempt to save that has objects. What is no object of an attempt is left out."""
    owners = {folder_of(c): c for c in past.checkpoints}
    keys: dict[str, list[str]] = {}
    for key in store.list(f"{below}/"):
        match = _ATTEMPT.fullmatch(key)
        if match is not None:
            keys.setdefault(match[1], []).append(key)
    found: list[Attempt] = []
    for folder, members in keys.items():
        match = _ATTEMPT.fullmatch(members[0])
        assert match is not None, "only keys that match were kept"
        found.append(
            Attempt(
                folder=folder,
                generation=int(match[2]),
                step=int(match[3]),
                keys=tuple(members),
                checkpoint=owners.get(folder),
            )
        )
    return found


def remove(store: Store, attempt: Attempt, *, advance: Callable[[], None] = lambda: None) -> None:
    """Delete the objects of an attempt that `unneeded` has named."""
    for key in attempt.keys:
        store.delete(key)
        advance()


def folder_of(checkpoint: Checkpoint) -> str:
    """What the keys of a checkpoint's objects begin with, without the last `/`."""
    return checkpoint.manifest_key.rpartition("/")[0]


def recorded_policy(past: History) -> RetentionConfig | None:
    """What the last start of the training program kept; None when its CLAIM cannot be read.

    A start that says nothing was one of an earlier version, which kept the newest alone.
    """
    if past.claim is None:
        return None
    said = past.claim.body.get("retention", {})
    if not isinstance(said, dict):
        return None
    default = RetentionConfig()
    keep_last = said.get("keep_last", default.keep_last)
    keep_every_steps = said.get("keep_every_steps", default.keep_every_steps)
    if type(keep_last) is not int or type(keep_every_steps) is not int:
        return None
    try:
        return RetentionConfig(keep_last=keep_last, keep_every_steps=keep_every_steps)
    except ConfigurationError:
        return None
