"""What a start on sources of some size costs, measured in a process of its own, printed as JSON.

`python -m benchmarks.data_scale_process FOLDER`, with what `synthetic_sources.write_sources` wrote.
Times are in seconds, imports not counted, memory in bytes.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.synthetic_sources import open_sources, plan_of_all
from data_service.batches import Batches

SEED, CONTEXT, GLOBAL_BATCH_SIZE = 1, 1024, 64
SAMPLES = (0, 10**8, 10**9)
EPOCHS = (0, 3)
_ROUNDS, _ROUND_STEPS = 8, 64  # 64 steps of 64: places are found for 4,096 samples at once

OPEN, SEEK, PLACES, RESUME = "open", "seek", "first places", "resume"
PHASES = (OPEN, SEEK, PLACES, RESUME)
MEMORY = "peak memory"


def step_figure(what: str, number: int) -> str:
    """The name of the cost of a batch at so many samples, or in that epoch."""
    return f"batch at {number:.0e} samples" if what == "samples" else f"batch in epoch {number}"


def measured(folder: Path) -> dict[str, float]:
    """The figures of a fresh process."""
    command = [sys.executable, "-m", "benchmarks.data_scale_process", str(folder)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _main(folder: Path) -> None:
    found: dict[str, float] = {}
    before = time.perf_counter()

    def lap(figure: str) -> None:
        nonlocal before
        found[figure] = time.perf_counter() - before
        before = time.perf_counter()

    sources = open_sources(folder)
    lap(OPEN)
    batches = Batches(
        plan=plan_of_all(sources),
        sources=sources,
        seed=SEED,
        context=CONTEXT,
        global_batch_size=GLOBAL_BATCH_SIZE,
    )
    step = 10**8 // GLOBAL_BATCH_SIZE
    batches.counts(step)
    lap(SEEK)
    batches.sample_ids(step)
    lap(PLACES)
    batches.check_cursor(batches.cursor(step))
    lap(RESUME)
    found[MEMORY] = _peak_bytes()

    for samples in SAMPLES:
        found[step_figure("samples", samples)] = _batch_seconds(batches, samples)
    for epoch in EPOCHS:
        found[step_figure("epoch", epoch)] = _batch_seconds(
            batches, (2 * epoch + 1) * sum(batches.windows().values()) // 2
        )
    print(json.dumps(found))


def _batch_seconds(batches: Batches, samples: int) -> float:
    """CPU time of a batch near a position: the mean over a round that verifies no new shard.

    That is the cheapest round. A shard is verified once in a process, at 1.8 GB/s or so.
    """
    step = samples // GLOBAL_BATCH_SIZE
    means = []
    for _ in range(_ROUNDS):
        before = time.process_time()
        for _ in range(_ROUND_STEPS):
            batches.batch(step)
            step += 1
        means.append((time.process_time() - before) / _ROUND_STEPS)
    return min(means)


def _peak_bytes() -> float:
    """The most memory that this process had, mapped files included (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
