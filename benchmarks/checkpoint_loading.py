"""How long loading takes: ours, every byte verified, beside torch.load; alone and by two ranks."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.checkpoint_contestants import Ours, torch_save
from benchmarks.gpt2_training import Training
from benchmarks.measuring import Row, rotated
from checkpointing.history import history
from checkpointing.load import load
from storage.log import Log
from storage.store import LocalStore

IN_PLACE = "load and put in place"
OURS_LOAD = "rangeflow, verified"
TORCH_LOAD = "torch.load"
MMAP_LOAD = "torch.load(mmap=True), touched"


def loading_rows(training: Training, folder: Path, repeats: int) -> list[Row]:
    """Loads of the same state, interleaved, from the page cache and from the disk."""
    file, place = folder / "torch-save.pt", folder / "run"
    torch_save(training.tensors, file)
    store = saved_run(training.tensors, place)
    checkpoint = history(Log(store).refresh()).live[-1]
    ways: dict[str, Callable[[], Mapping[str, Tensor]]] = {
        TORCH_LOAD: lambda: torch.load(file, weights_only=True),
        MMAP_LOAD: lambda: _touched(torch.load(file, weights_only=True, mmap=True)),
        OURS_LOAD: lambda: load(store, checkpoint).tensors,
    }
    seconds: dict[tuple[str, str], list[float]] = {}
    state = {name: tensor.clone() for name, tensor in training.tensors.items()}
    names = list(ways)
    for number in range(repeats + 1):
        for cache in ("warm", "cold"):
            for name in rotated(names, number):
                print(f"load {number} of {repeats}: {cache}, {name}", file=sys.stderr)
                prepare_cache(folder, cache)
                begun = time.perf_counter()
                tensors = ways[name]()
                loaded = time.perf_counter()
                for key, own in state.items():
                    own.copy_(tensors[key])
                ended = time.perf_counter()
                if number == 0:  # checks, and is not counted
                    assert all(torch.equal(tensors[n], t) for n, t in training.tensors.items())
                else:
                    seconds.setdefault((f"load, {cache}", name), []).append(loaded - begun)
                    figure = f"{IN_PLACE}, {cache}"
                    seconds.setdefault((figure, name), []).append(ended - begun)
                del tensors
    return [
        Row(
            figure=figure,
            contestant=name,
            values=tuple(values),
            unit="s",
            against=TORCH_LOAD,
        )
        for (figure, name), values in sorted(seconds.items(), reverse=True)
    ]


def ranks_rows(size: str, folder: Path, repeats: int) -> list[Row]:
    """Two ranks under torchrun and gloo: each reads everything, or 1/2 and broadcasts."""
    place = folder / "run"
    if not place.exists():
        saved_run(Training(size).tensors, place)
    answer = folder / "ranks.json"
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *("-m", "benchmarks.checkpoint_ranks", str(place), str(repeats), str(answer)),
        ],
        cwd=Path(__file__).resolve().parents[1],
        stdout=sys.stderr,
        check=True,
    )
    found: dict[str, dict[str, list[float]]] = json.loads(answer.read_text())
    return [
        Row(
            figure=f"load by 2 ranks, {cache}",
            contestant=way,
            values=tuple(values),
            unit="s",
            against="each reads all",
        )
        for cache, ways in found.items()
        for way, values in ways.items()
    ]


def saved_run(tensors: Mapping[str, Tensor], place: Path) -> LocalStore:
    """A run with one committed checkpoint."""
    ours = Ours(place)
    ours.begin(tensors, 1)
    ours.close()
    return ours.store


def prepare_cache(folder: Path, cache: str) -> None:
    """Bring every file below the folder into the page cache, or out of it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                if cache == "cold":
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                else:
                    while file.read(2**24):
                        pass


def _touched(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors, with every byte read."""
    for tensor in tensors.values():
        tensor.sum()
    return tensors
