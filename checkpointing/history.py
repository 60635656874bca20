"""What a run's log means: who owns the run, and which checkpoints are live.

A pure function of the records. COMMIT counts only when its generation is that of the last CLAIM
before it; a damaged CLAIM is known by what its incarnation wrote. RETIRE and QUARANTINE take a
checkpoint out of use, VERIFIED puts a quarantined one back. BASE restates all before it, as JSON.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from storage.log import Record, begins_replay, record_from_json

MOST_LIFESPANS = 100
"""Incarnations whose lifespans are kept, the newest: enough to know how often a run is preempted.
Each takes about 80 bytes of every BASE."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """One committed checkpoint, by the index of its COMMIT record.

    `cursor` is what its writer said of the data, None in records of an earlier version.
    """

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
    cursor: dict[str, Any] | None = None

    @property
    def live(self) -> bool:
        """Whether a restore may choose it."""
        return not self.retired and not self.quarantined

    @property
    def folder(self) -> str:
        """What the keys of its objects begin with."""
        return f"{self.manifest_key.rpartition('/')[0]}/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lifespan:
    """How long an incarnation is known to have lived, on its own host's clock.

    `last_sign_at` is the time of its last record, leaving out BASE. `ended` when it recorded the
    end of the run and went on no further.
    """

    generation: int
    claimed_at: float
    last_sign_at: float
    ended: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """The state of a run according to its log.

    `claim` is the CLAIM of `generation`, None when it is damaged. `changes` are the changes of
    identity that CLAIMs accepted, by index of the CLAIM. `lifespans` are those of the newest 100
    incarnations whose CLAIM is not damaged.
    """

    generation: int = 0
    claim: Record | None = None
    changes: tuple[tuple[int, dict[str, Any]], ...] = ()
    lifespans: tuple[Lifespan, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    plans: tuple[Record, ...] = ()
    end: Record | None = None

    @property
    def live(self) -> tuple[Checkpoint, ...]:
        """Checkpoints that a restore may choose, in the order in which they were committed."""
        return tuple(c for c in self.checkpoints if c.live)

    def accepted_changes(self, before: int | None = None) -> dict[str, Any]:
        """Fields of identity as CLAIMs changed them, all or those `before` an index of the log."""
        changed: dict[str, Any] = {}
        for index, fields in self.changes:
            if before is None or index < before:
                changed |= fields
        return changed

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON for a BASE."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "History":
        """What `to_json` made, after a passage through JSON."""
        claim, end = content["claim"], content["end"]
        return cls(
            generation=content["generation"],
            claim=record_from_json(claim) if claim else None,
            changes=tuple((index, fields) for index, fields in content["changes"]),
            lifespans=tuple(Lifespan(**lifespan) for lifespan in content["lifespans"]),
            checkpoints=tuple(Checkpoint(**checkpoint) for checkpoint in content["checkpoints"]),
            plans=tuple(record_from_json(plan) for plan in content["plans"]),
            end=record_from_json(end) if end else None,
        )


def history(records: Sequence[Record]) -> History:
    """Fold the records of a log, oldest first; from a BASE on, or from the beginning.

    A BASE further on forgets nothing that was read: it only adds what was damaged meanwhile.
    """
    fold = _Fold()
    for record in records:
        fold.take(record)
    return fold.result()


def restated(past: History, gone: Collection[int] = ()) -> dict[str, Any]:
    """The body of a BASE: all of `past` but the checkpoints that may be forgotten.

    `gone` are indices of retired checkpoints without objects (`without_objects`). What is in
    quarantine is not forgotten; nor is the newest, so that a run never looks as if it had none.
    """
    newest = past.checkpoints[-1:]
    kept = tuple(
        c
        for c in past.checkpoints
        if c.index not in gone or not c.retired or c.quarantined or c in newest
    )
    return {"history": replace(past, checkpoints=kept).to_json()}


def without_objects(past: History, keys: Iterable[str]) -> set[int]:
    """Indices of the retired checkpoints of which no object is among `keys`.

    `keys` must be a listing of `checkpoints/` made after `past` was read. Objects are written
    before their COMMIT and never again, so what is gone by then stays gone.
    """
    folders = {f"{key.rpartition('/')[0]}/" for key in keys}
    return {c.index for c in past.checkpoints if c.retired and c.folder not in folders}


class _Fold:
    """A history in the making."""

    def __init__(self) -> None:
        self._begin(History())

    def _begin(self, past: History) -> None:
        self._generation = past.generation
        self._claim = past.claim
        self._changes = list(past.changes)
        self._lifespans = list(past.lifespans)
        self._checkpoints = {c.index: c for c in past.checkpoints}
        self._plans = list(past.plans)
        self._end = past.end

    def take(self, record: Record) -> None:
        """Fold one more record."""
        if record.kind == "CLAIM":
            if record.generation > self._generation:
                self._take_claim(record)
            return
        # Nobody can write as a generation that was never claimed: its CLAIM is damaged.
        self._generation = max(self._generation, record.generation)
        by_owner = record.generation == self._generation
        if record.kind == "BASE":
            if by_owner and begins_replay(record):
                self._take_base(record)
            return
        if by_owner:
            self._note_life(record)
        if record.kind in _MARKS:
            if record.generation == 0 or by_owner:
                self._mark(record)
        elif not by_owner:
            return
        elif record.kind == "COMMIT":
            self._checkpoints[record.index] = _committed(record)
            self._end = None
        elif record.kind == "PLAN":
            self._plans.append(record)
        elif record.kind == "END":
            self._end = record

    def result(self) -> History:
        """The history of what was taken."""
        known = self._claim is not None and self._claim.generation == self._generation
        return History(
            generation=self._generation,
            claim=self._claim if known else None,
            changes=tuple(self._changes),
            lifespans=tuple(self._lifespans),
            checkpoints=tuple(self._checkpoints.values()),
            plans=tuple(self._plans),
            end=self._end,
        )

    def _take_claim(self, record: Record) -> None:
        self._claim = record
        self._generation = record.generation
        if fields := record.body.get("accepted_changes"):
            self._changes.append((record.index, fields))
        now = record.written_at
        span = Lifespan(generation=record.generation, claimed_at=now, last_sign_at=now)
        self._lifespans = [*self._lifespans, span][-MOST_LIFESPANS:]

    def _take_base(self, record: Record) -> None:
        base = History.from_json(record.body["history"])
        checkpoints = self._checkpoints
        damaged = not checkpoints.keys() >= {c.index for c in base.checkpoints}
        checkpoints.update((c.index, c) for c in base.checkpoints)
        self._begin(base)
        self._checkpoints = dict(sorted(checkpoints.items())) if damaged else checkpoints

    def _note_life(self, record: Record) -> None:
        if self._lifespans and self._lifespans[-1].generation == record.generation:
            span = self._lifespans[-1]
            ended = record.kind == "END" or (span.ended and record.kind != "COMMIT")
            self._lifespans[-1] = replace(span, last_sign_at=record.written_at, ended=ended)

    def _mark(self, record: Record) -> None:
        for index in record.body["checkpoints"]:
            if index in self._checkpoints:
                change = _MARKS[record.kind]
                self._checkpoints[index] = replace(self._checkpoints[index], **change)


_MARKS: dict[str, dict[str, Any]] = {
    "RETIRE": {"retired": True},
    "QUARANTINE": {"quarantined": True},
    "VERIFIED": {"quarantined": False, "verified": True},
}


def _committed(record: Record) -> Checkpoint:
    body = record.body
    return Checkpoint(
        index=record.index,
        step=body["step"],
        generation=record.generation,
        digest=body["digest"],
        manifest_key=body["manifest_key"],
        manifest_sha256=body["manifest_sha256"],
        parent=body["parent"],
        healthy=body["healthy"],
        validation_loss=body["validation_loss"],
        written_at=record.written_at,
        cursor=body.get("cursor"),
    )
