"""How every command reads its arguments, and fails: one line, and the error's exit code."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from storage.errors import ConfigurationError, RangeFlowError


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
        parsed = parse(arguments, argv, prog=prog, description=description)
        return 0 if parsed is None else execute(parsed)
    except RangeFlowError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code


def parse(
    arguments: Any,
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    default: Any = None,
    config: Sequence[Any] = (tyro.conf.FlagCreatePairsOff,),
) -> Any:
    """The arguments, or None when help was asked for and given. Raises ConfigurationError."""
    said = io.StringIO()
    more = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                arguments,
                prog=prog,
                description=description,
                args=argv,
                use_underscores=True,
                config=config,
                **more,
            )
    except SystemExit as stop:
        if not stop.code:
            return None
        # tyro draws its complaint in a box of several lines: what it says, in one.
        box = r"\x1b\[[0-9;]*m|^[╭+].*$|[│╰╯─]|^\|| \|$|-{4,}"
        plain = re.sub(box, " ", said.getvalue(), flags=re.MULTILINE)
        raise ConfigurationError(" ".join(plain.split())) from None
