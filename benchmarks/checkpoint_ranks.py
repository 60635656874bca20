"""Under torchrun: how long until every rank has the state, reading it all or 1/N and broadcasting.

`torchrun --nproc_per_node=2 -m benchmarks.checkpoint_ranks RUN REPEATS ANSWER.json`. From a disk
the product does the first, from a bucket the second.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.checkpoint_loading import prepare_cache
from checkpointing.history import Checkpoint, history
from checkpointing.load import load, spread
from storage.log import Log
from storage.store import LocalStore


def read_all(store: LocalStore, checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """Each rank reads and verifies everything."""
    return load(store, checkpoint).tensors


def read_share_and_broadcast(store: LocalStore, checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """Each rank reads and verifies every Nth object, and sends its pieces to the others."""
    loaded = load(store, checkpoint, rank=dist.get_rank(), size=dist.get_world_size())
    spread(loaded, Peers())
    return loaded.tensors


class Peers:
    """The ranks, as `checkpointing` sees them."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]

    def share(self, place: Tensor, source: int) -> None:
        dist.broadcast(place, src=source)


WAYS: dict[str, Callable[[LocalStore, Checkpoint], Mapping[str, Tensor]]] = {
    "each reads all": read_all,
    "1/2 and broadcast": read_share_and_broadcast,
}


def _main(place: Path, repeats: int, answer: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    store = LocalStore(place)
    checkpoint = history(Log(store).refresh()).live[-1]
    seconds: dict[str, dict[str, list[float]]] = {
        cache: {way: [] for way in WAYS} for cache in ("warm", "cold")
    }
    for number in range(repeats + 1):
        for cache in seconds:
            for way in list(WAYS)[:: -1 if number % 2 else 1]:
                if dist.get_rank() == 0:
                    prepare_cache(place, cache)
                dist.barrier()
                begun = time.perf_counter()
                tensors = WAYS[way](store, checkpoint)
                dist.barrier()
                if number:  # the first round warms up
                    seconds[cache][way].append(time.perf_counter() - begun)
                del tensors
    if dist.get_rank() == 0:
        answer.write_text(json.dumps(seconds))
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
