"""What saving and loading cost: RangeFlow beside torch.save and torch.distributed.checkpoint.

A training loop goes on around each save, with one thread, on the state of GPT-2 with Adam. Figures
per contestant and repeat:

- blocked: time in the save call, and in the wait before the update;
- effective stall: blocked, and for every step until the save is durable, the time that it took
  more than the median step of the same repeat with no save in flight;
- time to durable: from the call until all is synced, for RangeFlow committed;
- peak extra memory, and memory after each of many saves, in processes of their own;
- loading the same state, verified, and by two ranks.

Every repeat runs every contestant once, in rotating order. A first round is told apart: it
allocates memory and starts processes.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # run as a file, with `benchmarks/` in front of the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.checkpoint_contestants import (
    ASYNC_PROCESS,
    ASYNC_THREAD,
    MAKERS,
    OURS,
    PEERS,
    TORCH_SAVE,
    Contestant,
    join_world_of_one,
    make,
)
from benchmarks.checkpoint_loading import IN_PLACE, OURS_LOAD, TORCH_LOAD, loading_rows, ranks_rows
from benchmarks.checkpoint_memory import growth, measured
from benchmarks.gpt2_training import SIZES, Training
from benchmarks.measuring import (
    Claim,
    Row,
    arguments,
    at_most,
    machine,
    report,
    rotated,
    scratch_folder,
)

QUIET_STEPS = 3
SLACK_MEGABYTES = 64
"""Above two arenas: threads' stacks, digests, records, the allocator's rounding."""

FIRST = "blocked, first save"
BLOCKED = "blocked"
STALL = "effective stall"
DURABLE = "time to durable"
MEMORY = "peak extra memory"
GROWTH = "memory growth a save"
GROWTH_KILOBYTES = 0.25
"""What two runs of the same contestant differ by, and more."""


@dataclass(slots=True)
class Turn:
    """One save of one contestant, and the steps around it, in seconds."""

    blocked: float
    durable: float
    disturbed: list[float]
    quiet: list[float]

    def stall(self, median_step: float) -> float:
        """Blocked time, and what steps took longer until the save was durable."""
        return self.blocked + sum(step - median_step for step in self.disturbed)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0 when it ran, whether or not the claims hold."""
    parser = arguments(
        argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
    )
    parser.add_argument("--size", choices=list(SIZES), default="gpt2-124m")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="on the disk to measure")
    parser.add_argument(
        "--saves", type=int, default=50, help="for memory: 12 times as many of a small state"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=["saving", "memory", "loading", "ranks"],
        default=["saving", "memory", "loading", "ranks"],
    )
    parser.add_argument("--contestants", nargs="+", choices=list(MAKERS), default=list(MAKERS))
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.saves < 3:
        parser.error("--repeats must be at least 1 and --saves at least 3")
    warnings.filterwarnings("ignore", module="torch")
    torch.set_num_threads(1)
    rows: list[Row] = []
    about = {**machine(), "size": args.size}
    with scratch_folder(args.folder) as folder:
        about["folder"] = str(folder)
        if "memory" in args.parts:
            rows += memory_rows(args.size, folder, args.saves, args.contestants)
        if "loading" in args.parts:
            rows += loading_rows(Training(args.size), folder, args.repeats)
        if "ranks" in args.parts:
            rows += ranks_rows(args.size, folder, args.repeats)
        if "saving" in args.parts:
            rows = saving_rows(args.size, folder, args.repeats, args.contestants) + rows
    state = Training(args.size).size_bytes
    report("Saving and loading", rows, claims(rows, state), about, args.json)
    return 0


def saving_rows(size: str, folder: Path, repeats: int, names: Sequence[str]) -> list[Row]:
    """Every contestant in turn, in one process, once a repeat."""
    join_world_of_one()
    training = Training(size)
    contestants = {name: make(name, folder) for name in names}
    rounds: list[dict[str, Turn]] = []
    try:
        for number in range(repeats + 1):
            rounds.append({})
            for name in rotated(names, number):
                print(f"round {number} of {repeats}: {name}", file=sys.stderr)
                rounds[-1][name] = take_turn(training, contestants[name], number)
    finally:
        for contestant in contestants.values():
            contestant.close()
    first, measured_rounds = rounds[0], rounds[1:]
    medians = [
        statistics.median(step for turn in one.values() for step in turn.quiet)
        for one in measured_rounds
    ]
    figures: dict[str, dict[str, tuple[float, ...]]] = {BLOCKED: {}, STALL: {}, DURABLE: {}}
    for name in names:
        turns = [one[name] for one in measured_rounds]
        figures[BLOCKED][name] = tuple(turn.blocked for turn in turns)
        figures[STALL][name] = tuple(
            turn.stall(median) for turn, median in zip(turns, medians, strict=True)
        )
        figures[DURABLE][name] = tuple(turn.durable for turn in turns)
    figures[FIRST] = {name: (first[name].blocked,) for name in names}
    steps = Row(figure="quiet step", contestant="training", values=tuple(medians), unit="s")
    return [steps] + [
        Row(figure=figure, contestant=name, values=values, unit="s", against=TORCH_SAVE)
        for figure, of in figures.items()
        for name, values in of.items()
    ]


def take_turn(training: Training, contestant: Contestant, step: int) -> Turn:
    """Quiet steps, a save, and steps until it is durable."""
    quiet = [_timed_step(training)[0] for _ in range(QUIET_STEPS)]
    begun = time.perf_counter()
    contestant.begin(training.tensors, step)
    blocked = time.perf_counter() - begun
    disturbed = []
    while contestant.durable_at() is None:
        seconds, waited = _timed_step(training, contestant)
        disturbed.append(seconds)
        blocked += waited
    contestant.finish()
    at = contestant.durable_at()
    assert at is not None
    contestant.clear()
    return Turn(blocked=blocked, durable=at - begun, disturbed=disturbed, quiet=quiet)


def _timed_step(training: Training, contestant: Contestant | None = None) -> tuple[float, float]:
    """Seconds of a step, without those that it waited for a copy, and these."""
    begun = time.perf_counter()
    training.forward_backward()
    computed = time.perf_counter()
    if contestant is not None:
        contestant.wait_for_copy()
    copied = time.perf_counter()
    training.update()
    return time.perf_counter() - begun - (copied - computed), copied - computed


def memory_rows(size: str, folder: Path, saves: int, names: Sequence[str]) -> list[Row]:
    """Peak memory of each contestant, ours over more saves; growth over many of a small state.

    torch.save keeps nothing: what memory grows by with it, the loop and its measuring take.
    """
    rows = []
    for name in names:
        print(f"memory: {name}", file=sys.stderr)
        found = measured(name, saves=saves if name == OURS else 3, size=size, folder=folder)
        peak = found["peak_extra_bytes"] / 1e6
        rows.append(
            Row(figure=MEMORY, contestant=name, values=(peak,), unit="MB", against=TORCH_SAVE)
        )
    for name in (TORCH_SAVE, OURS):
        print(f"memory growth: {name}", file=sys.stderr)
        found = measured(name, saves=12 * saves, size="small", folder=folder)
        a_save = growth(found["after_bytes"]) / 1e3
        rows.append(Row(figure=GROWTH, contestant=name, values=(a_save,), unit="kB"))
    return rows


def claims(rows: Sequence[Row], state_bytes: int) -> list[Claim]:
    """The targets of issue 3, those whose figures were measured."""
    of = {(row.figure, row.contestant): row.median for row in rows}
    found = []

    def of_the_best(figure: str, names: Sequence[str], limit: float) -> None:
        """Ours as a share of the best of these, where they were measured."""
        best = min((of[figure, name] for name in names if (figure, name) in of), default=None)
        if best is not None and (figure, OURS) in of:
            whose = " or ".join(names) if len(names) < 3 else "the best peer"
            ratio = of[figure, OURS] / best if best > 0 else float("inf")
            found.append(at_most(f"{figure}, of {whose}", ratio, limit))

    of_the_best(BLOCKED, [TORCH_SAVE], 1 / 20)
    of_the_best(BLOCKED, [ASYNC_THREAD, ASYNC_PROCESS], 1 / 10)
    of_the_best(STALL, [TORCH_SAVE], 1 / 4)
    of_the_best(STALL, PEERS, 1.0)
    if (MEMORY, OURS) in of:
        arenas = 2 * state_bytes / 1e6 + SLACK_MEGABYTES
        found.append(
            at_most(
                f"peak extra memory, two arenas + {SLACK_MEGABYTES} MB",
                of[MEMORY, OURS],
                arenas,
                "MB",
            )
        )
        own, of_the_loop = of[GROWTH, OURS], of[GROWTH, TORCH_SAVE]
        found += [
            at_most(f"{GROWTH}, beyond torch.save's", own - of_the_loop, GROWTH_KILOBYTES, "kB"),
        ]
    for figure in ("load, warm", "load, cold", *(f"{IN_PLACE}, {c}" for c in ("warm", "cold"))):
        if (figure, OURS_LOAD) in of:
            ratio = of[figure, OURS_LOAD] / of[figure, TORCH_LOAD]
            found.append(at_most(f"{figure}, of torch.load's", ratio, 1.3))
    return found


if __name__ == "__main__":
    sys.exit(main())
