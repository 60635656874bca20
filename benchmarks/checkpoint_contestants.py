"""Ways to save one state to one disk, behind one shape: begin, wait before the update, durable.

Peers are used as their documentation shows, with fsync; `kept` ones are tuned: the stager, and with
it the staging memory, is kept over saves, and staging runs beside training.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import (
    AsyncCheckpointerType,
    AsyncSaveResponse,
    async_save,
    save,
)

from benchmarks.process_saver import ProcessSaver
from checkpointing.group import Solo
from checkpointing.history import Checkpoint
from checkpointing.incarnation import claim_run
from checkpointing.retention import RetentionConfig, retire
from checkpointing.save import Saver, TrainingState
from storage.log import Log
from storage.store import LocalStore

Tensors = Mapping[str, Tensor]


class Contestant(Protocol):
    """One way to save. One save at a time; all calls on the training thread."""

    def begin(self, tensors: Tensors, step: int) -> None:
        """The call that saves, or begins to."""

    def wait_for_copy(self) -> None:
        """Called before the update."""

    def durable_at(self) -> float | None:
        """When the newest save was durable (`time.perf_counter`); None while it is in flight."""

    def finish(self) -> None:
        """Wait until it is durable."""

    def clear(self) -> None:
        """Remove what was saved."""

    def close(self) -> None:
        """End threads and processes."""


class Blocking:
    """A save that returns when all is durable."""

    def __init__(self, folder: Path, write: Callable[[Tensors, Path], object]) -> None:
        self._folder = folder
        self._write = write
        self._durable_at: float | None = None

    def begin(self, tensors: Tensors, step: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write(tensors, self._folder / f"step-{step}")
        self._durable_at = time.perf_counter()

    def wait_for_copy(self) -> None:
        return

    def durable_at(self) -> float | None:
        return self._durable_at

    def finish(self) -> None:
        return

    def clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        return


def torch_save(tensors: Tensors, path: Path) -> None:
    """torch.save, made as durable as the others: the file and its folder are synced."""
    with open(path, "wb") as file:
        torch.save(dict(tensors), file)
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def dcp_save(tensors: Tensors, path: Path) -> None:
    """torch.distributed.checkpoint.save; its FileSystemWriter syncs files (`sync_files=True`)."""
    save(dict(tensors), checkpoint_id=path)


class AsyncSave:
    """torch.distributed.checkpoint.async_save; `kept` keeps the stager and stages beside training.

    Its writer syncs files, as above.
    """

    def __init__(self, folder: Path, kind: AsyncCheckpointerType, *, kept: bool) -> None:
        self._folder = folder
        self._kind = kind
        shared = kind == AsyncCheckpointerType.PROCESS
        self._stager = DefaultStager(StagingOptions(False, shared, True, False)) if kept else None
        self._upload: Future[Any] | None = None
        self._staging: Future[Any] | None = None
        self._durable_at: float | None = None

    def begin(self, tensors: Tensors, step: int) -> None:
        self.finish()
        self._durable_at = None
        answer = async_save(
            dict(tensors),
            checkpoint_id=self._folder / f"step-{step}",
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
        )
        if isinstance(answer, AsyncSaveResponse):
            self._staging, self._upload = answer.staging_completion, answer.upload_completion
        else:
            self._staging, self._upload = None, answer
        self._upload.add_done_callback(self._done)

    def wait_for_copy(self) -> None:
        if self._staging is not None:
            self._staging.result()

    def durable_at(self) -> float | None:
        return self._durable_at

    def finish(self) -> None:
        if self._upload is not None:
            self._upload.result()

    def clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        self.finish()
        if self._stager is not None:
            self._stager.close()

    def _done(self, _: Future[Any]) -> None:
        self._durable_at = time.perf_counter()


class Ours:
    """RangeFlow: a claimed run on a local disk, and its Saver."""

    def __init__(self, folder: Path) -> None:
        self.store = LocalStore(folder)
        self._owner = claim_run(self.store, Log(self.store), body={}, take_over=True)
        self._durable_at: float | None = None
        self._saver = Saver(self.store, self._owner, Solo(), after_commit=self._committed)
        self.newest: Checkpoint | None = None

    def begin(self, tensors: Tensors, step: int) -> None:
        self._durable_at = None
        self._saver.begin(TrainingState(tensors=tensors, exact={"step": step}, extra={}), step=step)

    def wait_for_copy(self) -> None:
        self._saver.wait_for_copy()

    def durable_at(self) -> float | None:
        if self._saver.broken:
            self._saver.finish()  # raises the reason
        return self._durable_at

    def finish(self) -> None:
        self._saver.finish()

    def clear(self) -> None:
        for key in self.store.list("checkpoints/"):
            self.store.delete(key)

    def close(self) -> None:
        self._saver.finish()
        self._saver.__exit__(None, None, None)

    def _committed(self, checkpoint: Checkpoint) -> None:
        self._durable_at = time.perf_counter()
        self.newest = checkpoint
        retire(self.store, self._owner, RetentionConfig())
        self._owner.shorten(lambda: self.store.list("checkpoints/"))


class OursInProcess:
    """The same work, in the benchmark's prototype of a writer in a spawned process."""

    def __init__(self, folder: Path) -> None:
        self._store = LocalStore(folder)
        self._saver = ProcessSaver(folder)

    def begin(self, tensors: Tensors, step: int) -> None:
        self._saver.begin(tensors, step)

    def wait_for_copy(self) -> None:
        self._saver.wait_for_copy()

    def durable_at(self) -> float | None:
        return self._saver.durable_at

    def finish(self) -> None:
        self._saver.finish()

    def clear(self) -> None:
        for key in self._store.list("checkpoints/"):
            self._store.delete(key)

    def close(self) -> None:
        self._saver.close()


TORCH_SAVE = "torch.save"
DCP_SAVE = "dcp.save"
ASYNC_THREAD = "dcp.async_save thread"
ASYNC_PROCESS = "dcp.async_save process"
KEPT_THREAD = "dcp.async_save thread, kept"
KEPT_PROCESS = "dcp.async_save process, kept"
OURS = "rangeflow"
OURS_PROCESS = "rangeflow, process prototype"

MAKERS: dict[str, Callable[[Path], Contestant]] = {
    TORCH_SAVE: lambda folder: Blocking(folder, torch_save),
    DCP_SAVE: lambda folder: Blocking(folder, dcp_save),
    ASYNC_THREAD: lambda f: AsyncSave(f, AsyncCheckpointerType.THREAD, kept=False),
    ASYNC_PROCESS: lambda f: AsyncSave(f, AsyncCheckpointerType.PROCESS, kept=False),
    KEPT_THREAD: lambda f: AsyncSave(f, AsyncCheckpointerType.THREAD, kept=True),
    KEPT_PROCESS: lambda f: AsyncSave(f, AsyncCheckpointerType.PROCESS, kept=True),
    OURS: Ours,
    OURS_PROCESS: OursInProcess,
}
PEERS = (TORCH_SAVE, DCP_SAVE, ASYNC_THREAD, ASYNC_PROCESS, KEPT_THREAD, KEPT_PROCESS)


def make(name: str, folder: Path) -> Contestant:
    """The contestant, saving below a folder of its own."""
    return MAKERS[name](folder / name.replace(" ", "-").replace(",", ""))


def join_world_of_one() -> None:
    """What async_save asks for: a process group, here of one process over gloo."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # for its process's own store
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
