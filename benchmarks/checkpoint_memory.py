"""Memory that one contestant takes, measured in a process of its own and printed as JSON.

`python -m benchmarks.checkpoint_memory NAME --saves N --size SIZE --folder DIR`. Memory is the
anonymous and shared memory of the process and its descendants, as proportional set sizes: what they
share counts once. Files do not count: not the page cache, and not libraries, whose proportional
size changes with the other programs of the machine.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks.checkpoint_contestants import MAKERS, join_world_of_one, make
from benchmarks.gpt2_training import SIZES, Training

SAMPLE_SECONDS = 0.05


def measured(name: str, *, saves: int, size: str, folder: Path) -> dict[str, Any]:
    """`state_bytes`, `peak_extra_bytes`, and `after_bytes` of each save, above the baseline."""
    command = [sys.executable, "-m", "benchmarks.checkpoint_memory", name]
    flags = [f"--saves={saves}", f"--size={size}", f"--folder={folder}"]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([*command, *flags], cwd=root, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def growth(values: list[float]) -> float:
    """How much more a reading of the last third is than one of the middle third, by save.

    The first third is left out: allocators settle. A third should be many saves: the log's records
    take memory until it is restated (BASE), every fifty saves or so.
    """
    third = len(values) // 3
    middle, last = values[third : 2 * third], values[2 * third :]
    return (statistics.fmean(last) - statistics.fmean(middle)) / third


class Peak:
    """The most memory that this process and its descendants take while it is open."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, memory_bytes())


def memory_bytes(root: int | None = None) -> int:
    """Anonymous and shared memory of a process (this one if none is given) and its descendants."""
    root = os.getpid() if root is None else root
    total = 0
    for process in (root, *descendants(root)):
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            continue  # it ended
        total += sum(
            int(line.split()[1]) * 1024
            for line in text.splitlines()
            if line.startswith(("Pss_Anon:", "Pss_Shmem:"))
        )
    return total


def descendants(process: int) -> Iterator[int]:
    """Processes begun by a process, by those, and so on."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    waiting = list(children.get(process, ()))
    while waiting:
        found = waiting.pop()
        yield found
        waiting += children.get(found, ())


def _main(name: str, saves: int, size: str, folder: Path) -> None:
    torch.set_num_threads(1)
    join_world_of_one()
    training = Training(size)
    contestant = make(name, folder)
    gc.collect()
    baseline = memory_bytes()
    after = []
    with Peak() as peak:
        for step in range(1, saves + 1):
            contestant.begin(training.tensors, step)
            training.forward_backward()
            contestant.wait_for_copy()
            training.update()
            contestant.finish()
            contestant.clear()
            gc.collect()
            after.append(memory_bytes() - baseline)
    contestant.close()
    print(
        json.dumps(
            {
                "state_bytes": training.size_bytes,
                "peak_extra_bytes": peak.bytes - baseline,
                "after_bytes": after,
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(MAKERS))
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    _args = parser.parse_args()
    _main(_args.name, _args.saves, _args.size, _args.folder)
