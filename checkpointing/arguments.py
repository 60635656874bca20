"""What each operator command may be asked, as tyro reads it, with its help."""

import inspect
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

_Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


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

    run: _Run
    """Path or URL of the run."""
    json: bool = False
    """Print it as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verify:
    """Read every byte of the checkpoints not retired, and compare it with its digest.

    Exit code 78 when something is damaged.
    """

    run: _Run
    """Path or URL of the run."""
    step: Annotated[str, tyro.conf.arg(metavar="N|best|latest|all")] = "all"
    """Only this checkpoint."""
    record: bool = False
    """Record in the run's log which are whole; that takes them out of quarantine."""
    json: bool = False
    """Print what was found as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pin:
    """Keep a checkpoint for ever: it is neither retired nor removed until it is unpinned."""

    run: _Run
    """Path or URL of the run."""
    step: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STEP")]
    """The step of a live checkpoint, `best` or `latest`."""
    reason: str = ""
    """What for; `show` prints it."""
    json: bool = False
    """Print what is pinned as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unpin:
    """Give a pinned checkpoint back to retention."""

    run: _Run
    """Path or URL of the run."""
    step: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STEP")]
    """The step of a pinned checkpoint."""
    json: bool = False
    """Print what was unpinned as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prune:
    """Retire old checkpoints as training does, and remove objects that no checkpoint needs.

    Keeps what the run itself was last started to keep, unless told otherwise here.
    """

    run: _Run
    """Path or URL of the run."""
    dry_run: bool = False
    """Only tell what would be removed."""
    keep_last: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Newest checkpoints to keep; as the run does if not given."""
    keep_every_steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Keep those of steps that are multiples of this, 0 for none; as the run does if not given."""
    json: bool = False
    """Print what is removed as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """Copy a run to another place, verified; it can be resumed there.

    The source may go on training. Started again after a kill it goes on, and later it brings the
    copy up to date. Exit code 78 when a live checkpoint is damaged in the source.
    """

    run: _Run
    """Path or URL of the run."""
    destination: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
    """Path or URL: an empty or new place, or an earlier copy."""
    json: bool = False
    """Print what was copied as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Doctor:
    """Tell what is wrong with a run or with its store, and what to do.

    Exit code 78 when something is. An empty place is examined as the store of a run to come.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|URL")]
    """Path or URL of the run, or of the place where one shall be."""
    json: bool = False
    """Print a list of findings as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """Ask the incarnation that trains a run for something; it answers at a step boundary."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Path or URL of the run."""
    what: Annotated[Literal["save", "stop"], tyro.conf.Positional]
    """`save` now, or `stop`: save and stay stopped, with exit code 0."""
    json: bool = False
    """Print the key of the request as JSON; it is gone once it is answered."""


def _subcommand(kind: type, example: str) -> Any:
    """How tyro calls the command; an example in a docstring would not be shown."""
    what = inspect.cleandoc(kind.__doc__ or "")
    about = f"{what}\n\nExample:\n    python -m checkpointing.runs {example}\n"
    return tyro.conf.subcommand(kind.__name__.lower(), description=about)


COMMANDS: Any = (
    Annotated[Ls, _subcommand(Ls, "ls gs://bucket/runs")]
    | Annotated[Show, _subcommand(Show, "show runs/default --json")]
    | Annotated[Verify, _subcommand(Verify, "verify runs/default --record")]
    | Annotated[Pin, _subcommand(Pin, "pin runs/default best --reason 'for the paper'")]
    | Annotated[Unpin, _subcommand(Unpin, "unpin runs/default 1200")]
    | Annotated[Prune, _subcommand(Prune, "prune runs/default --dry_run --keep_last 2")]
    | Annotated[Copy, _subcommand(Copy, "copy runs/default gs://bucket/runs/default")]
    | Annotated[Ask, _subcommand(Ask, "ask runs/default save")]
    | Annotated[Doctor, _subcommand(Doctor, "doctor gs://bucket/runs/a")]
)
"""One of the commands above, by its name in lower case."""
