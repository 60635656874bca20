"""The command that edits the plan of a run: `python -m data_service.edit RUN add NAME=URL`.

It shows the mixture before and after, asks, and puts a request; the process that trains the run
answers it between two steps, or the next start does.

Covers: runs that train meanwhile. What is shown is as of the last heartbeat and commit.
Does not cover: whether the edit can be; the owner decides that, and `--wait` tells its answer.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_service.edits import KIND, Edit, edited, parse_edit
from data_service.plan import Plan, Segment
from data_service.recorded import IN_RUN, RecordedPlan, located, recorded_plans
from data_service.run_data import RunLog, batches_of, open_sources, plans_of, read_log
from data_service.shares import PPM, shares_of_steps
from data_service.source import open_source
from storage.commands import run_command
from storage.display import print_table
from storage.errors import ConfigurationError, RangeFlowError, StoreUnavailableError
from storage.log import Log
from storage.requests import Inbox, forget, put_request, refusal
from storage.store import Store, open_store

_DESCRIPTION = """Changes the mixture of a run that trains, or that is stopped, and shows it first.

add NAME=URL[:WEIGHT]...     remove NAME...     reweight NAME=WEIGHT...
skip FROM TO (the data of these steps)          undo [N] (the last N edits)

Without --ramp the mixture changes abruptly, which has spoilt runs: give it some thousand steps.

Example:
    python -m data_service.edit runs/default add code=data/code:0.2 --ramp 2000
    python -m data_service.edit runs/default remove web --ramp 5000 --at 15000 --yes --wait 60
"""

_LOOK_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EditArguments:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Path or URL of the run."""
    what: Annotated[Literal["add", "remove", "reweight", "skip", "undo"], tyro.conf.Positional]
    """The kind of edit."""
    items: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="...")] = ()
    """What it is about, as above."""
    ramp: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 0
    """Steps over which the mixture changes, linearly; 0 for at once."""
    at: Annotated[int | None, tyro.conf.arg(metavar="STEP")] = None
    """The first step that changes; the earliest possible if not given."""
    yes: bool = False
    """Ask for it without a question."""
    wait: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 0.0
    """How long to wait for the answer."""
    json: bool = False
    """Print all of it as JSON."""


def main(
    argv: Sequence[str] | None = None,
    *,
    confirm: Callable[[str], bool] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Run the command; what it returns is the exit code.

    `confirm` puts a question to the person at the terminal; None when there is nobody.
    """

    def execute(arguments: EditArguments) -> int:
        return _edit(arguments, confirm, clock, sleep)

    return run_command(
        EditArguments, execute, argv, prog="python -m data_service.edit", description=_DESCRIPTION
    )


def _edit(
    arguments: EditArguments,
    confirm: Callable[[str], bool] | None,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> int:
    edit = parse_edit(
        arguments.what, arguments.items, ramp_steps=arguments.ramp, at_step=arguments.at
    )
    edit = replace(edit, sources=tuple(replace(s, url=_absolute(s.url)) for s in edit.sources))
    log = read_log(arguments.run)
    store = open_store(arguments.run)
    shown = preview(arguments.run, store, log, edit)
    if not arguments.json:
        _show(shown)
    apply = arguments.yes
    if not apply and not arguments.json and confirm is not None:
        apply = confirm("apply? [y/N] ")
    if apply:
        shown["request"] = put_request(store, KIND, edit.to_body())
        if arguments.wait > 0:
            shown["answer"] = _answer(
                store, shown["request"], arguments.wait, clock=clock, sleep=sleep
            )
    if arguments.json:
        print(json.dumps(shown))
    else:
        _tell(arguments, shown)
    return _exit_code(arguments, shown)


def preview(run: str, store: Store, log: RunLog, edit: Edit) -> dict[str, Any]:
    """What an edit would change, as JSON; ConfigurationError for one that cannot be.

    Edits that wait for their answer are taken as made, if that makes it possible: the owner comes
    to them first.
    `tokens` and `epochs` are those from the edit's first step to the run's last, as far as known.
    """
    recorded = plans_of(log)[-1]
    history = [one.plan for one in plans_of(log)]
    (reached, training), committed = _reached(store, log), log.committed_step
    notes: list[str] = []
    unknown: set[str] = set()

    def fingerprint_of(name: str, url: str) -> str:
        try:
            return open_source(name, located(run, url)).fingerprint
        except RangeFlowError as error:
            notes.append(f"from here, source {name!r} cannot be opened: {error}")
            unknown.add(name)
            known = recorded.plan.sources.get(name)
            return known.fingerprint if known else "unknown"

    def applied(one: Edit) -> tuple[Plan, int]:
        # A step between the two may be possible, if the process that reached it has died: ask.
        asks = one.at_step is not None and one.at_step >= committed
        return edited(history, one, committed if asks else reached, fingerprint_of)

    told = len(history)
    for waiting in _waiting(store, log):
        with suppress(ConfigurationError):  # it will be refused
            history.append(applied(waiting)[0])
            notes.append(f"asked before, and taken as made: {waiting}")
    try:
        plan, step = applied(edit)
    except ConfigurationError:  # they may be refused, or begin elsewhere
        del history[told:], notes[:]
        plan, step = applied(edit)
    segment = next(s for s in reversed(plan.segments) if s.from_step <= step)
    max_steps = log.max_steps
    shown = {
        "run": run,
        "edit": str(edit),
        "from_step": step,
        "training": training,
        "max_steps": max_steps,
        "before": _shares(history[-1], max(0, step - 1)),
        "after": [
            {"step": at, "shares": _shares(plan, at)}
            for at in _steps_shown(segment, step, edit.ramp_steps)
        ],
        "skipped_samples": segment.skip_steps * recorded.global_batch_size,
        "tokens": {},
        "epochs": {},
        "notes": notes,
        "request": None,
        "answer": None,
    }
    if max_steps > step:
        after = replace(recorded, plan=plan, edit=None)
        shown["tokens"] = _tokens(after, step, max_steps)
        if not unknown:
            shown["epochs"] = _epochs(run, after, max_steps, notes)
    return shown


def _waiting(store: Store, log: RunLog) -> list[Edit]:
    """The edits that were asked for and have no answer yet, in their order. Changes nothing."""
    plans = recorded_plans(log.records)
    answered = {one.edit["request"] for one in plans if one.edit is not None}
    found: list[Edit] = []
    for request in Inbox(store, [KIND]).pending():
        with suppress(ConfigurationError):
            if request.key not in answered:
                found.append(Edit.from_body(request.body))
    return found


def _absolute(url: str) -> str:
    """A path that means the same in another folder; a URL as it is."""
    if not url or "://" in url or url.startswith(IN_RUN):
        return url
    return str(Path(url).absolute())


def _reached(store: Store, log: RunLog) -> tuple[int, bool]:
    """The first step that none has begun, as far as is known, and whether somebody trains."""
    beats = store.list("beats/")
    try:
        beat = json.loads(store.get(beats[-1])) if beats else {"left": True}
        if not beat["left"]:
            return max(log.committed_step, int(beat["step"]) + 1), True
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        pass
    return log.committed_step, False


def _steps_shown(segment: Segment, step: int, ramp_steps: int) -> list[int]:
    """The first step, the middle and the end of the ramp, and where a longer one of others ends."""
    last = max(step, *(s for source in segment.sources for s, _ in source.weights))
    end = step + ramp_steps if ramp_steps else last
    return sorted({step, (step + end) // 2, end, last})


def _shares(plan: Plan, step: int) -> dict[str, float]:
    """The share of each source in a step."""
    segment = next(s for s in reversed(plan.segments) if s.from_step <= step)
    table = shares_of_steps([source.weights for source in segment.sources], step, step + 1)
    return {
        source.name: share / PPM
        for source, share in zip(segment.sources, table[0].tolist(), strict=True)
        if share
    }


def _tokens(recorded: RecordedPlan, step: int, max_steps: int) -> dict[str, int]:
    """Tokens to train on of each source, from a step to the last."""
    tokens: dict[str, int] = {}
    ends = [*(segment.from_step for segment in recorded.plan.segments[1:]), max_steps]
    for segment, end in zip(recorded.plan.segments, ends, strict=True):
        mixture = segment.mixture(recorded.global_batch_size)
        first, last = max(step, segment.from_step), min(end, max_steps)
        if first >= last:
            continue
        counts = [
            mixture.counts_at((at - segment.from_step) * recorded.global_batch_size)
            for at in (first, last)
        ]
        for number, source in enumerate(segment.sources):
            samples = counts[1][number] - counts[0][number]
            tokens[source.name] = tokens.get(source.name, 0) + samples * recorded.context
    return tokens


def _epochs(run: str, recorded: RecordedPlan, max_steps: int, notes: list[str]) -> dict[str, float]:
    """How often each source has been gone through at the last step, with what came before."""
    try:
        batches = batches_of(recorded, open_sources(run, recorded, {}, look=False))
    except RangeFlowError as error:
        notes.append(f"from here, epochs are not known: {error}")
        return {}
    windows = batches.windows()
    return {name: count / windows[name] for name, count in batches.counts(max_steps).items()}


def _show(shown: dict[str, Any]) -> None:
    step, after = shown["from_step"], shown["after"]
    who = "as of its last heartbeat" if shown["training"] else "nobody trains the run now"
    print(f"{shown['edit']}, from step {step} on ({who})")
    names = sorted({name for one in after for name in one["shares"]} | set(shown["before"]))
    columns = ["source", "before", *(f"step {one['step']}" for one in after)]
    columns += ["tokens to come", "epochs at the end"] if shown["tokens"] else []
    rows: list[list[object]] = []
    for name in names:
        row = [name, *(_percent(o.get(name)) for o in (shown["before"], *_each_shares(after)))]
        if shown["tokens"]:
            tokens, epochs = shown["tokens"].get(name, 0), shown["epochs"].get(name)
            row += [f"{tokens:,}", "?" if epochs is None else f"{epochs:.2f}"]
        rows.append(list(row))
    print_table(columns, rows)
    if shown["skipped_samples"]:
        print(f"{shown['skipped_samples']:,} samples are skipped, and count as consumed")
    for note in shown["notes"]:
        print(note)


def _each_shares(after: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    return [one["shares"] for one in after]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _answer(
    store: Store,
    key: str,
    seconds: float,
    *,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> dict[str, Any] | None:
    """{"applied_from": step} or {"refused": why}; None when there is none in that time."""
    log = Log(store)
    until = clock() + seconds
    while True:
        for recorded in recorded_plans(log.refresh()):
            if recorded.edit is not None and recorded.edit["request"] == key:
                return {"applied_from": recorded.from_step}
        why = refusal(store, key)
        if why is not None:
            forget(store, key)
            return {"refused": why}
        if clock() >= until:
            return None
        sleep(_LOOK_SECONDS)


def _tell(arguments: EditArguments, shown: dict[str, Any]) -> None:
    answer = shown["answer"] or {}
    if shown["request"] is None:
        print("nothing is changed; --yes applies it")
    elif "applied_from" in answer:
        print(f"applied, from step {answer['applied_from']} on")
    elif not answer and not arguments.wait:
        who = "its owner answers at a step" if shown["training"] else "the next start answers"
        print(f"asked ({shown['request']}); {who}")


def _exit_code(arguments: EditArguments, shown: dict[str, Any]) -> int:
    """0, or the error that the answer is, or that there is none."""
    answer = shown["answer"]
    if answer is not None and "refused" in answer:
        if not arguments.json:
            raise ConfigurationError(f"the edit is refused: {answer['refused']}")
        return ConfigurationError.exit_code
    if shown["request"] is not None and arguments.wait > 0 and answer is None:
        if not arguments.json:
            raise StoreUnavailableError(
                f"no answer within {arguments.wait:g} s; the request stays ({shown['request']})"
            )
        return StoreUnavailableError.exit_code
    return 0


def _confirm(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


if __name__ == "__main__":
    sys.exit(main(confirm=_confirm if sys.stdin.isatty() else None))
