"""What every benchmark shares: the machine in words, medians, claims, the JSON file, the table."""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One figure of one contestant: every repeat's value, and the contestant it is told against."""

    figure: str
    contestant: str
    values: tuple[float, ...]
    unit: str
    against: str = ""
    """Contestant that `ratio` divides by; "" for no ratio."""
    note: str = ""
    """What a reader must know of these values, such as that they were cut at a limit."""

    @property
    def median(self) -> float:
        """The middle value of the repeats."""
        return statistics.median(self.values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What is promised, what was measured, and whether the promise holds here."""

    name: str
    value: float
    unit: str
    target: str
    holds: bool


def at_most(name: str, value: float, limit: float, unit: str = "ratio") -> Claim:
    """The claim that a value is at most a limit."""
    return Claim(name=name, value=value, unit=unit, target=f"<= {limit:.4g}", holds=value <= limit)


def at_least(name: str, value: float, limit: float, unit: str = "ratio") -> Claim:
    """The claim that a value is at least a limit."""
    return Claim(name=name, value=value, unit=unit, target=f">= {limit:.4g}", holds=value >= limit)


def arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that every benchmark has."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    return parser


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The names in an order that begins elsewhere in every repeat."""
    first = by % len(names)
    return [*names[first:], *names[:first]]


@contextmanager
def scratch_folder(given: Path | None) -> Iterator[Path]:
    """A new folder to write in, gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="benchmark-", dir=given or Path.cwd()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def machine() -> dict[str, Any]:
    """What the figures were measured on, and when."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _proc_value("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory": _proc_value("/proc/meminfo", "MemTotal"),
        "gpu": gpu,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 2),
    }


def report(
    title: str, rows: Sequence[Row], claims: Sequence[Claim], about: dict[str, Any], to: Path | None
) -> None:
    """Print the tables, and write the JSON file where one is asked for."""
    by_place = {(row.figure, row.contestant): row for row in rows}
    entries = []
    for row in rows:
        base = by_place.get((row.figure, row.against))
        entries.append(
            {
                **asdict(row),
                "median": row.median,
                "lowest": min(row.values),
                "highest": max(row.values),
                "ratio": row.median / base.median if base and base.median else None,
            }
        )
    _print(title, entries, claims, about)
    if to is not None:
        found = {"machine": about, "claims": [asdict(c) for c in claims], "table": entries}
        to.write_text(json.dumps(found, indent=1) + "\n")


def markdown(rows: Sequence[Row]) -> str:
    """The figures as a table of a document: a line a figure, a column a contestant."""
    contestants = list(dict.fromkeys(row.contestant for row in rows))
    cells = {(row.figure, row.contestant): _cell(row) for row in rows}
    lines = [f"| | {' | '.join(contestants)} |", "|---" * (1 + len(contestants)) + "|"]
    for figure in dict.fromkeys(row.figure for row in rows):
        told = [cells.get((figure, contestant), "") for contestant in contestants]
        lines.append(f"| {figure} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    digits = 0 if all(value == int(value) for value in row.values) else 2
    spread = f"{min(row.values):.{digits}f}..{max(row.values):.{digits}f}"
    return f"{row.median:.{digits}f} {row.unit} ({spread}) {row.note}".rstrip()


def _print(
    title: str, entries: Sequence[dict[str, Any]], claims: Sequence[Claim], about: dict[str, Any]
) -> None:
    console = Console(width=None if Console().is_terminal else 140)
    console.print(f"{title}\n{', '.join(f'{key} {value}' for key, value in about.items())}")
    table = Table("figure", "contestant", "median", "lowest..highest", "ratio")
    before = entries[0]["figure"] if entries else ""
    for entry in entries:
        if entry["figure"] != before:
            table.add_section()
        before = entry["figure"]
        ratio = f"{entry['ratio']:.3f} x {entry['against']}" if entry["ratio"] is not None else ""
        table.add_row(
            entry["figure"],
            entry["contestant"],
            f"{entry['median']:.3f} {entry['unit']} {entry['note']}".rstrip(),
            f"{entry['lowest']:.3f}..{entry['highest']:.3f}",
            ratio,
        )
    console.print(table)
    held = Table("claim", "measured", "target", "holds")
    for claim in claims:
        answer = "yes" if claim.holds else "NO"
        held.add_row(claim.name, f"{claim.value:.4g} {claim.unit}", claim.target, answer)
    if claims:
        console.print(held)


def _proc_value(path: str, key: str) -> str:
    """The value of the first `key: value` line of a file in /proc; "" elsewhere than on Linux."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
