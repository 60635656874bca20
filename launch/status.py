"""The command that says where a run stands: who trains it, how far, how well, and what to do."""

import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from checkpointing.beats import read_error
from checkpointing.history import History, history
from checkpointing.liveness import Liveness, judge
from checkpointing.naming import read_run
from launch.accounting import GAP, Account, Life, account, read_lives
from storage.commands import run_command
from storage.display import plain, print_table
from storage.log import Log
from storage.store import Store, open_store

_MOST_BYTES = 2**16
_MOST = 1e15

_DESCRIPTION = """Where a run stands, and what to do next.

Takes ten seconds where only the heartbeats can tell whether somebody trains it.

Example:
    python -m launch.status runs/default
    python -m launch.status gs://bucket/runs/a --json
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """Where a run stands."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Path or URL of the run."""
    json: bool = False
    """Print it as JSON."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; what it returns is the exit code."""
    return run_command(
        Status, _tell, argv, prog="python -m launch.status", description=_DESCRIPTION
    )


def status(
    store: Store,
    *,
    sleep: Callable[[float], None] = time.sleep,
    wall_clock: Callable[[], float] = time.time,
) -> dict[str, Any]:
    """All that the log, the heartbeats and the requests say of a run, as JSON.

    `beat_age_seconds` is by the clocks of two hosts; whether it is alive is not judged by it.
    """
    run = read_run(store)["run"]
    log = Log(store, whole=True)
    past = history(log.refresh())
    alive = judge(store, past, sleep)
    lives = read_lives(store, log.records)
    found = account(lives)
    beat, newest = alive.beat, past.live[-1] if past.live else None
    step = max([_integer(beat.get("step")) or 0, newest.step if newest else 0])
    told_at = _number(_mapping(beat.get("time")).get("now"))
    max_steps = _max_steps(past)
    report = {
        "url": store.url,
        "run": run,
        "state": alive.state,
        "generation": alive.generation,
        "host": alive.host if alive.generation else None,
        "pid": _integer(alive.owner.get("pid")),
        "phase": beat.get("phase"),
        "beat_age_seconds": None if told_at is None else max(0.0, wall_clock() - told_at),
        "step": step,
        "max_steps": max_steps,
        "loss": _number(beat.get("loss")),
        "checkpoint": None
        if newest is None
        else {"step": newest.step, "age_steps": step - newest.step, "digest": newest.digest},
        "eta_seconds": _eta(found, lives, step, max_steps),
        "goodput": found.goodput,
        "goodput_alive": found.goodput_alive,
        "incarnations": found.incarnations,
        "error": _error(read_error(store, alive.generation, beat)),
        "damaged_records": list(log.damaged),
        "requests": _requests(store),
    }
    return {**report, "advice": _advice(report, alive)}


def _advice(report: Mapping[str, Any], alive: Liveness) -> str:
    """What to do next."""
    run = shlex.quote(report["url"])
    if report["damaged_records"]:
        return f"look at the damaged log: python -m checkpointing.runs doctor {run}"
    if alive.state == "complete":
        return (
            f"take the weights: python -m checkpointing.export {run} --out DIR; a larger "
            "--max_steps goes on"
        )
    if alive.state == "alive":
        waits = "; it answers what is asked at a step boundary" if report["requests"] else ""
        return f"nothing: it trains{waits}"
    if alive.state == "never claimed":
        return f"start it: torchrun --nproc_per_node=1 -- launch/train.py --run {run}"
    again = "start the same command again"
    if report["error"] is not None:
        again = "see to the error; then start the same command again"
    newest = report["checkpoint"]
    if newest is None:
        return f"{again}: nothing is saved yet, so it begins anew"
    lost = newest["age_steps"]
    behind = f", and does {lost} steps again" if lost else ""
    return f"{again}: it goes on from step {newest['step']}{behind}"


def _tell(arguments: Status) -> int:
    report = status(open_store(arguments.run))
    if arguments.json:
        print(json.dumps(report))
        return 0
    place = f"{report['url']} ({report['run']})"
    print_table(("run", place), [row for row in _rows(report) if row[1] is not None])
    return 0


def _rows(report: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    newest, requests = report["checkpoint"], report["requests"]
    who = f", generation {report['generation']} on host {report['host']}, process {report['pid']}"
    of = f" of {report['max_steps']}" if report["max_steps"] is not None else ""
    age, loss, eta = report["beat_age_seconds"], report["loss"], report["eta_seconds"]
    goodput, alone = report["goodput"], report["goodput_alive"]
    saved = "none yet"
    if newest is not None:
        saved = f"step {newest['step']}, {newest['age_steps']} steps ago, {newest['digest'][:12]}"
    return [
        ("state", f"{report['state']}{who if report['generation'] else ''}"),
        ("step", f"{report['step']}{of}"),
        ("phase", None if report["phase"] is None else plain(report["phase"])),
        ("last heartbeat", None if age is None else f"{age:.0f} s ago, by the clocks of two hosts"),
        ("checkpoint", saved),
        ("loss", None if loss is None else f"{loss:.4f}"),
        ("left", None if eta is None else f"{_duration(eta)} at the pace of the run so far"),
        (
            "goodput",
            None
            if goodput is None or alone is None
            else f"{goodput:.4f} of {report['incarnations']} incarnations; {alone:.4f} while alive",
        ),
        ("error", None if report["error"] is None else plain(report["error"])),
        ("requests", ", ".join(plain(request["kind"]) for request in requests) or "none"),
        ("next", report["advice"]),
    ]


def _error(told: Mapping[str, Any]) -> str | None:
    """The error with which the newest incarnation ended, if that was its own."""
    if not told:
        return None
    return f"{told.get('line')} (exit code {told.get('code')})"


def _max_steps(past: History) -> int | None:
    body = past.claim.body if past.claim else {}
    return _integer(_mapping(body.get("schedule")).get("schedule.max_steps"))


def _eta(found: Account, lives: Sequence[Life], step: int, max_steps: int | None) -> float | None:
    """Seconds to the end with a machine at hand, at the pace of all incarnations together."""
    steps = sum(life.new_steps for life in lives)
    if max_steps is None or not steps:
        return None
    alive = (found.wall - found.parts[GAP]) / 1000
    return max(0, max_steps - step) * alive / steps


def _requests(store: Store) -> list[dict[str, Any]]:
    """What operators asked and nobody has answered; what is no request is left to the owner."""
    found = []
    for key in store.list("requests/"):
        try:
            content = json.loads(store.get(key, 0, _MOST_BYTES))
            found.append(
                {"key": key, "kind": str(content["kind"]), "asked_at": content["asked_at"]}
            )
        except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
            continue
    return found


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    """None also for what is no finite number: JSON has none of these."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -_MOST < value < _MOST else None


if __name__ == "__main__":
    sys.exit(main())
