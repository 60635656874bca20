"""The checkpoints that led to a run's present state, and the plans that they were trained with.

A pure function of the log. It reads a few fields of CLAIM, COMMIT, RETIRE, QUARANTINE, VERIFIED and
BASE, with their meaning in `checkpointing/history.py`, and counts none that does not count there.

Covers: crashes, checkpoints given up after damage, edits of the plan, damaged records that a later
BASE restates.
Does not cover: a log that somebody has rewritten whole, with all its digests.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

from data_service.plan import Plan, Segment
from data_service.recorded import RecordedPlan, plan_records, recorded_plan
from storage.errors import DataError
from storage.log import Record


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """A COMMIT that counts, by its index in the log. `parent` is what its incarnation restored."""

    index: int
    step: int
    generation: int
    digest: str
    parent: int | None
    cursor: Mapping[str, object] | None
    retired: bool = False
    quarantined: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """What the log tells of an incarnation's training: it did steps [first_step, last_step).

    `first_step` is None when the checkpoint that it began from is not known. Steps from
    `kept_to` on were thrown away: no later checkpoint has them behind it. `thrown_away` is of
    committed ones; what an incarnation did after its last COMMIT is in no log.
    """

    generation: int
    first_step: int | None
    last_step: int
    kept_to: int

    @property
    def thrown_away(self) -> int:
        return self.last_step - self.kept_to


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """`commits` led to the present state, oldest first, each from the one before it.

    The first began from nothing, at step 0, when `whole`; else what it began from is not known.
    """

    commits: tuple[Commit, ...]
    others: tuple[Commit, ...]
    lives: tuple[Life, ...]
    whole: bool


def lineage(records: Sequence[Record]) -> Lineage:
    """The lineage of the newest checkpoint that a restore may choose; empty when there is none."""
    found = _commits(records)
    before = _before(found)
    live = [c.index for c in found.values() if not c.retired and not c.quarantined]
    chain: list[Commit] = []
    at = live[-1] if live else None
    while at in found and (not chain or at < chain[-1].index):
        chain.append(found[at])
        at = before[at]
    chain.reverse()
    kept = {commit.index for commit in chain}
    return Lineage(
        commits=tuple(chain),
        others=tuple(c for c in found.values() if c.index not in kept),
        lives=tuple(_lives(found, before, kept)),
        whole=not chain or chain[0].parent is None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanAt:
    """A plan, and the index of the PLAN record that put it in force."""

    index: int
    recorded: RecordedPlan


def plans_in_force(records: Sequence[Record]) -> list[PlanAt]:
    """Every plan with its place in the log, oldest first."""
    return [
        PlanAt(index=record.index, recorded=recorded_plan(record))
        for record in plan_records(records)
    ]


def wrong_edits(plans: Sequence[PlanAt], commits: Sequence[Commit]) -> list[str]:
    """Why plans do not extend those before them, as far as these commits depend on it."""
    found: list[str] = []
    for before, after in pairwise(plans):
        done = max((c.step for c in commits if c.index < after.index), default=0)
        changed = first_change(before.recorded.plan, after.recorded.plan)
        old, new = _shape(before.recorded), _shape(after.recorded)
        if done and old != new:
            names = [name for name in old if old[name] != new[name]]
            found.append(
                f"PLAN record {after.index} changes {', '.join(names)} of the plan in record "
                f"{before.index} after step {done} was committed"
            )
        if changed is None:
            continue
        if changed < done:
            found.append(
                f"PLAN record {after.index} changes the past: from step {changed} on it differs "
                f"from record {before.index}, and step {done} was committed before it"
            )
        if changed < after.recorded.from_step:
            found.append(
                f"PLAN record {after.index} says that it changes nothing before step "
                f"{after.recorded.from_step}, and differs from record {before.index} from step "
                f"{changed} on"
            )
    return found


def first_change(before: Plan, after: Plan) -> int | None:
    """The first step that two plans may decide differently; None when there is none."""
    number = 0
    for number, (old, new) in enumerate(zip(before.segments, after.segments, strict=False)):  # noqa: B007
        if _decides(old) != _decides(new):
            return min(old.from_step, new.from_step)
    rest = [*before.segments[number + 1 :], *after.segments[number + 1 :]]
    return rest[0].from_step if rest else None


def _commits(records: Sequence[Record]) -> dict[int, Commit]:
    """The COMMIT records that count, by index, as the end of the log has them."""
    found: dict[int, Commit] = {}
    generation = 0
    for record in records:
        generation = max(generation, record.generation)
        try:
            _take(record, found, by_owner=record.generation == generation)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{record.kind} record {record.index} of the log cannot be read: {error!r:.200}"
            ) from None
    return dict(sorted(found.items()))


_MARKS: dict[str, dict[str, Any]] = {
    "RETIRE": {"retired": True},
    "QUARANTINE": {"quarantined": True},
    "VERIFIED": {"quarantined": False},
}


def _take(record: Record, found: dict[int, Commit], *, by_owner: bool) -> None:
    """What one more record says of the COMMITs found so far."""
    if record.kind == "COMMIT" and by_owner:
        found[record.index] = _commit(record.index, record.generation, record.body)
    elif record.kind == "BASE" and by_owner:
        for past in record.body["history"]["checkpoints"]:
            index = int(past["index"])
            if index not in found:  # its COMMIT is damaged
                found[index] = _commit(index, int(past["generation"]), past)
    elif record.kind in _MARKS and (by_owner or record.generation == 0):
        for index in record.body["checkpoints"]:
            if index in found:
                found[index] = replace(found[index], **_MARKS[record.kind])


def _commit(index: int, generation: int, content: Mapping[str, Any]) -> Commit:
    cursor, parent = content.get("cursor"), content["parent"]
    return Commit(
        index=index,
        step=int(content["step"]),
        generation=generation,
        digest=str(content["digest"]),
        parent=None if parent is None else int(parent),
        cursor=None if cursor is None else dict(cursor),
        retired=bool(content.get("retired", False)),
        quarantined=bool(content.get("quarantined", False)),
    )


def _before(found: Mapping[int, Commit]) -> dict[int, int | None]:
    """What each COMMIT was trained on from: the save before it of its start, or its parent.

    One start saves with one parent. A snapshot adopted from a local tier has another.
    """
    before: dict[int, int | None] = {}
    last: dict[tuple[int, int | None], int] = {}
    for commit in found.values():
        start = (commit.generation, commit.parent)
        before[commit.index] = last.get(start, commit.parent)
        last[start] = commit.index
    return before


def _lives(
    found: Mapping[int, Commit], before: Mapping[int, int | None], kept: Container[int]
) -> list[Life]:
    lives: list[Life] = []
    by_generation = sorted(found.values(), key=lambda c: c.generation)
    for generation, group in groupby(by_generation, key=lambda c: c.generation):
        own = list(group)
        parent = before[own[0].index]
        began = 0 if parent is None else found[parent].step if parent in found else None
        lives.append(
            Life(
                generation=generation,
                first_step=began,
                last_step=max(c.step for c in own),
                kept_to=max((c.step for c in own if c.index in kept), default=began or 0),
            )
        )
    return lives


def _shape(recorded: RecordedPlan) -> dict[str, int]:
    return {
        "seed": recorded.seed,
        "context": recorded.context,
        "global_batch_size": recorded.global_batch_size,
        "lanes": recorded.lanes,
    }


def _decides(segment: Segment) -> tuple[object, ...]:
    """What decides samples; where sources lie does not."""
    sources = [(source.name, source.fingerprint, source.weights) for source in segment.sources]
    return segment.from_step, segment.skip_steps, tuple(sources)
