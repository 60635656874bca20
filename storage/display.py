"""How operator commands show things to people: tables on stdout, bars on stderr."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

_WIDE = 200
"""Columns of a table that is read by a program or kept in a file."""


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows below their headings; None is an empty cell."""
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text("" if cell is None else plain(cell), overflow="fold") for cell in row))
    console = Console(width=None if sys.stdout.isatty() else _WIDE)
    with console.capture() as capture:
        console.print(table)
    print(capture.get(), end="")  # rich itself would exit with 1 when nobody reads it any more


def progress_bar() -> Progress:
    """A bar on stderr, for a terminal only."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def plain(value: object) -> str:
    """The text of a value that a store gave, without what would steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(value))


def size(size_bytes: int) -> str:
    """Bytes as people read them: 1.5 GB."""
    amount = float(size_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def numbers(values: Iterable[int]) -> str:
    """Numbers with commas between them."""
    return ", ".join(map(str, values))


@contextmanager
def shown_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows how far a phase is (done, total), on a bar of its own."""
    with progress_bar() as progress:
        tasks: dict[str, TaskID] = {}

        def advance(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=total)
            progress.update(tasks[phase], completed=done, total=total)

        yield advance
