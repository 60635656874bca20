"""The judgement on what a trial left, the same for all scenarios: beside the unbroken run.

Covers: the final digest, each step's samples, loss and gradient norm, the order of samples by the
run's log, one row of the curves for each step with all that does not depend on a clock, the newest
checkpoint's bytes, checkpoints that a start found damaged, processes that were left behind,
tracebacks.
Does not cover: processes that have lost the environment that they were started with.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpointing.history import history
from checkpointing.verification import verify
from data_service.audit import audit
from launch.chaos.trial import Trial, Violation
from launch.proof import steps_told
from storage.errors import RangeFlowError
from storage.log import Log
from storage.store import open_store

_OF_A_CLOCK = ("time", "tokens_per_second")

TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The unbroken run: its last digest, and of every step its row and what heartbeats record."""

    digest: str
    rows: Mapping[int, Mapping[str, Any]]
    proofs: Mapping[int, bytes]


def reference(trial: Trial) -> Reference:
    """What a trial's run is, that has come to its end without any fault."""
    store = open_store(trial.run)
    past = history(Log(store).refresh())
    assert past.end is not None, "who asks has seen it end with 0"
    return Reference(
        digest=str(past.end.body["digest"]),
        rows={int(row["step"]): row for row in curve(trial.curves)},
        proofs=steps_told(store, past.generation, 0),
    )


def judge(trial: Trial, unbroken: Reference) -> list[str]:
    """What is wrong, in words; nothing when all is as it must be."""
    found = left_behind(trial)
    try:
        found += wrong_end(trial, unbroken) + wrong_steps(trial, unbroken)
        found += wrong_ledger(trial) + damaged(trial) + quarantined(trial)
    except (RangeFlowError, OSError, ValueError) as error:
        found.append(f"the run cannot be judged: {error}")
    return found + wrong_curve(trial, unbroken) + tracebacks(trial)


def wrong_end(trial: Trial, unbroken: Reference) -> list[str]:
    """The digest with which the run ended."""
    past = history(Log(open_store(trial.run)).refresh())
    if past.end is None:
        return ["the run has not come to its end"]
    digest = past.end.body["digest"]
    if digest != unbroken.digest:
        return [f"the digest at the end is {digest:.12}, expected {unbroken.digest:.12}"]
    return []


def wrong_steps(trial: Trial, unbroken: Reference) -> list[str]:
    """Steps whose samples, loss or gradient norm were others, in any incarnation that told."""
    store = open_store(trial.run)
    generations = history(Log(store).refresh()).generation
    found = []
    for generation in range(1, generations + 1):
        try:
            told = steps_told(store, generation, 0)
        except ValueError:  # killed before its first step, or before it could tell
            continue
        wrong = [step for step, made in told.items() if unbroken.proofs.get(step) != made]
        if wrong:
            found.append(
                f"generation {generation} made other bits of {len(wrong)} steps, first of step "
                f"{min(wrong)}"
            )
    return found


def wrong_ledger(trial: Trial) -> list[str]:
    """Samples that were skipped or repeated, by the run's log."""
    result = audit(trial.run)
    return [] if result.proved and result.proved_from == 0 else [f"the audit: {result.verdict}"]


def damaged(trial: Trial) -> list[str]:
    """The newest checkpoint, read byte by byte."""
    store = open_store(trial.run)
    log = Log(store)
    live = history(log.refresh()).live
    if not live:
        return ["there is no checkpoint"]
    verdict, what = verify(store, log, live[-1].index)
    return [] if verdict == "whole" else [f"the newest checkpoint is {verdict}: {what}"]


def quarantined(trial: Trial) -> list[str]:
    """Checkpoints that were committed, and that a start could not read."""
    records = Log(open_store(trial.run), whole=True).refresh()
    reasons = [str(r.body["reason"]) for r in records if r.kind == "QUARANTINE"]
    return [f"a checkpoint was committed that is not whole: {reason}" for reason in reasons]


def wrong_curve(trial: Trial, unbroken: Reference) -> list[str]:
    """Rows of metrics.jsonl: each step once and in order, with what the unbroken run says of it."""
    try:
        rows = curve(trial.curves)
        steps = [int(row["step"]) for row in rows]
    except (OSError, ValueError, KeyError) as error:
        return [f"the curve cannot be read: {error}"]
    found = []
    if steps != sorted(unbroken.rows):
        twice = sorted({step for step in steps if steps.count(step) > 1})
        missing = sorted(set(unbroken.rows) - set(steps))
        found.append(f"the curve has steps {twice} twice and lacks {missing}")
    for step, row in zip(steps, rows, strict=True):
        right = unbroken.rows.get(step, row)
        for name in sorted(row.keys() | right.keys()):
            if row.get(name) != right.get(name):
                said = f"{row.get(name)!r}, expected {right.get(name)!r}"
                return [*found, f"the {name} of step {step} is {said}"]
    return found


def left_behind(trial: Trial) -> list[str]:
    """Processes that live on, though every program was to have ended."""
    found = []
    for program in trial.programs:
        try:
            program.gone()
        except Violation as violation:
            found.append(str(violation))
    return found


def tracebacks(trial: Trial) -> list[str]:
    """Programs that showed a traceback, where the scenario expects none."""
    if trial.may_show_tracebacks:
        return []
    shown = [program.folder.name for program in trial.programs if TRACEBACK in program.output()]
    return [f"{name} shows a traceback" for name in shown]


def curve(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without what depends on a clock."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {
            name: value
            for name, value in row.items()
            if name not in _OF_A_CLOCK and not name.startswith("data_")
        }
        for row in rows
    ]
