"""One host: from the SIGKILL of a rank to the first new step, and where that time goes."""

import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from benchmarks.measuring import Row, rotated
from benchmarks.restart_programs import (
    SAVE_EVERY,
    TRAINING,
    Line,
    Program,
    now,
    parent_of,
    started_at,
    supervised,
    torchrun_alone,
)

OURS = "rangeflow, supervised"
PLAIN = "rangeflow, torchrun alone"
TORCH_SAVE = "torch.save, torchrun"

NEW_STEP = "kill to the first new step"
FIRST_STEP = "kill to the first step"
AGAIN = "steps done again"
STAGES = (
    "1 kill to the next torchrun",
    "2 torchrun: imports, rendezvous",
    "3 rank: imports, until the run is claimed",
    "4 model, optimizer, restore",
    "5 the first step",
    "6 steps done again, and the first new one",
)
_FAR = SAVE_EVERY // 2
_CLAIMED = re.compile(r"claimed the run as generation")
_RESTORED = re.compile(r"going on from step")


def one_host_rows(folder: Path, repeats: int) -> list[Row]:
    """Each contestant in turn, killed once a repeat."""
    rounds: dict[str, list[dict[str, float]]] = {OURS: [], PLAIN: [], TORCH_SAVE: []}
    commands = {name: command(name, folder) for name in rounds}
    for name in rounds:
        print(f"first start: {name}", file=sys.stderr)
        recovery(commands[name])  # the corpus is prepared, files are in memory
    for number in range(repeats):
        for name in rotated(list(rounds), number):
            print(f"repeat {number + 1} of {repeats}: {name}", file=sys.stderr)
            rounds[name].append(recovery(commands[name]))
    rows = []
    for figure in (NEW_STEP, FIRST_STEP, AGAIN, *STAGES):
        for name, found in rounds.items():
            values = tuple(one[figure] for one in found if figure in one)
            unit = "steps" if figure == AGAIN else "s"
            against = TORCH_SAVE if figure in (NEW_STEP, FIRST_STEP) else ""
            if values:
                row = Row(figure=figure, contestant=name, values=values, unit=unit, against=against)
                both = name == TORCH_SAVE and figure == STAGES[2]
                rows.append(replace(row, note="with 4") if both else row)
    return rows


def command(name: str, folder: Path) -> list[str]:
    """The command line of a contestant; each has a folder of its own, which it goes on in."""
    one_host = ("--standalone", "--nproc_per_node=1")
    again = "--max-restarts=1000"
    own = folder / ("supervised" if name == OURS else "alone")
    ours = ["launch/train.py", "--run", str(own), *TRAINING]
    if name == OURS:
        return [*supervised(*one_host), *ours]
    if name == PLAIN:
        return [*torchrun_alone(*one_host, again), *ours]
    program = ["benchmarks/restart_torch_save.py", str(folder), str(folder / "alone" / "corpus")]
    return [*torchrun_alone(*one_host, again), *program]


def recovery(command: Sequence[str]) -> dict[str, float]:
    """Start it, kill its rank ten steps after a save, and see what passes until a new step."""
    with Program(command) as program:
        begun = program.line(lambda line: line.step is not None).step or 0

        def place(line: Line) -> bool:
            step = line.step or 0
            return step > begun + SAVE_EVERY and step % SAVE_EVERY == _FAR

        program.line(place)
        (rank,) = program.ranks()
        agent = parent_of(rank)
        os.kill(rank, signal.SIGKILL)
        killed = now()
        # What the rank had printed before comes before torchrun's own words about it.
        program.line(lambda line: line.at > killed and line.step is None)
        before = program.lines
        highest = max(line.step or 0 for line in before)
        seen = len(before)
        first = program.line(lambda line: line.step is not None, seen)
        new = program.line(lambda line: (line.step or 0) > highest, seen)
        found = {
            FIRST_STEP: first.at - killed,
            NEW_STEP: new.at - killed,
            AGAIN: float(highest + 1 - (first.step or 0)),
        }
        (rank,) = program.ranks()
        stops = [killed]
        stops.append(started_at(parent_of(rank)) if parent_of(rank) != agent else killed)
        stops.append(started_at(rank))
        restored = program.line(lambda line: bool(_RESTORED.search(line.text)), seen).at
        claims = [one.at for one in program.lines[seen:] if _CLAIMED.search(one.text)]
        stops += [claims[0] if claims else restored, restored, first.at, new.at]
    names = dict(zip(STAGES, pairwise(stops), strict=True))
    spans = {name: end - begin for name, (begin, end) in names.items() if end > begin}
    return found | spans
