"""The processes of this incarnation: who they are, their device, and what they tell each other."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from launch.elastic import JOB_VARIABLE, VARIABLE
from launch.links import leave, watched_hosts
from storage import errors
from storage.errors import ConfigurationError, RangeFlowError

TIMEOUT = timedelta(minutes=30)
"""How long a collective waits: longer than preparing a corpus or loading a large checkpoint. The
loss of a host is noticed sooner, by `launch.links`."""


class World:
    """This process's place in the world; a `Group` for checkpointing.

    Values travel as JSON over gloo, beside the training collectives.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        job: str,
        *,
        host_ranks: range | None = None,
        place: int = 0,
        control: dist.ProcessGroup | None = None,
    ) -> None:
        """`host_ranks` are those of this process's host, `place` where its hosts met."""
        self.rank = rank
        self.size = size
        self.device = device
        self.job = job
        self.host_ranks = range(size) if host_ranks is None else host_ranks
        self.place = place
        self._control = control
        if control is None and size > 1:
            self._control = dist.new_group(backend="gloo", timeout=TIMEOUT)

    @property
    def one_host(self) -> bool:
        """Whether all processes are on this host."""
        return len(self.host_ranks) == self.size

    def another(self) -> "World":
        """The same processes on a channel of its own, for use by another thread of each."""
        return World(
            self.rank,
            self.size,
            self.device,
            self.job,
            host_ranks=self.host_ranks,
            place=self.place,
        )

    def of_host(self) -> "World":
        """The processes of this host, on a channel of their own. For every process to call."""
        hosts = sorted({tuple(ranks) for ranks in self.gather(list(self.host_ranks))})
        groups = {
            ranks: dist.new_group(list(ranks), backend="gloo", timeout=TIMEOUT)
            for ranks in hosts
            if len(ranks) > 1
        }
        mine = tuple(self.host_ranks)
        return World(
            mine.index(self.rank),
            len(mine),
            self.device,
            self.job,
            place=self.place,
            control=groups.get(mine),
        )

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, to every process."""
        if self._control is None:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        dist.all_gather_into_tensor(sizes, torch.tensor([len(data)]), group=self._control)
        longest = int(sizes.max())
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        everything = torch.empty(self.size * longest, dtype=torch.uint8)
        dist.all_gather_into_tensor(everything, padded, group=self._control)
        parts = everything.view(self.size, longest)
        return [
            json.loads(part[: int(size)].numpy().tobytes())
            for part, size in zip(parts, sizes, strict=True)
        ]

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, to every process."""
        return self.gather(value if self.rank == 0 else None)[0]

    def share(self, place: torch.Tensor, source: int) -> None:
        """Fill `place`, uint8 in CPU memory, on every process with what `source` has in its own."""
        if self._control is not None:
            dist.broadcast(place, group_src=source, group=self._control)

    def on_rank_0(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0, as JSON, on every process; its error is raised on each."""
        outcome: dict[str, Any] = {}
        failure: RangeFlowError | None = None
        if self.rank == 0:
            try:
                outcome = {"value": work()}
            except RangeFlowError as error:
                failure = error
                outcome = {"error": type(error).__name__, "message": str(error)}
        outcome = self.broadcast(outcome)
        if failure is not None:
            raise failure
        if "error" in outcome:
            kind = getattr(errors, outcome["error"], ConfigurationError)
            raise kind(outcome["message"])
        return outcome["value"]


@contextmanager
def joined_world(
    last_word: Callable[[int, Exception], object] = lambda code, error: None,
) -> Iterator[World]:
    """Join the processes that torchrun started, or be a world of one without it.

    `last_word` hears, on another thread, of a host that is lost, before this process ends.
    """
    # cuBLAS is deterministic only with a fixed workspace, read when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    rank = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    job = os.environ.get(JOB_VARIABLE) or os.environ.get("TORCHELASTIC_RUN_ID", "none")
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    place = int(os.environ.get(VARIABLE, "0"))
    with ExitStack() as stack:
        if size > 1:
            backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=TIMEOUT)
            stack.callback(dist.destroy_process_group)
        world = World(rank, size, device, job, place=place)
        local_ranks = world.gather(int(os.environ.get("LOCAL_RANK", "0")))
        world.host_ranks = _of_one_host(rank, local_ranks)
        address = os.environ.get("MASTER_ADDR", "")
        stack.enter_context(watched_hosts(world, address, lambda host: leave(host, last_word)))
        yield world


def _of_one_host(rank: int, local_ranks: Sequence[int]) -> range:
    """The ranks of this rank's host, from the local rank of every rank: 0 begins a host."""
    firsts = [one for one, local in enumerate(local_ranks) if local == 0]
    first = max(one for one in firsts if one <= rank)
    return range(first, min((one for one in firsts if one > rank), default=len(local_ranks)))


def fingerprint(device: torch.device) -> dict[str, str]:
    """What decides bits and is not configuration: the hardware's kind and torch's version."""
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    else:
        kind = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return {"device": kind, "torch": torch.__version__}


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigurationError(
            f"this host has {count} GPUs, and at least {local_rank + 1} processes were asked for: "
            f"give torchrun --nproc_per_node={count}, or set CUDA_VISIBLE_DEVICES= to train on the "
            "CPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
