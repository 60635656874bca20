"""What the operator commands of `checkpointing` share: how they parse, find a run, and fail.

Exit codes: 0 done, 75 a store failed and trying again may help, 78 something must change first.
"""

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from checkpointing.history import Checkpoint, History
from storage.errors import ConfigurationError, RangeFlowError, StoreUnavailableError
from storage.store import Store

DONE = 0
TRY_AGAIN = 75
CHANGE_SOMETHING = 78

RUN_KEY = "run.json"
_RUN_FORMAT = 1


def run_command(
    arguments: Any,
    execute: Callable[[Any], int],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
) -> int:
    """The exit code of `execute`, given the `arguments` (a type that tyro reads) from `argv`.

    An error is one line on stderr; without `argv` the arguments are those of this process.
    """
    try:
        parsed = _parsed(arguments, argv, prog=prog, description=description)
        return DONE if parsed is None else execute(parsed)
    except RangeFlowError as error:
        sys.stderr.write(f"error: {error}\n")
        return TRY_AGAIN if isinstance(error, StoreUnavailableError) else CHANGE_SOMETHING


def read_run(store: Store) -> dict[str, Any]:
    """What run.json says: `run`, the identifier, and `identity`, the fields that decide bits."""
    path = store.local_path(RUN_KEY)
    try:
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(path)
        run = json.loads(store.get(RUN_KEY))
    except FileNotFoundError:
        raise ConfigurationError(
            f"{store.url} holds no run: there is no {RUN_KEY}. RUN is the value of --run in "
            "training; `python -m checkpointing.runs ls PREFIX` finds runs"
        ) from None
    except ValueError as error:
        raise ConfigurationError(
            f"{store.url}/{RUN_KEY} is damaged ({error}); put back a copy of it"
        ) from error
    if not isinstance(run, dict) or run.get("format") != _RUN_FORMAT:
        found = run.get("format") if isinstance(run, dict) else None
        raise ConfigurationError(
            f"{store.url}/{RUN_KEY} has format {found}, expected {_RUN_FORMAT}: it is no run, or "
            "one of another version of RangeFlow"
        )
    return run


def chosen(past: History, name: str) -> Checkpoint:
    """The live checkpoint that an operator calls `name`: `latest`, `best`, or the step of one.

    `best` has the lowest validation loss, the newest of equals. Raises ConfigurationError.
    """
    if not past.live:
        raise ConfigurationError(
            "the run has no live checkpoint yet; `python -m checkpointing.runs show RUN` lists all"
        )
    steps = ", ".join(str(c.step) for c in past.live)
    if name == "latest":
        return past.live[-1]
    if name == "best":
        losses = [(c, c.validation_loss) for c in past.live]
        scored = [(loss, -c.index, c) for c, loss in losses if loss is not None]
        if not scored:
            raise ConfigurationError(
                f"no live checkpoint has a validation loss, so none is best; name a step ({steps}) "
                "or `latest`"
            )
        return min(scored)[-1]
    found = [c for c in past.live if str(c.step) == name]
    if not found:
        raise ConfigurationError(
            f"step must be `best`, `latest` or one of the live checkpoints ({steps}); got {name!r}"
        )
    return found[-1]


def _parsed(arguments: Any, argv: Sequence[str] | None, *, prog: str, description: str) -> Any:
    """The arguments, or None when help was asked for and given."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                arguments,
                prog=prog,
                description=description,
                args=argv,
                use_underscores=True,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            return None
        # tyro draws its complaint in a box of several lines: what it says, in one.
        plain = re.sub(r"\x1b\[[0-9;]*m|^╭.*$|[│╰╯─]", " ", said.getvalue(), flags=re.MULTILINE)
        raise ConfigurationError(" ".join(plain.split())) from None
