"""Two replicas, one of which is killed: when training goes on, and what becomes of its samples."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from benchmarks.measuring import Row, rotated
from benchmarks.restart_programs import (
    ROOT,
    TRAINING,
    Line,
    Program,
    now,
    supervised,
    torchrun_alone,
)
from benchmarks.restart_work import BATCH

OURS = "rangeflow, supervised"
TORCHFT = "torchft"
NEW_STEP = "loss of one of two replicas to the first new step"
BOTH = "... until two train again"
DROPPED = "samples that were to be trained on, and were not"
TWICE = "samples trained on more than once"
HALF = "steps made of half a batch"
_KILL_AT = 50


def replicas_rows(folder: Path, repeats: int, steps: int, torchft_python: Path) -> list[Row]:
    """Each contestant in turn, killed once a repeat; torchft is left out where it is missing."""
    contestants = [OURS]
    if subprocess.run([torchft_python, "-c", "import torchft"], capture_output=True).returncode:
        print(f"torchft is left out: {torchft_python} does not have it", file=sys.stderr)
    else:
        contestants.append(TORCHFT)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for number in range(repeats):
        for name in rotated(contestants, number) if number else contestants:
            print(f"repeat {number + 1} of {repeats}: {name}", file=sys.stderr)
            place = folder / str(number)
            place.mkdir(exist_ok=True)
            if name == OURS:
                found = ours(place / "run", steps)
            else:
                found = torchft(place, folder / "0" / "run" / "corpus", steps, torchft_python)
            rounds[name].append(found)
    return [
        Row(
            figure=figure,
            contestant=name,
            values=tuple(found[figure] for found in rounds[name]),
            unit=unit,
        )
        for figure, unit in (
            *((NEW_STEP, "s"), (BOTH, "s"), (HALF, "steps")),
            *((DROPPED, "samples"), (TWICE, "samples")),
        )
        for name in contestants
    ]


def ours(run: Path, steps: int) -> dict[str, float]:
    """Two ranks below the supervisor; the samples as `data_service.audit` proves them."""
    ranks = ("--standalone", "--nproc_per_node=2")
    command = [*supervised(*ranks), "launch/train.py", "--run", str(run), *TRAINING]
    with Program([*command, f"--max_steps={steps}"]) as program:
        program.line(lambda line: (line.step or 0) >= _KILL_AT)
        os.kill(program.ranks()[1], signal.SIGKILL)
        killed = now()
        program.line(lambda line: line.at > killed and line.text.startswith("supervise:"))
        before = program.lines
        highest = max(line.step or 0 for line in before)
        new = program.line(lambda line: (line.step or 0) > highest, len(before))
        if program.end():
            raise RuntimeError(f"the run failed: {program.tail()}")
    audit = [sys.executable, "-m", "data_service.audit", str(run), "--json"]
    told = json.loads(subprocess.run(audit, cwd=ROOT, capture_output=True, check=True).stdout)
    if not told["proved"] or told["violations"]:
        raise RuntimeError(f"the audit does not prove exactly once: {told['verdict']}")
    missing = steps * BATCH - sum(source["samples"] for source in told["sources"])
    return {
        NEW_STEP: new.at - killed,
        BOTH: new.at - killed,
        HALF: 0.0,
        DROPPED: float(missing),
        TWICE: 0.0,
    }


def torchft(folder: Path, corpus: Path, steps: int, python: Path) -> dict[str, float]:
    """Two replica groups, each below a torchrun that restarts it, and the lighthouse."""
    lighthouse: list[str | Path] = [python.parent / "torchft_lighthouse", "--min_replicas", "1"]
    lighthouse += ["--quorum_tick_ms", "100", "--join_timeout_ms", "10000"]
    with ExitStack() as stack:
        stack.enter_context(Program([*lighthouse, "--bind", "[::]:29510"]))
        replicas = [
            stack.enter_context(
                Program(
                    [
                        *torchrun_alone(
                            *("--standalone", "--nproc_per_node=1", "--max-restarts=100"),
                            python=str(python),
                        ),
                        *("benchmarks/restart_torchft.py", folder, corpus, str(steps)),
                    ],
                    {
                        "REPLICA_GROUP_ID": str(group),
                        "NUM_REPLICA_GROUPS": "2",
                        "TORCHFT_LIGHTHOUSE": "http://localhost:29510",
                    },
                )
            )
            for group in (0, 1)
        ]
        alive, lost = replicas
        alive.line(lambda line: step_of(line)[0] >= _KILL_AT and step_of(line)[1] == 2)
        os.kill(lost.ranks()[0], signal.SIGKILL)
        killed = now()
        before = [line for line in alive.lines if line.at <= killed]
        highest = max(step_of(line)[0] for line in before)
        new = alive.line(lambda line: step_of(line)[0] > highest, len(before))
        both = alive.line(lambda line: line.at > new.at and step_of(line)[1] == 2, len(before))
        for replica in replicas:
            replica.line(lambda line: line.text == "complete")
    told = [line.text for replica in replicas for line in replica.lines]
    return {NEW_STEP: new.at - killed, BOTH: both.at - killed, **samples_of(told, steps)}


def samples_of(lines: Iterable[str], steps: int) -> dict[str, float]:
    """What the replicas' lines say became of the samples of the first so many steps."""
    used: Counter[int] = Counter()
    groups: Counter[int] = Counter()
    for line in lines:
        if line.startswith("{"):
            told = json.loads(line)
            if told["committed"] and told["samples"] and told["step"] <= steps:
                used.update(told["samples"])
                groups[told["step"]] += 1
    return {
        HALF: float(sum(count < 2 for count in groups.values())),
        DROPPED: float(steps * BATCH - len(used)),
        TWICE: float(sum(count > 1 for count in used.values())),
    }


def step_of(line: Line) -> tuple[int, int]:
    """The committed step that a replica tells of, and of how many replicas it was made."""
    if not line.text.startswith("{"):
        return 0, 0
    told = json.loads(line.text)
    return (told["step"], told["replicas"]) if told["committed"] else (0, 0)
