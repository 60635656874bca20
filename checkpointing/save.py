"""Writes one checkpoint: every process its share of the tensors, then rank 0 the COMMIT.

Nothing exists until the COMMIT is in the log; before that there are only objects under keys that
no other attempt uses. Objects are immutable.

Covers: kills at any instant, failed uploads (the save is given up, on all ranks alike), fencing.
Does not cover: saving beside training; the caller waits.
"""

import logging
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch

from checkpointing.digest import checkpoint_digest, describe
from checkpointing.group import Group
from checkpointing.history import Checkpoint, history
from checkpointing.incarnation import Incarnation
from storage.canonical import canonical_json, sha256_hex
from storage.errors import FencedError, RangeFlowError
from storage.store import Store

logger = logging.getLogger(__name__)

FORMAT = 1
OBJECT_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """What a checkpoint holds. `exact` and `extra` are JSON.

    `tensors` and `exact` decide the digest; `extra` (states of random generators) is stored and
    verified, and left out of the digest.
    """

    tensors: Mapping[str, torch.Tensor]
    exact: Mapping[str, Any]
    extra: Mapping[str, Any]


def save(
    store: Store,
    incarnation: Incarnation | None,
    group: Group,
    state: TrainingState,
    *,
    step: int,
    parent: int | None,
    healthy: bool = True,
    validation_loss: float | None = None,
    announce: Callable[[str], None] = lambda phase: None,
) -> Checkpoint | None:
    """Save the state, the same on every rank; only rank 0 has an `incarnation`.

    Returns the checkpoint on every rank, or None, with a warning, when the store failed on any
    rank. Raises FencedError on every rank when a later incarnation owns the run.
    """
    announce("save:begin")
    attempt = _begin(incarnation, group, step)
    receipt = _write_share(store, group, state, attempt, announce)
    receipts = group.gather({**receipt, "step": step})
    result: dict[str, Any] = {}
    if incarnation is not None:
        try:
            manifest = _manifest(receipts, state, step=step, attempt=attempt, parent=parent)
            if validation_loss is not None and not math.isfinite(validation_loss):
                healthy, validation_loss = False, None
            manifest |= {"healthy": healthy, "validation_loss": validation_loss}
            checkpoint = _commit(store, incarnation, manifest, attempt, announce)
            result = {"index": checkpoint.index}
        except FencedError as error:
            result = {"fenced": str(error)}
        except RangeFlowError as error:
            result = {"failed": str(error)}
    result = group.broadcast(result)
    if "fenced" in result:
        raise FencedError(result["fenced"])
    if "failed" in result:
        logger.warning("the save of step %d failed: %s", step, result["failed"])
        return None
    announce("save:committed")
    if incarnation is None:
        return None
    return checkpoint


def _begin(incarnation: Incarnation | None, group: Group, step: int) -> str:
    """The key prefix of this attempt, unique; nothing is written by a stale incarnation."""
    start: dict[str, Any] = {}
    if incarnation is not None:
        try:
            incarnation.check()
            nonce = uuid.uuid4().hex[:12]
            prefix = f"checkpoints/g{incarnation.generation:04d}/s{step:08d}-{nonce}"
            start = {"prefix": prefix}
        except FencedError as error:
            start = {"fenced": str(error)}
        except RangeFlowError as error:
            start = {"prefix": "", "failed": str(error)}
    start = group.broadcast(start)
    if "fenced" in start:
        raise FencedError(start["fenced"])
    return str(start["prefix"])


def _write_share(
    store: Store,
    group: Group,
    state: TrainingState,
    attempt: str,
    announce: Callable[[str], None],
) -> dict[str, Any]:
    """Upload this rank's tensors; the receipt tells what was written, or why not."""
    objects: dict[str, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}
    if not attempt:
        return {"error": "the log could not be read"}
    try:
        for part, names in enumerate(_parts(state.tensors, group.rank, group.size)):
            key = f"{attempt}/r{group.rank:03d}-p{part:02d}.safetensors"
            content = {name: _on_cpu(state.tensors[name]) for name in names}
            data = safetensors.torch.save(content)
            store.put(key, data)
            objects[key] = {"size_bytes": len(data), "sha256": sha256_hex(data)}
            for name, tensor in content.items():
                tensors[name] = {**describe(tensor), "object": key}
            announce("save:object")
    except RangeFlowError as error:
        return {"error": str(error)}
    return {"objects": objects, "tensors": tensors}


def _parts(tensors: Mapping[str, torch.Tensor], rank: int, size: int) -> Iterator[list[str]]:
    """Names of this rank's tensors, in objects of at most 256 MB (or one tensor)."""
    shares: list[list[str]] = [[] for _ in range(size)]
    filled = [0] * size
    for name in sorted(tensors, key=lambda n: (-tensors[n].nbytes, n)):
        emptiest = filled.index(min(filled))
        shares[emptiest].append(name)
        filled[emptiest] += tensors[name].nbytes
    part: list[str] = []
    part_bytes = 0
    for name in shares[rank]:
        if part and part_bytes + tensors[name].nbytes > OBJECT_BYTES:
            yield part
            part, part_bytes = [], 0
        part.append(name)
        part_bytes += tensors[name].nbytes
    if part:
        yield part


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in CPU memory: tied tensors must not share memory in safetensors."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _manifest(
    receipts: Sequence[Mapping[str, Any]],
    state: TrainingState,
    *,
    step: int,
    attempt: str,
    parent: int | None,
) -> dict[str, Any]:
    for rank, receipt in enumerate(receipts):
        if "error" in receipt:
            raise RangeFlowError(f"rank {rank}: {receipt['error']}")
        if receipt["step"] != step:
            raise RangeFlowError(f"rank {rank} saved step {receipt['step']}, expected {step}")
    tensors = {name: entry for r in receipts for name, entry in r["tensors"].items()}
    return {
        "format": FORMAT,
        "step": step,
        "attempt": attempt,
        "parent": parent,
        "objects": {key: entry for r in receipts for key, entry in r["objects"].items()},
        "tensors": tensors,
        "exact": state.exact,
        "extra": state.extra,
        "digest": checkpoint_digest(tensors, state.exact),
        "versions": {"torch": torch.__version__},
    }


def _commit(
    store: Store,
    incarnation: Incarnation,
    manifest: Mapping[str, Any],
    attempt: str,
    announce: Callable[[str], None],
) -> Checkpoint:
    """Check that every object is there, write the manifest, append the COMMIT."""
    announce("save:uploaded")
    for key, entry in manifest["objects"].items():
        try:
            found = store.stat(key).size_bytes
        except FileNotFoundError as error:
            raise RangeFlowError(f"{key} is not in the store after its upload") from error
        if found != entry["size_bytes"]:
            raise RangeFlowError(f"{key} has {found} bytes, expected {entry['size_bytes']}")
    key = f"{attempt}/manifest.json"
    data = canonical_json(manifest)
    store.put(key, data)
    announce("save:manifest")
    body = {
        "step": manifest["step"],
        "digest": manifest["digest"],
        "manifest_key": key,
        "manifest_sha256": sha256_hex(data),
        "parent": manifest["parent"],
        "healthy": manifest["healthy"],
        "validation_loss": manifest["validation_loss"],
    }
    record = incarnation.append("COMMIT", lambda _: body)
    assert record is not None, "a commit always drafts a record"
    committed = history(incarnation.records).checkpoints
    return next(c for c in committed if c.index == record.index)
