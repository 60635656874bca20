"""Under torchrun: how long until every rank has the state, reading it all or 1/N and broadcasting.

`torchrun --nproc_per_node=2 -m benchmarks.checkpoint_ranks RUN REPEATS ANSWER.json`. The second
way is a prototype on `checkpointing.load`'s parts: it is here to be measured.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.checkpoint_loading import prepare_cache
from checkpointing import load as loading
from checkpointing.history import Checkpoint, history
from checkpointing.snapshot import flat_bytes
from storage.log import Log
from storage.store import LocalStore


def read_all(store: LocalStore, checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """Each rank reads and verifies everything."""
    return loading.load(store, checkpoint).tensors


def read_share_and_broadcast(store: LocalStore, checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """Each rank reads and verifies every Nth object, and sends its pieces to the others."""
    manifest = loading.read_manifest(store, checkpoint)
    specs, layouts = loading._plan(manifest, checkpoint.manifest_key)
    tensors = {name: loading._empty(spec) for name, spec in specs.items()}
    places = {name: flat_bytes(tensor) for name, tensor in tensors.items()}
    keys, rank, size = list(layouts), dist.get_rank(), dist.get_world_size()

    def read(key: str) -> None:
        loading._read_object(store, key, layouts[key], places, manifest["tensors"])

    with ThreadPoolExecutor(4) as pool:
        reading = {key: pool.submit(read, key) for key in keys[rank::size]}
        for number, key in enumerate(keys):
            if key in reading:
                reading[key].result()
            for piece in layouts[key].pieces:
                place = places[piece.tensor][piece.start : piece.stop]
                dist.broadcast(place, src=number % size)
    return tensors


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
