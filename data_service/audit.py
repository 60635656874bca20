"""The proof, from a run's log alone, that no sample was skipped or repeated in its whole lineage.

`python -m data_service.audit RUN`. Four things together prove it: the checkpoints of the lineage
follow one another from step 0 on; no edit of the plan changed a step that had been committed;
every COMMIT says the cursor that the plan gives, whose digest covers seed, data, counts and the
last batch; and the batches of the plan have every sample once per epoch (`exactly_once.py`).

Does not cover: what an incarnation trained after its last COMMIT and lost, which is in no log; a
log rewritten as a whole by somebody who knows the plan and the data.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Annotated, Any

import tyro

from data_service.batches import Batches
from data_service.exactly_once import EXHAUSTIVE_SAMPLES, SourceVerdict, source_verdicts
from data_service.lineage import (
    Commit,
    Life,
    Lineage,
    PlanAt,
    lineage,
    plans_in_force,
    wrong_edits,
)
from data_service.recorded import committed_cursor
from data_service.run_data import (
    RunLog,
    batches_of,
    moved_sources,
    open_sources,
    plans_of,
    read_log,
)
from data_service.source import Source
from storage.commands import run_command
from storage.display import numbers, print_table

_VIOLATED = 1
_SHOWN = 20

_DESCRIPTION = """Proves from the log alone that no sample was skipped or repeated.

Exit code 0 when it is proved, 1 when it is violated or cannot be proved.

Example:
    python -m data_service.audit runs/default
    python -m data_service.audit gs://bucket/runs/a --json
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditArguments:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Path or URL of the run."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=URL of a source that lies elsewhere now."""
    exhaustive_samples: int = EXHAUSTIVE_SAMPLES
    """Up to so many samples each is looked at; beyond, the arithmetic and samples at random."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What an audit found.

    `steps` are those of the newest checkpoint. It is proved from `proved_from` on, None when
    nothing is: what lies before is `unproved`, with the reason. `damaged` are records that cannot
    be read, `commits` those of the lineage with a cursor and without one.
    """

    run: str
    steps: int
    proved_from: int | None
    unproved: str
    violations: tuple[str, ...]
    damaged: tuple[int, ...]
    edits: int
    commits: int
    cursors: int
    lives: tuple[Life, ...]
    sources: tuple[SourceVerdict, ...]

    @property
    def proved(self) -> bool:
        """Whether nothing is violated, and there is something that is proved."""
        return not self.violations and self.proved_from is not None

    @property
    def verdict(self) -> str:
        """The last line of the command."""
        if self.violations:
            return f"VIOLATED: {'; '.join(self.violations[:3])}"
        if self.proved_from is None:
            return f"NOT PROVED: {self.unproved}"
        if self.proved_from > 0:
            return f"proved from step {self.proved_from} on; before it {self.unproved}"
        return f"proved for steps 0 to {self.steps - 1}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; what it returns is the exit code."""

    def execute(arguments: AuditArguments) -> int:
        found = audit(
            arguments.run, data=arguments.data, exhaustive_samples=arguments.exhaustive_samples
        )
        if arguments.json:
            print(json.dumps(_as_json(found)))
        else:
            _show(found)
        return 0 if found.proved else _VIOLATED

    return run_command(
        AuditArguments,
        execute,
        argv,
        prog="python -m data_service.audit",
        description=_DESCRIPTION,
    )


def audit(
    run: str, *, data: Sequence[str] = (), exhaustive_samples: int = EXHAUSTIVE_SAMPLES
) -> Audit:
    """Audit the run at a path or URL. Raises DataError for data that is not there."""
    log = read_log(run, whole=True)
    recorded = plans_of(log)[-1]
    plans, past = plans_in_force(log.records), lineage(log.records)
    moved = moved_sources(data, sorted({n for p in plans for n in p.recorded.plan.sources}))
    steps = past.commits[-1].step if past.commits else 0
    sources: dict[str, Source] = {}

    def batches(at: PlanAt) -> Batches:
        missing = at.recorded.plan.sources.keys() - sources.keys()
        if missing:
            sources.update(open_sources(run, at.recorded, moved, look=False))
        return batches_of(at.recorded, sources)

    violations = wrong_edits(plans, past.commits) + _wrong_order(past)
    violations += _wrong_cursors([*past.commits, *past.others], plans, batches, log)
    last = batches(plans[-1])
    verdicts = source_verdicts(
        recorded,
        last,
        [sources[name] for name in recorded.plan.sources],
        steps,
        exhaustive_samples=exhaustive_samples,
    )
    violations += [f"source {v.source}: {v.wrong}" for v in verdicts if v.wrong]
    proved_from, unproved = _proved_from(past, log)
    return Audit(
        run=run,
        steps=steps,
        proved_from=proved_from,
        unproved=unproved,
        violations=tuple(violations),
        damaged=tuple(log.damaged),
        edits=len(plans) - 1,
        commits=len(past.commits),
        cursors=sum(c.cursor is not None for c in past.commits),
        lives=past.lives,
        sources=tuple(verdicts),
    )


def _wrong_order(past: Lineage) -> list[str]:
    """Checkpoints that do not come after the one that they were trained from."""
    return [
        f"COMMIT record {after.index} of step {after.step} was trained from record {before.index} "
        f"of step {before.step}"
        for before, after in zip(past.commits, past.commits[1:], strict=False)
        if after.step < before.step or (after.step == before.step and after.digest != before.digest)
    ]


def _wrong_cursors(
    commits: Sequence[Commit],
    plans: Sequence[PlanAt],
    batches: Callable[[PlanAt], Batches],
    log: RunLog,
) -> list[str]:
    """COMMITs whose cursor is not the one that the plan in force gives, abandoned ones as well."""
    damaged = f" (records {numbers(log.damaged)} cannot be read)" if log.damaged else ""
    violations: list[str] = []
    made: dict[int, Batches] = {}
    for commit in sorted(commits, key=lambda c: c.index):
        if commit.cursor is None:
            continue
        earlier = [plan for plan in plans if plan.index < commit.index]
        if not earlier:
            violations.append(
                f"COMMIT record {commit.index} of step {commit.step} has no plan before it{damaged}"
            )
            continue
        at = earlier[-1]
        if at.index not in made:
            made[at.index] = batches(at)
        own = committed_cursor(made[at.index].cursor(commit.step))
        different = [name for name in own if commit.cursor.get(name) != own[name]]
        if different:
            name = different[0]
            violations.append(
                f"COMMIT record {commit.index} of step {commit.step} was not trained on the "
                f"batches of PLAN record {at.index}: its cursor says {name} "
                f"{commit.cursor.get(name)!s:.12}, they give {own[name]!s:.12}{damaged}"
            )
    return violations


def _proved_from(past: Lineage, log: RunLog) -> tuple[int | None, str]:
    """From which step on the log proves what was consumed, and why not before.

    Where the data stood is known at step 0, and at every COMMIT that has a cursor.
    """
    if not past.commits:
        return None, "nothing is committed yet"
    told = list(takewhile(lambda c: c.cursor is not None, reversed(past.commits)))
    if not told:
        return None, "the newest COMMIT has no cursor: an earlier version wrote it"
    first = told[-1]
    if len(told) < len(past.commits):
        return first.step, "a COMMIT has no cursor: an earlier version wrote it"
    if not past.whole:
        damaged = f" (damaged: {numbers(log.damaged)})" if log.damaged else ""
        return first.step, f"record {first.parent}, which it went on from, cannot be read{damaged}"
    return 0, ""


def _as_json(found: Audit) -> dict[str, Any]:
    lives = [{**asdict(life), "thrown_away": life.thrown_away} for life in found.lives]
    return {**asdict(found), "lives": lives, "proved": found.proved, "verdict": found.verdict}


def _show(found: Audit) -> None:
    print(
        f"{found.run}: {found.steps} steps in {found.commits} checkpoints of {len(found.lives)} "
        f"starts, {found.cursors} with a cursor, {found.edits} edits of the plan"
    )
    rows = [
        (
            life.generation,
            "?" if life.first_step is None else life.first_step,
            life.last_step,
            life.kept_to,
            life.thrown_away or None,
        )
        for life in found.lives[-_SHOWN:]
    ]
    print_table(("generation", "from step", "committed to", "kept to", "thrown away"), rows)
    print_table(
        ("source", "samples", "skipped", "epochs", "looked at", "each once"),
        [_source_row(verdict) for verdict in found.sources],
    )
    if found.damaged:
        print(f"damaged records of the log, left out: {numbers(found.damaged)}")
    for violation in found.violations:
        print(f"violated: {violation}")
    print(f"every sample exactly once: {found.verdict}")


def _source_row(verdict: SourceVerdict) -> tuple[object, ...]:
    return (
        verdict.source,
        f"{verdict.samples:,}",
        f"{verdict.skipped:,}" if verdict.skipped else None,
        f"{verdict.positions / verdict.windows:.2f}",
        "every sample" if verdict.exhaustive else "arithmetic, and at random",
        "NO" if verdict.wrong else "yes",
    )


if __name__ == "__main__":
    sys.exit(main())
