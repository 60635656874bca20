"""The plan of a run as its log has it: what decides every batch, and nothing else.

A PLAN record holds the whole plan and the numbers that, with it, decide the order of samples. So a
reader of the log knows the batch of any step without the trainer's configuration. A COMMIT holds
the part of the cursor that proves which batches a checkpoint has behind it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_service.plan import Plan
from storage.errors import DataError
from storage.log import Record, record_from_json

KIND = "PLAN"

IN_RUN = "run:"
"""Begins the URL of a source that lies in the run itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedPlan:
    """What one PLAN record says. `from_step` is the first step that it may change.

    `started_with` stands for the data that the command line of the run asked for at the time: only
    a start that asks for other data changes the plan. `edit` is the request that this record
    answers, {"request": key, "edit": its body}, or None for a plan that a command line asked for.
    """

    plan: Plan
    from_step: int
    seed: int
    context: int
    global_batch_size: int
    lanes: int
    started_with: str = ""
    edit: dict[str, Any] | None = None

    def to_body(self) -> dict[str, Any]:
        """The body of the record."""
        return {
            "plan": self.plan.to_json(),
            "from_step": self.from_step,
            "seed": self.seed,
            "context": self.context,
            "global_batch_size": self.global_batch_size,
            "lanes": self.lanes,
            "started_with": self.started_with,
            **({"edit": self.edit} if self.edit else {}),
        }


def located(run: str, url: str) -> str:
    """A URL with the run's own place in it: a run may be moved, with its corpus."""
    if not url.startswith(IN_RUN):
        return url
    return f"{run.rstrip('/')}/{url.removeprefix(IN_RUN)}"


def recorded_plans(records: Sequence[Record]) -> list[RecordedPlan]:
    """Every plan that the run ever had, oldest first; the last one is in force.

    A record of an incarnation that was fenced when it was appended does not count. Raises DataError
    for a PLAN that cannot be read.
    """
    return [recorded_plan(record) for record in plan_records(records)]


def committed_cursor(cursor: Mapping[str, object]) -> dict[str, object]:
    """What a COMMIT says of a cursor: `digest` covers the counts, which follow from the rest."""
    return {name: cursor[name] for name in ("plan", "digest")}


def plan_records(records: Iterable[Record]) -> list[Record]:
    """The PLAN records that count, oldest first."""
    found: list[Record] = []
    generation = 0
    for record in records:
        if record.kind == "BASE" and record.generation >= generation:
            past = record.body["history"]  # a BASE restates the PLAN records before it
            found = [record_from_json(plan) for plan in past["plans"]]
        elif record.kind == KIND and record.generation >= generation:
            found.append(record)
        generation = max(generation, record.generation)
    return found


def recorded_plan(record: Record) -> RecordedPlan:
    """What a PLAN record says; DataError when this version cannot read it."""
    try:
        body = dict(record.body)
        return RecordedPlan(**{**body, "plan": Plan.from_json(body["plan"])})
    except (KeyError, TypeError) as error:
        raise DataError(
            f"record {record.index} of the log is no PLAN of this version ({error}): use the "
            "version of RangeFlow that began the run, or start anew with --run"
        ) from None
