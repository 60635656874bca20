"""The command line for operators: what runs hold, whether it is whole, what to keep, copies.

They may be used while a run trains, and fence nobody. `ls`, `show` and `verify` change nothing,
`verify --record` appends VERIFIED, which lifts a quarantine; `prune` appends RETIRE.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from checkpointing.arguments import COMMANDS, Ask, Copy, Doctor, Ls, Pin, Prune, Show, Unpin, Verify
from checkpointing.asks import ask
from checkpointing.beats import BEAT_SECONDS, read_beat
from checkpointing.copying import copy_run
from checkpointing.diagnosis import diagnose
from checkpointing.history import history
from checkpointing.naming import chosen, read_run
from checkpointing.overview import description, runs_below
from checkpointing.pins import all_pins, pin_for_ever, unpin
from checkpointing.pruning import prune
from checkpointing.verification import damaged_unnoticed, record_verified, verify
from storage.commands import run_command
from storage.display import numbers, plain, print_table, progress_bar, shown_progress, size
from storage.errors import ConfigurationError
from storage.log import Log
from storage.store import Store, open_store

_ILL = ConfigurationError.exit_code

_DESCRIPTION = """Looks at runs, verifies, keeps, removes and copies what they hold.

Example:
    python -m checkpointing.runs ls runs
    python -m checkpointing.runs show runs/default
    python -m checkpointing.runs verify gs://bucket/runs/a --json
    python -m checkpointing.runs copy runs/default gs://bucket/runs/default
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands; what it returns is the exit code."""
    return run_command(
        COMMANDS,
        lambda arguments: _EXECUTE[type(arguments)](arguments),
        argv,
        prog="python -m checkpointing.runs",
        description=_DESCRIPTION,
    )


def _opened(url: str, *, whole: bool = False) -> tuple[Store, Log, str]:
    """The store, the log and the identifier of a run; refuses what is no run."""
    store = open_store(url)
    run: str = read_run(store)["run"]
    return store, Log(store, whole=whole), run


def _ls(arguments: Ls) -> int:
    found = runs_below(arguments.prefix)
    code = _ILL if any("error" in run for run in found) else 0
    if arguments.json:
        print(json.dumps(found))
        return code
    if not found:
        print(f"no run below {arguments.prefix}")
        return code
    columns = ("run", "step", "live", "generation", "state")
    print_table(columns, [_overview_row(run) for run in found])
    return code


def _overview_row(run: dict[str, Any]) -> tuple[object, ...]:
    if "error" in run:
        return (run["url"], None, None, None, run["error"])
    state = "complete" if run["complete"] else "not complete"
    return (run["url"], run["step"], run["live"], run["generation"], state)


def _show(arguments: Show) -> int:
    run = description(arguments.run)
    if arguments.json:
        print(json.dumps(run))
        return 0
    state = "complete" if run["complete"] else "not complete"
    print(f"{arguments.run}: {state}, generation {run['generation']}, run {run['run']}")
    columns = ("step", "digest", "generation", "state", "validation loss", "saved")
    print_table(columns, [_checkpoint_row(c) for c in run["checkpoints"]])
    for pin in run["pins"]:
        because = f": {plain(pin['reason'])}" if pin["reason"] else ""
        print(f"step {pin['step']} is pinned{because}")
    if run["damaged_records"]:
        print(f"damaged records of the log, left out: {numbers(run['damaged_records'])}")
    return 0


def _checkpoint_row(checkpoint: dict[str, Any]) -> tuple[object, ...]:
    states = ("live", "retired", "quarantined", "verified", "pinned", "unhealthy")
    checkpoint = {**checkpoint, "unhealthy": not checkpoint["healthy"]}
    loss = checkpoint["validation_loss"]
    return (
        checkpoint["step"],
        checkpoint["digest"][:12],
        checkpoint["generation"],
        ", ".join(name for name in states if checkpoint[name]),
        None if loss is None else f"{loss:.4f}",
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(checkpoint["written_at"])),
    )


def _verify(arguments: Verify) -> int:
    store, log, run = _opened(arguments.run, whole=True)
    past = history(log.refresh())
    todo = [c for c in past.checkpoints if not c.retired]
    if arguments.step != "all":
        todo = [chosen(past, arguments.step, or_quarantined=True)]
    results: list[dict[str, Any]] = []
    with progress_bar() as progress:
        for checkpoint in progress.track(todo, description="verifying"):
            verdict, what = verify(store, log, checkpoint.index)
            recorded = arguments.record and verdict == "whole"
            results.append(
                {
                    "step": checkpoint.step,
                    "index": checkpoint.index,
                    "digest": checkpoint.digest,
                    "quarantined": checkpoint.quarantined,
                    "verdict": verdict,
                    "damage": what,
                    "recorded": recorded and record_verified(log, checkpoint.index),
                }
            )
    unknown = damaged_unnoticed(log)
    verdicts = [result["verdict"] for result in results]
    if arguments.json:
        report = {"run": run, "url": arguments.run, "checkpoints": results}
        print(json.dumps({**report, "damaged_records": unknown}))
    else:
        for result in results:
            print(f"step {result['step']}: {_finding(result)}")
        if unknown:
            print(f"damaged records of the log: {numbers(unknown)}")
        print(f"{verdicts.count('whole')} of {len(results)} checkpoints are whole")
    return _ILL if "damaged" in verdicts or unknown else 0


def _finding(result: dict[str, Any]) -> str:
    if result["verdict"] == "retired":
        return "retired meanwhile"
    if result["verdict"] == "damaged":
        return f"DAMAGED, {plain(result['damage'])}"
    if result["quarantined"] and not result["recorded"]:
        return "whole, and in quarantine; --record lifts that"
    return "whole, recorded" if result["recorded"] else "whole"


def _pin(arguments: Pin) -> int:
    store, log, run = _opened(arguments.run)
    checkpoint = pin_for_ever(
        store, log, lambda past: chosen(past, arguments.step), reason=arguments.reason
    )
    if arguments.json:
        print(json.dumps({"run": run, "step": checkpoint.step, "index": checkpoint.index}))
    else:
        print(f"step {checkpoint.step} is pinned, digest {checkpoint.digest[:12]}")
    return 0


def _unpin(arguments: Unpin) -> int:
    store, log, run = _opened(arguments.run)
    held = {pin.checkpoint for pin in all_pins(store) if pin.until is None}
    pinned = [c for c in history(log.refresh()).checkpoints if c.index in held]
    found = [c for c in pinned if str(c.step) == arguments.step]
    if not found:
        steps = numbers(c.step for c in pinned) or "none"
        raise ConfigurationError(
            f"STEP must be that of a pinned checkpoint ({steps}); got {arguments.step!r}"
        )
    for checkpoint in found:
        unpin(store, checkpoint.index)
    if arguments.json:
        print(json.dumps({"run": run, "step": found[-1].step, "index": found[-1].index}))
    else:
        print(f"step {found[-1].step} is not pinned any more")
    return 0


def _prune(arguments: Prune) -> int:
    store, log, run = _opened(arguments.run)
    with shown_progress() as advance:
        result = prune(
            store,
            log,
            keep_last=arguments.keep_last,
            keep_every_steps=arguments.keep_every_steps,
            dry_run=arguments.dry_run,
            wall_clock=time.time,
            advance=advance,
        )
    if arguments.json:
        print(json.dumps({"run": run, "url": arguments.run, **result}))
        return 0
    if result["removed"]:
        rows = [
            (row["step"], row["generation"], row["why"], row["objects"], size(row["size_bytes"]))
            for row in result["removed"]
        ]
        print_table(("step", "generation", "why", "objects", "size"), rows)
    done = "would be removed" if arguments.dry_run else "removed"
    print(
        f"{result['objects']} objects {done}, {size(result['size_bytes'])} (keep_last "
        f"{result['keep_last']}, keep_every_steps {result['keep_every_steps']})"
    )
    return 0


def _copy(arguments: Copy) -> int:
    source, destination = open_store(arguments.run), open_store(arguments.destination)
    with shown_progress() as advance:
        result = copy_run(source, destination, advance=advance)
    damaged = [c["step"] for c in result["checkpoints"] if c["verdict"] == "damaged"]
    if arguments.json:
        print(json.dumps(result))
    else:
        print(
            f"{arguments.destination}: {len(result['checkpoints']) - len(damaged)} checkpoints "
            f"verified, {result['records']} records, {result['copied_objects']} objects copied "
            f"({size(result['copied_bytes'])}), {result['present_objects']} were there already"
        )
        if damaged:
            print(f"DAMAGED, as in the source: steps {numbers(damaged)}")
    live = [c for c in result["checkpoints"] if not c["quarantined"]]
    return _ILL if any(c["verdict"] == "damaged" for c in live) else 0


def _doctor(arguments: Doctor) -> int:
    findings = diagnose(open_store(arguments.run))
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        rows = [(f.name, "ok" if f.ok else "WRONG", f.detail) for f in findings]
        print_table(("looked at", "", "found"), rows)
    return 0 if all(finding.ok for finding in findings) else _ILL


def _ask(arguments: Ask) -> int:
    store, log, _ = _opened(arguments.run)
    past = history(log.refresh())
    beat = read_beat(store, past.generation)
    key = ask(store, arguments.what)
    if arguments.json:
        print(json.dumps({"request": key}))
    elif not beat or beat.get("left"):
        print(f"asked ({key}); nobody trains this run now, so the next start answers")
    else:
        print(
            f"asked ({key}); generation {past.generation}, at step {beat.get('step')}, answers at "
            f"a step boundary after its next heartbeat ({BEAT_SECONDS:.0f} s)"
        )
    return 0


_EXECUTE: dict[type, Callable[[Any], int]] = {
    Ls: _ls,
    Show: _show,
    Verify: _verify,
    Pin: _pin,
    Unpin: _unpin,
    Prune: _prune,
    Copy: _copy,
    Ask: _ask,
    Doctor: _doctor,
}


if __name__ == "__main__":
    sys.exit(main())
