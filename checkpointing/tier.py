"""The local tier: snapshots on this host's own disk or RAM disk, between a run's checkpoints.

A tier is a small run store below `<folder>/<run id>-<place>`, claimed, written and retired by the
same code as the run's. What lies there is no checkpoint of the run: `adopt` commits it to the run's
store first, and only when it was written for this run by the last incarnation before this one that
wrote anything, every byte of it is verified, the checkpoint that was newest at the time is still
live, the plan begins with the plan of then, and it is newer than the newest checkpoint.

Covers: processes that die while their host lives. Does not cover: several hosts.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpointing.group import Solo
from checkpointing.history import Checkpoint, History, history
from checkpointing.incarnation import Incarnation, claim_run
from checkpointing.load import load
from checkpointing.naming import RUN_KEY
from checkpointing.save import TrainingState, save
from storage.canonical import sha256_hex
from storage.errors import IntegrityError, StoreUnavailableError
from storage.log import Log, Record, record_key
from storage.store import LocalStore, Store

logger = logging.getLogger(__name__)

_CONTEXT = "tier"


def tier_store(folder: str, run: str, store: Store) -> Store:
    """The place of the tier of a run in a store; a copy of the run has another."""
    path = store.local_path(RUN_KEY)
    place = str(path.parent.resolve()) if path is not None else store.url
    return LocalStore(Path(folder) / f"{run}-{sha256_hex(place.encode())[:8]}")


def claim_tier(tier: Store, incarnation: Incarnation) -> Incarnation:
    """The right to write to the tier, which is emptied, for an owner of the run.

    Whoever had it before is fenced: its CLAIM is gone.
    """
    clear_tier(tier)
    body = {"generation": incarnation.generation}
    return claim_run(tier, Log(tier), body=body, take_over=True)


def clear_tier(tier: Store) -> None:
    """Remove everything from the tier."""
    for key in tier.list(""):
        tier.delete(key)


def drop_records_before(tier: Store, base: Record) -> None:
    """Delete the tier's records before its newest BASE, but for its CLAIM: memory is dear here."""
    for key in tier.list("log/")[1:]:
        if key < record_key(base.index):
            tier.delete(key)


def for_tier(state: TrainingState, past: History) -> TrainingState:
    """The state with what `adopt` must know of the run at this moment. For rank 0."""
    context = {"base": past.live[-1].index if past.live else None, "plans": _plans(past)}
    return replace(state, extra={**state.extra, _CONTEXT: context})


def adopt(tier: Store, store: Store, incarnation: Incarnation) -> Checkpoint | None:
    """Commit the newest snapshot of the tier to the run, if it counts; None when none does.

    Raises FencedError when a later incarnation owns the run, StoreUnavailableError when the store
    fails. Call before the tier is claimed.
    """
    past = history(Log(tier).refresh())
    if not past.live or past.claim is None:
        return None
    snapshot = past.live[-1]
    now = history(incarnation.check())
    try:
        why_not = _stale(past, snapshot, now, incarnation)
        loaded = load(tier, snapshot) if not why_not else None
    except (IntegrityError, StoreUnavailableError) as error:
        why_not, loaded = str(error), None
    if loaded is None:
        logger.info("the local snapshot of step %d is not used: %s", snapshot.step, why_not)
        return None
    extra = dict(loaded.extra)
    context: dict[str, Any] = extra.pop(_CONTEXT, {})
    live = {checkpoint.index for checkpoint in now.live}
    base, plans = context.get("base"), context.get("plans", [])
    if (base is not None and base not in live) or _plans(now)[: len(plans)] != plans:
        logger.info("the local snapshot of step %d is of another past", snapshot.step)
        return None
    state = TrainingState(
        tensors=loaded.tensors, exact=loaded.exact, extra=extra, cursor=snapshot.cursor
    )
    adopted = save(
        store,
        incarnation,
        Solo(),
        state,
        step=snapshot.step,
        parent=base,
        healthy=snapshot.healthy,
    )
    if adopted is None:
        raise StoreUnavailableError(f"the local snapshot of step {snapshot.step} is kept for later")
    assert adopted.digest == snapshot.digest, "a digest does not know where it was made"
    logger.info("step %d was saved on this host only, and is now committed", adopted.step)
    return adopted


def _stale(past: History, snapshot: Checkpoint, now: History, incarnation: Incarnation) -> str:
    """Why a snapshot does not count, as far as the two logs tell; "" when it does.

    Starts between its writer and this one must have written nothing but their CLAIM.
    """
    assert past.claim is not None, "the caller has looked"
    writer = past.claim.body["generation"]
    between = range(writer + 1, incarnation.generation)
    went_on = [r for r in incarnation.records if r.generation in between and r.kind != "CLAIM"]
    if snapshot.generation != past.generation or went_on or writer >= incarnation.generation:
        return f"generation {writer} wrote it, and another went on since"
    if now.live and now.live[-1].step >= snapshot.step:
        return f"step {now.live[-1].step} is committed"
    return ""


def _plans(past: History) -> list[str]:
    return [record.sha256 for record in past.plans]
