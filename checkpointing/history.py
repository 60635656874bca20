"""What a run's log means: who owns the run, and which checkpoints are live.

A pure function of the records. COMMIT counts only when its generation is that of the last CLAIM
before it; a damaged CLAIM is known by what its incarnation wrote. RETIRE and QUARANTINE take a
checkpoint out of use, VERIFIED puts a quarantined one back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from storage.log import Record


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """One committed checkpoint, by the index of its COMMIT record."""

    index: int
    step: int
    generation: int
    digest: str
    manifest_key: str
    manifest_sha256: str
    parent: int | None
    healthy: bool
    validation_loss: float | None
    written_at: float
    retired: bool = False
    quarantined: bool = False
    verified: bool = False

    @property
    def live(self) -> bool:
        """Whether a restore may choose it."""
        return not self.retired and not self.quarantined


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """The state of a run according to its log. `claim` is None when the last one is damaged."""

    generation: int
    claim: Record | None
    claim_records: tuple[Record, ...]
    checkpoints: tuple[Checkpoint, ...]
    plans: tuple[Record, ...]
    end: Record | None

    @property
    def live(self) -> tuple[Checkpoint, ...]:
        """Checkpoints that a restore may choose, in the order in which they were committed."""
        return tuple(c for c in self.checkpoints if c.live)


def history(records: Sequence[Record]) -> History:
    """Fold the records of a log, oldest first."""
    claim: Record | None = None
    claims: list[Record] = []
    generation = 0
    checkpoints: dict[int, dict[str, Any]] = {}
    plans: list[Record] = []
    end: Record | None = None
    for record in records:
        if record.kind == "CLAIM":
            if record.generation > generation:
                claim = record
                claims.append(record)
                generation = record.generation
            continue
        # Nobody can write as a generation that was never claimed: its CLAIM is damaged.
        generation = max(generation, record.generation)
        by_owner = record.generation == generation
        if record.kind in ("RETIRE", "QUARANTINE", "VERIFIED"):
            if record.generation == 0 or by_owner:
                _mark(checkpoints, record)
        elif not by_owner:
            continue
        elif record.kind == "COMMIT":
            checkpoints[record.index] = _committed(record)
            end = None
        elif record.kind == "PLAN":
            plans.append(record)
        elif record.kind == "END":
            end = record
    return History(
        generation=generation,
        claim=claim if claim is not None and claim.generation == generation else None,
        claim_records=tuple(claims),
        checkpoints=tuple(Checkpoint(**fields) for fields in checkpoints.values()),
        plans=tuple(plans),
        end=end,
    )


def _committed(record: Record) -> dict[str, Any]:
    body = record.body
    return {
        "index": record.index,
        "step": body["step"],
        "generation": record.generation,
        "digest": body["digest"],
        "manifest_key": body["manifest_key"],
        "manifest_sha256": body["manifest_sha256"],
        "parent": body["parent"],
        "healthy": body["healthy"],
        "validation_loss": body["validation_loss"],
        "written_at": record.written_at,
    }


def _mark(checkpoints: dict[int, dict[str, Any]], record: Record) -> None:
    change = {
        "RETIRE": {"retired": True},
        "QUARANTINE": {"quarantined": True},
        "VERIFIED": {"quarantined": False, "verified": True},
    }[record.kind]
    for index in record.body["checkpoints"]:
        if index in checkpoints:
            checkpoints[index].update(change)
