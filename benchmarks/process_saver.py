"""Prototype: the writer in a spawned process, to measure against the product's writer thread.

The arena lies in memory that both processes map. The parent copies; the child claims the run and
does the product's own `write` (digests, objects, COMMIT): the same work, in another place.
Does not cover: errors, several ranks, GPUs (memory pinned here is not pinned there).
"""

import json
import mmap
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from checkpointing.group import Solo
from checkpointing.incarnation import claim_run
from checkpointing.layout import ObjectLayout, share, specs_of
from checkpointing.snapshot import Arena, Snapshot
from checkpointing.write import Around, Job, write
from storage.log import Log
from storage.store import LocalStore

_PAGE = 4096


class SharedArena(Arena):
    """An arena in a memory file that two processes map."""

    def __init__(self, objects: Sequence[ObjectLayout], descriptor: int | None = None) -> None:
        self.objects = tuple(objects)
        sizes = [-(-one.size_bytes // _PAGE) * _PAGE for one in objects]
        self._starts = [sum(sizes[:number]) for number in range(len(sizes))]
        is_parent = descriptor is None
        self.descriptor = os.memfd_create("arena") if descriptor is None else descriptor
        if is_parent:
            os.ftruncate(self.descriptor, sum(sizes))
        mapped = mmap.mmap(self.descriptor, sum(sizes))
        self._memory = torch.frombuffer(mapped, dtype=torch.uint8)
        self._making_ready = threading.Lock()
        self._ready = not is_parent


class ProcessSaver:
    """Saves as `Saver` does, with everything after the copy in another process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._copier = ThreadPoolExecutor(1)
        self._copying: Snapshot | None = None
        self._arena: SharedArena | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: threading.Thread | None = None
        self.durable_at: float | None = None

    def begin(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Start the copy; the child begins when it is there."""
        if self._arena is None:
            self._start(tensors)
        assert self._arena is not None
        self.durable_at = None
        self._copying = Snapshot(self._arena, tensors, self._copier, compare=False)
        self._watcher = threading.Thread(target=self._watch, args=(self._copying, step))
        self._watcher.start()

    def wait_for_copy(self) -> None:
        """Wait until the state may change."""
        if self._copying is not None:
            self._copying.wait()
            self._copying = None

    def finish(self) -> None:
        """Wait until the save in flight is durable."""
        if self._watcher is not None:
            self._watcher.join()

    def close(self) -> None:
        """End the child."""
        self.finish()
        self._copier.shutdown()
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def _start(self, tensors: Mapping[str, Tensor]) -> None:
        objects = share(specs_of(tensors), 0, 1)
        self._arena = SharedArena(objects)
        descriptor = self._arena.descriptor
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.process_saver", str(self._folder), str(descriptor)],
            cwd=Path(__file__).resolve().parents[1],
            pass_fds=(descriptor,),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        pickle.dump((specs_of(tensors), objects), self._process.stdin)
        self._process.stdin.flush()
        self._process.stdout.readline()  # it is ready

    def _watch(self, copying: Snapshot, step: int) -> None:
        """Tell the child that the copy is there; hear when it has committed."""
        copying.finished()
        assert self._process is not None
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{step}\n".encode())
        self._process.stdin.flush()
        self.durable_at = float(json.loads(self._process.stdout.readline()))


class _Copied:
    """A snapshot that the other process has finished."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena

    def finished(self) -> None:
        return

    def fingerprints(self) -> dict[str, int]:
        return {}


def _main(folder: Path, descriptor: int) -> None:
    """The child: one line of standard input is one save, one line of output its end."""
    specs, objects = pickle.load(sys.stdin.buffer)  # noqa: S301, from the parent
    arena = SharedArena(objects, descriptor)
    store = LocalStore(folder)
    incarnation = claim_run(store, Log(store), body={}, take_over=True)
    around = Around(
        announce=lambda phase: None,
        before_commit=lambda: None,
        failing=lambda reason: print(reason, file=sys.stderr),
        give_up=threading.Event(),
    )
    print("ready", flush=True)
    for line in _lines():
        job = Job(
            step=int(line),
            snapshot=cast(Snapshot, _Copied(arena)),
            specs=specs,
            exact={"step": int(line)},
            extra={},
            cursor=None,
            parent=None,
            healthy=True,
            validation_loss=None,
        )
        write(store, incarnation, Solo(), job, around)
        print(time.perf_counter(), flush=True)


def _lines() -> Iterator[str]:
    for line in sys.stdin.buffer:
        yield line.decode()


if __name__ == "__main__":
    torch.set_num_threads(1)
    _main(Path(sys.argv[1]), int(sys.argv[2]))
