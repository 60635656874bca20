"""Uploads one snapshot, on all ranks together, and commits it: objects, manifest, COMMIT.

Nothing exists until the COMMIT is in the log; before that there are only objects under keys that
no other attempt uses. Objects are immutable.

Covers: kills at any instant, uploads that fail (they are tried again, on all ranks alike, until
they succeed or a newer state waits to be saved), fencing, replicas that differ, stores whose
checksum is not that of the bytes sent.
Does not cover: a local disk that loses what it has synced; `runs verify` finds that.
"""

import math
import os
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

from checkpointing.digest import checkpoint_digest, chunk_digests
from checkpointing.group import Group
from checkpointing.incarnation import Incarnation
from checkpointing.layout import ObjectLayout, Spec
from checkpointing.snapshot import Snapshot
from storage.canonical import canonical_json, sha256_hex
from storage.checksum import matches
from storage.errors import (
    DivergenceError,
    FencedError,
    IntegrityError,
    RangeFlowError,
    StoreUnavailableError,
)
from storage.log import Record
from storage.store import Store

FORMAT = 2
UPLOADS_IN_FLIGHT = 4
NICENESS = 10
"""Of uploading threads: a weight of 110 beside training's 1,024 (sched(7))."""
PATIENCE_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Pauses before a failed write is tried again; the last one repeats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is to be written: a snapshot of this rank's share, and what is said of the whole."""

    step: int
    snapshot: Snapshot
    specs: Mapping[str, Spec]
    exact: Mapping[str, Any]
    extra: Mapping[str, Any]
    cursor: Mapping[str, Any] | None = None
    parent: int | None
    healthy: bool
    validation_loss: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Around:
    """What a write tells, and is told. Only `announce` is used on ranks other than 0.

    `before_commit` is called when everything is uploaded. `failing` hears why a write failed. Once
    `give_up` is set, because a newer state waits to be saved or the process must leave, a write
    that fails is not tried again.
    """

    announce: Callable[[str], None]
    before_commit: Callable[[], None]
    failing: Callable[[str], None]
    give_up: threading.Event


def write(
    store: Store, incarnation: Incarnation | None, group: Group, job: Job, around: Around
) -> int | None:
    """Upload and commit; the index of the COMMIT on every rank, or None when it was given up.

    Raises FencedError on every rank when a later incarnation owns the run, and DivergenceError when
    the ranks do not hold the same state.
    """
    around.announce("save:begin")
    job.snapshot.finished()
    uploaded = _Uploaded()
    attempt = ""
    for round_number in count():
        if not attempt:
            attempt = _settle(group, _begin(incarnation, job.step)).get("attempt", "")
        receipt = _upload(store, group, job, attempt, uploaded, around.announce)
        receipts = group.gather(receipt)
        verdict = {}
        if incarnation is not None:
            verdict = _judge(store, incarnation, job, attempt, receipts, around)
            if "again" in verdict:
                around.failing(verdict["again"])
                pause = PATIENCE_SECONDS[min(round_number, len(PATIENCE_SECONDS) - 1)]
                if around.give_up.wait(pause):
                    verdict = {"given_up": True}
        verdict = _settle(group, verdict)
        for key in verdict.get("missing", ()):
            uploaded.objects.pop(key, None)
        if "again" not in verdict:
            break
    if "committed" not in verdict:
        return None
    around.announce("save:committed")
    return int(verdict["committed"])


@dataclass(slots=True)
class _Uploaded:
    """What this rank has uploaded so far; a write that is tried again goes on from there."""

    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    chunks: dict[str, dict[int, str]] = field(default_factory=dict)
    verified: bool = True


def _settle(group: Group, verdict: dict[str, Any]) -> dict[str, Any]:
    """Rank 0's verdict on every rank; what ends the incarnation is raised."""
    verdict = group.broadcast(verdict)
    if "fenced" in verdict:
        raise FencedError(verdict["fenced"])
    if "diverged" in verdict:
        raise DivergenceError(verdict["diverged"])
    return verdict


def _begin(incarnation: Incarnation | None, step: int) -> dict[str, Any]:
    """The key prefix of this attempt, unique; nothing is written by a stale incarnation."""
    if incarnation is None:
        return {}
    try:
        incarnation.check()
    except FencedError as error:
        return {"fenced": str(error)}
    except RangeFlowError:
        return {}  # asked again in the next round
    return {
        "attempt": f"checkpoints/g{incarnation.generation:04d}/s{step:08d}-{uuid.uuid4().hex[:12]}"
    }


def _upload(
    store: Store,
    group: Group,
    job: Job,
    attempt: str,
    uploaded: _Uploaded,
    announce: Callable[[str], None],
) -> dict[str, Any]:
    """Upload what is not there yet of this rank's share; the receipt tells what was, or why not."""
    receipt: dict[str, Any] = {"step": job.step, "fingerprints": job.snapshot.fingerprints()}
    if not attempt:
        return {**receipt, "error": "the log could not be read"}
    hashing = threading.Lock()  # one core for digests; uploads wait for the network, not the CPU

    def one(number: int) -> None:
        key = f"{attempt}/r{group.rank:03d}-p{number:02d}.safetensors"
        if key in uploaded.objects:
            return
        layout, data = job.snapshot.arena.objects[number], job.snapshot.arena.data(number)
        with hashing:
            _lower_priority()
            digests = _digests(layout, data)
        store.put(key, data)
        try:
            verified = _compare(store, key, layout, data, digests)
        except FileNotFoundError as error:  # a later claimant has swept it, as it may
            raise StoreUnavailableError(f"{key} is not in the store after its upload") from error
        for tensor, chunks in digests.items():
            uploaded.chunks.setdefault(tensor, {}).update(chunks)
        pieces = [[piece.tensor, piece.start, piece.stop] for piece in layout.pieces]
        uploaded.objects[key] = {"size_bytes": len(data), "pieces": pieces}
        uploaded.verified = uploaded.verified and verified
        announce("save:object")

    try:
        with ThreadPoolExecutor(UPLOADS_IN_FLIGHT, thread_name_prefix="upload") as pool:
            list(pool.map(one, range(len(job.snapshot.arena.objects))))
    except RangeFlowError as error:
        again = isinstance(error, StoreUnavailableError | IntegrityError)
        return {**receipt, "error": str(error), "hopeless": not again}
    chunks = {tensor: sorted(found.items()) for tensor, found in uploaded.chunks.items()}
    return {
        **receipt,
        "objects": uploaded.objects,
        "chunks": chunks,
        "verified": uploaded.verified,
    }


def _digests(layout: ObjectLayout, data: memoryview) -> dict[str, dict[int, str]]:
    """The sha256 of every chunk in an object, by tensor and number of the chunk."""
    return {
        piece.tensor: dict(
            zip(
                piece.chunks,
                chunk_digests(data[offset : offset + piece.stop - piece.start]),
                strict=True,
            )
        )
        for piece, offset in layout.offsets()
    }


def _compare(
    store: Store,
    key: str,
    layout: ObjectLayout,
    data: memoryview,
    digests: Mapping[str, Mapping[int, str]],
) -> bool:
    """Whether the store is known to hold these bytes. Raises IntegrityError when it does not.

    By the store's own checksum; by reading back where it has none; files of a local disk are not
    read back, which would only read the memory that they were written from.
    """
    try:
        info = store.stat(key)
    except FileNotFoundError as error:
        raise StoreUnavailableError(f"{key} is not in the store after its upload") from error
    if info.size_bytes != len(data):
        raise IntegrityError(f"{key} has {info.size_bytes} bytes after upload, sent {len(data)}")
    if info.checksum:
        if not matches(data, info.checksum):
            raise IntegrityError(f"{key} was changed on its way: its {info.checksum} differs")
        return True
    if store.local_path(key) is not None:
        return False
    if _digests(layout, memoryview(store.get(key))) != digests:
        raise IntegrityError(f"{key} was changed on its way: it reads back differently")
    return True


def _judge(
    store: Store,
    incarnation: Incarnation,
    job: Job,
    attempt: str,
    receipts: Sequence[Mapping[str, Any]],
    around: Around,
) -> dict[str, Any]:
    """Rank 0's verdict on a round: committed, again, given up, or what ends the incarnation."""
    for rank, receipt in enumerate(receipts):
        if receipt["step"] != job.step:
            return {"diverged": f"rank {rank} saved step {receipt['step']}, rank 0 {job.step}"}
        mine, theirs = receipts[0]["fingerprints"], receipt["fingerprints"]
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                return {
                    "diverged": f"{name} after step {job.step} is not the same on rank {rank} and "
                    "rank 0, so the step is not saved. A device may be faulty; start again to go "
                    "on from the last checkpoint"
                }
    errors = [(rank, r) for rank, r in enumerate(receipts) if "error" in r]
    for rank, receipt in errors:
        reason = f"rank {rank}: {receipt['error']}"
        if receipt.get("hopeless"):
            around.failing(reason)
            return {"given_up": True}
    if errors:
        return {"again": f"rank {errors[0][0]}: {errors[0][1]['error']}"}
    try:
        manifest = _manifest(job, attempt, receipts)
        around.announce("save:uploaded")
        missing = sorted(manifest["objects"].keys() - set(store.list(f"{attempt}/")))
        if missing:
            again = f"{missing[0]} is not in the store after its upload"
            return {"again": again, "missing": missing}
        incarnation.check()
        return {"committed": _commit(store, incarnation, job, manifest, attempt, around)}
    except FencedError as error:
        return {"fenced": str(error)}
    except RangeFlowError as error:
        return {"again": str(error)}


def _manifest(job: Job, attempt: str, receipts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    chunks: dict[str, dict[int, str]] = {name: {} for name in job.specs}
    for receipt in receipts:
        for name, found in receipt["chunks"].items():
            chunks[name].update(found)
    tensors = {}
    for name, spec in job.specs.items():
        assert sorted(chunks[name]) == list(range(spec.chunks)), f"{name} is not stored whole"
        digests = [chunks[name][number] for number in range(spec.chunks)]
        tensors[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "chunks": digests}
    loss = job.validation_loss
    finite = loss is None or math.isfinite(loss)
    return {
        "format": FORMAT,
        "step": job.step,
        "attempt": attempt,
        "parent": job.parent,
        "objects": {key: entry for r in receipts for key, entry in r["objects"].items()},
        "tensors": tensors,
        "exact": job.exact,
        "extra": job.extra,
        "digest": checkpoint_digest(tensors, job.exact),
        "versions": {"torch": torch.__version__},
        "healthy": job.healthy and finite,
        "validation_loss": loss if finite else None,
        "verified": all(receipt["verified"] for receipt in receipts),
    }


def _commit(
    store: Store,
    incarnation: Incarnation,
    job: Job,
    manifest: Mapping[str, Any],
    attempt: str,
    around: Around,
) -> int:
    """Write the manifest, append the COMMIT; its index."""
    key = f"{attempt}/manifest.json"
    data = canonical_json(manifest)
    store.put(key, data)
    around.before_commit()
    around.announce("save:manifest")
    body = {
        "step": manifest["step"],
        "digest": manifest["digest"],
        "manifest_key": key,
        "manifest_sha256": sha256_hex(data),
        "parent": manifest["parent"],
        "healthy": manifest["healthy"],
        "validation_loss": manifest["validation_loss"],
        **({"cursor": job.cursor} if job.cursor is not None else {}),
    }
    earlier: list[int] = []

    def unless_there(records: Sequence[Record]) -> dict[str, Any] | None:
        """The body, unless an append whose answer was lost has written it already."""
        found = [r.index for r in records if r.kind == "COMMIT" and r.body["manifest_key"] == key]
        earlier[:] = found
        return None if found else body

    record = incarnation.append("COMMIT", unless_there)
    index = record.index if record is not None else earlier[0]
    if manifest["verified"]:
        with suppress(StoreUnavailableError):  # the checkpoint is there; `runs verify` can say more
            incarnation.append("VERIFIED", lambda _: {"checkpoints": [index]})
    return index


def _lower_priority() -> None:
    """Let training have the processor first: this thread's niceness, which Linux has per thread."""
    thread = threading.get_native_id()
    if sys.platform == "linux" and os.getpriority(os.PRIO_PROCESS, thread) < NICENESS:
        os.setpriority(os.PRIO_PROCESS, thread, NICENESS)
