"""The commands that tell what runs hold, and whether it is whole: `ls`, `show` and `verify`.

They may be used while a run trains. Only `verify --record` changes a run: it appends VERIFIED,
which lifts a quarantine, and fences nobody.
"""

import inspect
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from checkpointing.history import Checkpoint, History, history
from checkpointing.naming import RUN_KEY, read_run
from checkpointing.pins import pinned
from storage.commands import run_command
from storage.errors import ConfigurationError, IntegrityError
from storage.log import Draft, Log, Record
from storage.store import Store, open_store

Verdict = Literal["whole", "damaged", "retired"]

_WIDE = 200
"""Columns of a table that is read by a program or kept in a file."""

_DESCRIPTION = """Tells what runs hold: which there are, their checkpoints, whether they are whole.

Example:
    python -m checkpointing.runs ls runs
    python -m checkpointing.runs show runs/default
    python -m checkpointing.runs verify gs://bucket/runs/a --json
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ls:
    """List the runs below a place: their newest checkpoint, and whether they are complete."""

    prefix: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PREFIX")]
    """Path or URL."""
    json: bool = False
    """Print a list as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Show:
    """Show every checkpoint that a run has committed, and records of its log that are damaged."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Path or URL of the run."""
    json: bool = False
    """Print it as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verify:
    """Read every byte of the checkpoints not retired, and compare it with its digest.

    Exit code 78 when something is damaged.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Path or URL of the run."""
    record: bool = False
    """Record in the run's log which are whole; that takes them out of quarantine."""
    json: bool = False
    """Print what was found as JSON."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands; what it returns is the exit code."""
    return run_command(
        Annotated[Ls, _subcommand(Ls, "ls gs://bucket/runs")]
        | Annotated[Show, _subcommand(Show, "show runs/default --json")]
        | Annotated[Verify, _subcommand(Verify, "verify runs/default --record")],
        _execute,
        argv,
        prog="python -m checkpointing.runs",
        description=_DESCRIPTION,
    )


def runs_below(prefix: str) -> list[dict[str, Any]]:
    """What there is to say of each run below a path or URL, in the order of their keys.

    A run that cannot be read has an `error`, and nothing else but its `url`.
    """
    store = open_store(prefix)
    folder = store.local_path(RUN_KEY)
    if folder is not None and not folder.parent.is_dir():
        raise ConfigurationError(f"there is no folder {prefix}; give the place that holds the runs")
    keys = [key for key in store.list("") if f"/{key}".endswith(f"/{RUN_KEY}")]
    return [_overview(f"{prefix.rstrip('/')}/{key}".removesuffix(f"/{RUN_KEY}")) for key in keys]


def description(url: str) -> dict[str, Any]:
    """What a run holds, from its log alone: no checkpoint is read."""
    store = open_store(url)
    run = read_run(store)["run"]
    log = Log(store)
    past = history(log.refresh())
    return {
        "run": run,
        "url": url,
        "generation": log.highest_generation,
        "complete": past.end is not None,
        "checkpoints": [{**asdict(c), "live": c.live} for c in past.checkpoints],
        "damaged_records": list(log.damaged),
    }


def verify(store: Store, log: Log, index: int) -> tuple[Verdict, str]:
    """Whether the checkpoint of COMMIT `index` is whole, and what is damaged if it is not.

    What looks damaged is read a second time before it is called so; what is retired is not read.
    Raises StoreUnavailableError when the store fails.
    """
    from checkpointing.load import load  # torch takes seconds, and `ls` and `show` need none of it

    with pinned(store, log, partial(_committed, index=index)) as checkpoint:
        if checkpoint.retired:
            return "retired", ""
        for again in (True, False):
            try:
                load(store, checkpoint)
                return "whole", ""
            except IntegrityError as error:
                if not again:
                    return "damaged", str(error)
    raise AssertionError("the second reading always returns")


def record_verified(log: Log, index: int) -> bool:
    """Append VERIFIED for a checkpoint; False when that would say nothing new."""

    def draft(records: Sequence[Record]) -> Draft | None:
        checkpoint = _committed(history(records), index)
        if checkpoint.retired or (checkpoint.verified and not checkpoint.quarantined):
            return None
        return Draft(kind="VERIFIED", generation=0, body={"checkpoints": [index]})

    return log.append(draft) is not None


def _subcommand(kind: type, example: str) -> Any:
    """How tyro calls the command; an example in a docstring would not be shown."""
    what = inspect.cleandoc(kind.__doc__ or "")
    about = f"{what}\n\nExample:\n    python -m checkpointing.runs {example}\n"
    return tyro.conf.subcommand(kind.__name__.lower(), description=about)


def _execute(arguments: Ls | Show | Verify) -> int:
    if isinstance(arguments, Ls):
        return _ls(arguments)
    if isinstance(arguments, Show):
        return _show(arguments)
    return _verify(arguments)


def _ls(arguments: Ls) -> int:
    found = runs_below(arguments.prefix)
    code = ConfigurationError.exit_code if any("error" in run for run in found) else 0
    if arguments.json:
        print(json.dumps(found))
        return code
    if not found:
        print(f"no run below {arguments.prefix}")
        return code
    columns = ("run", "step", "live", "generation", "state")
    _print_table(columns, [_overview_row(run) for run in found])
    return code


def _overview_row(run: dict[str, Any]) -> tuple[object, ...]:
    if "error" in run:
        return (run["url"], None, None, None, run["error"])
    state = "complete" if run["complete"] else "not complete"
    return (run["url"], run["step"], run["live"], run["generation"], state)


def _overview(url: str) -> dict[str, Any]:
    try:
        run = description(url)
    except ConfigurationError as error:
        return {"url": url, "error": str(error)}
    live = [c for c in run["checkpoints"] if c["live"]]
    return {
        "run": run["run"],
        "url": url,
        "step": live[-1]["step"] if live else None,
        "live": len(live),
        "generation": run["generation"],
        "complete": run["complete"],
    }


def _show(arguments: Show) -> int:
    run = description(arguments.run)
    if arguments.json:
        print(json.dumps(run))
        return 0
    state = "complete" if run["complete"] else "not complete"
    print(f"{arguments.run}: {state}, generation {run['generation']}, run {run['run']}")
    columns = ("step", "digest", "generation", "state", "validation loss", "saved")
    _print_table(columns, [_checkpoint_row(c) for c in run["checkpoints"]])
    if run["damaged_records"]:
        print(f"damaged records of the log, left out: {_numbers(run['damaged_records'])}")
    return 0


def _checkpoint_row(checkpoint: dict[str, Any]) -> tuple[object, ...]:
    names = [name for name in ("live", "retired", "quarantined", "verified") if checkpoint[name]]
    loss = checkpoint["validation_loss"]
    return (
        checkpoint["step"],
        checkpoint["digest"][:12],
        checkpoint["generation"],
        ", ".join(names),
        None if loss is None else f"{loss:.4f}",
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(checkpoint["written_at"])),
    )


def _verify(arguments: Verify) -> int:
    store = open_store(arguments.run)
    run = read_run(store)["run"]
    log = Log(store)
    past = history(log.refresh())
    results: list[dict[str, Any]] = []
    with _progress() as progress:
        todo = [c for c in past.checkpoints if not c.retired]
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
    unknown = _damaged_unnoticed(log)
    whole = [result for result in results if result["verdict"] == "whole"]
    damaged = [result for result in results if result["verdict"] == "damaged"]
    if arguments.json:
        report = {"run": run, "url": arguments.run, "checkpoints": results}
        print(json.dumps({**report, "damaged_records": unknown}))
    else:
        for result in results:
            print(f"step {result['step']}: {_finding(result)}")
        if unknown:
            print(f"damaged records of the log: {_numbers(unknown)}")
        print(f"{len(whole)} of {len(results)} checkpoints are whole")
    return ConfigurationError.exit_code if damaged or unknown else 0


def _damaged_unnoticed(log: Log) -> list[int]:
    """Records that were damaged after they had a successor; a torn one is voided by its own."""
    voided = {index for record in log.records for index in record.voids}
    return [index for index in log.damaged if index not in voided]


def _finding(result: dict[str, Any]) -> str:
    if result["verdict"] == "retired":
        return "retired meanwhile"
    if result["verdict"] == "damaged":
        return f"DAMAGED, {result['damage']}"
    if result["quarantined"] and not result["recorded"]:
        return "whole, and in quarantine; --record lifts that"
    return "whole, recorded" if result["recorded"] else "whole"


def _committed(past: History, index: int) -> Checkpoint:
    return next(c for c in past.checkpoints if c.index == index)


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell), overflow="fold") for cell in row))
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)


def _progress() -> Progress:
    """A bar on stderr, for a terminal only."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


if __name__ == "__main__":
    sys.exit(main())
