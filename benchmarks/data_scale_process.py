"""What a start on sources of some size costs, measured in a process of its own, printed as JSON.

`python -m benchmarks.data_scale_process FOLDER`, with what `write_data` wrote.
Times are in seconds, imports not counted, memory in bytes.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.synthetic_sources import open_sources, plan_of_all, write_run, write_sources
from data_service.batches import Batches
from data_service.source import Source

SEED, CONTEXT, GLOBAL_BATCH_SIZE = 1, 1024, 64
SAMPLES = (0, 10**8, 10**9)
EPOCHS = (0, 3)
_ROOT = Path(__file__).resolve().parents[1]
_STEP = 10**8 // GLOBAL_BATCH_SIZE
_ROUNDS, _ROUND_STEPS = 8, 64  # 64 steps of 64: places are found for 4,096 samples at once

OPEN, SEEK, PLACES, RESUME = "open", "seek", "first places", "resume"
PHASES = (OPEN, SEEK, PLACES, RESUME)
MEMORY = "peak memory"


def step_figure(what: str, number: int) -> str:
    """The name of the cost of a batch at so many samples, or in that epoch."""
    return f"batch at {number:.0e} samples" if what == "samples" else f"batch in epoch {number}"


def write_data(folder: Path, **kind: Any) -> None:
    """Write sources as `write_sources` does, and a run whose plan names them all."""
    write_sources(folder / "data", **kind)
    write_run(folder / "run", _batches(open_sources(folder / "data")), [_STEP])


def measured(folder: Path) -> dict[str, float]:
    """The figures of a fresh process."""
    command = [sys.executable, "-m", "benchmarks.data_scale_process", str(folder)]
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def explain_seconds(folder: Path) -> float:
    """How long the command takes to tell all of a step."""
    command = [sys.executable, "-m", "data_service.explain", str(folder / "run")]
    before = time.perf_counter()
    done = subprocess.run(
        [*command, "--step", str(_STEP), "--json"], cwd=_ROOT, stdout=subprocess.PIPE, check=True
    )
    taken = time.perf_counter() - before
    told = json.loads(done.stdout)["sequences"]
    assert len(told) == GLOBAL_BATCH_SIZE and all(one["text"] for one in told)
    return taken


def _batches(sources: dict[str, Source]) -> Batches:
    return Batches(
        plan=plan_of_all(sources),
        sources=sources,
        seed=SEED,
        context=CONTEXT,
        global_batch_size=GLOBAL_BATCH_SIZE,
    )


def _main(folder: Path) -> None:
    found: dict[str, float] = {}
    before = time.perf_counter()

    def lap(figure: str) -> None:
        nonlocal before
        found[figure] = time.perf_counter() - before
        before = time.perf_counter()

    sources = open_sources(folder / "data")
    lap(OPEN)
    batches = _batches(sources)
    batches.counts(_STEP)
    lap(SEEK)
    batches.sample_ids(_STEP)
    lap(PLACES)
    batches.check_cursor(batches.cursor(_STEP))
    lap(RESUME)
    found[MEMORY] = _peak_bytes()

    print(json.dumps({**found, **_batch_seconds(folder)}))


def _batch_seconds(folder: Path) -> dict[str, float]:
    """CPU time of a batch at each position: the mean over a round that verifies no new shard.

    That is the cheapest round. A shard is verified once in a process, at 1.8 GB/s or so. Positions
    take turns, so that a time in which the machine is slow is no position's own.
    """
    epoch = sum(_batches(open_sources(folder / "data")).windows().values())
    positions = {step_figure("samples", samples): samples for samples in SAMPLES}
    positions |= {step_figure("epoch", number): (2 * number + 1) * epoch // 2 for number in EPOCHS}
    steps = {figure: samples // GLOBAL_BATCH_SIZE for figure, samples in positions.items()}
    batches = {figure: _batches(open_sources(folder / "data")) for figure in positions}
    means: dict[str, list[float]] = {figure: [] for figure in positions}
    for _ in range(_ROUNDS):
        for figure, those in batches.items():
            before = time.process_time()
            for _ in range(_ROUND_STEPS):
                those.batch(steps[figure])
                steps[figure] += 1
            means[figure].append((time.process_time() - before) / _ROUND_STEPS)
    return {figure: min(of) for figure, of in means.items()}


def _peak_bytes() -> float:
    """The most memory that this process had, mapped files included (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
