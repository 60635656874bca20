"""The local tier: snapshots on a host's own disk or RAM disk, between a run's checkpoints.

A tier is a small run store below `<folder>/<run id>-<place>`, claimed, written and retired by the
same code as the run's, by the processes of one host, for whom it holds the whole state. What lies
there is no checkpoint of the run: `adopt` commits it to the run's store first, and only when it was
written for this run by the last incarnation before this one that wrote anything, every byte of it
is verified, the checkpoint that was newest at the time is still live, the plan begins with the plan
of then, it is newer than the newest checkpoint, no other host has another state for its step, and
the caller does not refuse it: a run's curve must still have the rows up to it.

Covers: processes that die while their host lives; the loss of hosts, as long as one is left.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from checkpointing.group import Group, Solo
from checkpointing.history import Checkpoint, History, history
from checkpointing.incarnation import Incarnation, claim_run
from checkpointing.layout import Spec, share, specs_of
from checkpointing.load import Loaded, load, read_manifest
from checkpointing.naming import RUN_KEY
from checkpointing.save import TrainingState
from checkpointing.snapshot import Arena, Snapshot
from checkpointing.write import Around, Job, write
from storage.canonical import sha256_hex
from storage.errors import FencedError, RangeFlowError, StoreUnavailableError
from storage.log import Log, Record, record_key
from storage.store import LocalStore, Store

logger = logging.getLogger(__name__)

_CONTEXT = "tier"


def tier_store(folder: str, run: str, store: Store) -> Store:
    """The place of the tier of a run in a store; a copy of the run has another."""
    path = store.local_path(RUN_KEY)
    place = str(path.parent.resolve()) if path is not None else store.url
    return LocalStore(Path(folder) / f"{run}-{sha256_hex(place.encode())[:8]}")


def claim_tier(tier: Store, generation: int) -> Incarnation:
    """The right to write to the tier, which is emptied, for the run's owner of a generation.

    Whoever had it before is fenced: its CLAIM is gone.
    """
    clear_tier(tier)
    return claim_run(tier, Log(tier), body={"generation": generation}, take_over=True)


def clear_tier(tier: Store) -> None:
    """Remove everything from the tier."""
    for key in tier.list(""):
        tier.delete(key)


def drop_records_before(tier: Store, base: Record) -> None:
    """Delete the tier's records before its newest BASE, but for its CLAIM: memory is dear here."""
    for key in tier.list("log/")[1:]:
        if key < record_key(base.index):
            tier.delete(key)


def tier_context(past: History) -> dict[str, Any]:
    """What `adopt` must know of the run at the moment of a snapshot. JSON."""
    return {"base": past.live[-1].index if past.live else None, "plans": _plans(past)}


def for_tier(state: TrainingState, context: dict[str, Any]) -> TrainingState:
    """The state with its context, for the rank that commits to the tier."""
    return replace(state, extra={**state.extra, _CONTEXT: context})


def adopt(
    tier: Store,
    store: Store,
    incarnation: Incarnation | None,
    group: Group | None = None,
    *,
    holds: bool = True,
    refused: Callable[[int, int], str] = lambda committed, step: "",
) -> Checkpoint | None:
    """Commit the newest snapshot that counts of any host to the run; None when none does.

    `refused` is asked on rank 0, with the newest committed step (0 for none) and a snapshot's, why
    that one must not be used; "" when it may.

    Every process of the group calls it, one of each host with `holds`; only rank 0 has an
    incarnation, decides, and gets the checkpoint. Whoever holds the snapshot uploads it. Raises on
    every rank FencedError when a later incarnation owns the run, and StoreUnavailableError when the
    store fails. Call before the tiers are claimed.
    """
    group = group or Solo()
    offers = group.gather(_offer(tier) if holds else {})
    verdict: dict[str, Any] = {}
    if incarnation is not None:
        try:
            verdict = {"order": _in_order(offers, incarnation, refused)}
        except FencedError as error:
            verdict = {"fenced": str(error)}
        except StoreUnavailableError as error:
            verdict = {"unavailable": str(error)}
    verdict = group.broadcast(verdict)
    if "fenced" in verdict:
        raise FencedError(verdict["fenced"])
    if "unavailable" in verdict:
        raise StoreUnavailableError(verdict["unavailable"])
    for rank in verdict["order"]:
        snapshot = Checkpoint(**offers[rank]["snapshot"])
        loaded = _loaded(tier, snapshot) if group.rank == rank else ""
        why_not = group.gather(loaded if isinstance(loaded, str) else "")[rank]
        if why_not:
            _not_used(snapshot.step, rank, why_not)
            continue
        index = _relay(store, incarnation, group, rank, loaded, snapshot, offers[rank]["context"])
        if incarnation is None:
            return None
        adopted = next(c for c in history(incarnation.records).live if c.index == index)
        assert adopted.digest == snapshot.digest, "a digest does not know where it was made"
        logger.info("step %d was in a local tier only, and is now committed", adopted.step)
        return adopted
    return None


def _offer(tier: Store) -> dict[str, Any]:
    """What this host has: its newest snapshot, by whom, and of which past. JSON."""
    try:
        past = history(Log(tier).refresh())
        if not past.live or past.claim is None:
            return {}
        snapshot = past.live[-1]
        context = read_manifest(tier, snapshot)["extra"].get(_CONTEXT, {})
    except RangeFlowError as error:
        return {"why_not": str(error)}
    writer = past.claim.body["generation"]
    whole = snapshot.generation == past.generation
    return {"snapshot": asdict(snapshot), "context": context, "writer": writer, "whole": whole}


def _in_order(
    offers: Sequence[dict[str, Any]],
    incarnation: Incarnation,
    refused: Callable[[int, int], str],
) -> list[int]:
    """The ranks whose snapshots count, the newest first."""
    now = history(incarnation.check())
    committed = now.live[-1].step if now.live else 0
    found: list[tuple[int, int]] = []
    digests: dict[int, set[str]] = {}
    for rank, offer in enumerate(offers):
        if not offer:
            continue
        step = offer["snapshot"]["step"] if "snapshot" in offer else 0
        why_not = offer.get("why_not") or _stale(offer, now, incarnation)
        why_not = why_not or refused(committed, step)
        if why_not:
            _not_used(step, rank, why_not)
            continue
        found.append((-step, rank))
        digests.setdefault(step, set()).add(offer["snapshot"]["digest"])
    for step in [step for step, different in digests.items() if len(different) > 1]:
        logger.warning(
            "the local snapshots of step %d are not the same on all hosts, and are not used; a "
            "device may be faulty",
            step,
        )
        found = [(age, rank) for age, rank in found if age != -step]
    return [rank for _, rank in sorted(found)]


def _stale(offer: dict[str, Any], now: History, incarnation: Incarnation) -> str:
    """Why a snapshot does not count, as far as the two logs tell; "" when it does.

    Starts between its writer and this one must have written nothing but their CLAIM.
    """
    writer, step = offer["writer"], offer["snapshot"]["step"]
    between = range(writer + 1, incarnation.generation)
    went_on = [r for r in incarnation.records if r.generation in between and r.kind != "CLAIM"]
    if not offer["whole"] or went_on or writer >= incarnation.generation:
        return f"generation {writer} wrote it, and another went on since"
    if now.live and now.live[-1].step >= step:
        return f"step {now.live[-1].step} is committed"
    live = {checkpoint.index for checkpoint in now.live}
    base, plans = offer["context"].get("base"), offer["context"].get("plans", [])
    if (base is not None and base not in live) or _plans(now)[: len(plans)] != plans:
        return "it is of another past"
    return ""


def _not_used(step: int, rank: int, why_not: str) -> None:
    logger.info("the local snapshot of step %d, on rank %d, is not used: %s", step, rank, why_not)


def _loaded(tier: Store, snapshot: Checkpoint) -> Loaded | str:
    """The snapshot with every byte verified, or why it cannot be used."""
    try:
        return load(tier, snapshot)
    except RangeFlowError as error:
        return str(error)


def _relay(
    store: Store,
    incarnation: Incarnation | None,
    group: Group,
    holder: int,
    loaded: Loaded | str,
    snapshot: Checkpoint,
    context: dict[str, Any],
) -> int:
    """Commit what one rank has loaded: it uploads everything, and rank 0 appends the COMMIT."""
    told: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    if isinstance(loaded, Loaded):
        tensors = loaded.tensors
        extra = {name: value for name, value in loaded.extra.items() if name != _CONTEXT}
        table = {name: [spec.dtype, spec.shape] for name, spec in specs_of(tensors).items()}
        told = {"specs": table, "exact": loaded.exact, "extra": extra}
    told = group.gather(told)[holder]
    specs = {
        name: Spec(dtype=dtype, shape=tuple(shape))
        for name, (dtype, shape) in told["specs"].items()
    }
    once = threading.Event()
    once.set()
    with ThreadPoolExecutor(1, thread_name_prefix="snapshot") as copier:
        arena = Arena(share(specs, 0, 1) if tensors else (), pinned=False)
        job = Job(
            step=snapshot.step,
            snapshot=Snapshot(arena, tensors, copier, compare=False),
            specs=specs,
            exact=told["exact"],
            extra=told["extra"],
            cursor=snapshot.cursor,
            parent=context.get("base"),
            healthy=snapshot.healthy,
            validation_loss=None,
        )
        around = Around(
            announce=lambda phase: None,
            before_commit=lambda: None,
            failing=lambda why: logger.warning("a local snapshot was not committed: %s", why),
            give_up=once,
        )
        index = write(store, incarnation, group, job, around)
    if index is None:
        raise StoreUnavailableError(f"the local snapshot of step {snapshot.step} is kept for later")
    return index


def _plans(past: History) -> list[str]:
    return [record.sha256 for record in past.plans]
