"""How every command reads its arguments, and fails: one line, and the error's exit code."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from storage.errors import ConfigurationError, RangeFlowError

OUTPUT_CLOSED = 141
"""What a shell reports of a program that SIGPIPE ended: nobody reads its output any more."""

INTERRUPTED = 130


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
        code = 0 if parsed is None else execute(parsed)
        sys.stdout.flush()
        return code
    except RangeFlowError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except BrokenPipeError:
        _discard_output()
        return OUTPUT_CLOSED
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        return INTERRUPTED


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
    except BrokenPipeError:  # `--help | head`
        _discard_output()
        return None
    except SystemExit as stop:
        if not stop.code:
            _flush_help()
            return None
        # tyro draws its complaint in a box of several lines: what it says, in one.
        box = r"\x1b\[[0-9;]*m|^[╭+].*$|[│╰╯─]|^\|| \|$|-{4,}"
        plain = re.sub(box, " ", said.getvalue(), flags=re.MULTILINE)
        raise ConfigurationError(" ".join(plain.split())) from None


def _flush_help() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()


def _discard_output() -> None:
    """Nobody reads stdout any more; what waits for it must not fail again when Python ends."""
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())
