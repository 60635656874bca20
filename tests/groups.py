"""Groups of ranks in one process, one thread a rank, for code that takes a `Group`."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class ThreadGroup:
    """One rank of a group whose other ranks are threads."""

    def __init__(self, rank: int, size: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.size = size
        self._slots = slots
        self._barrier = barrier

    def gather(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait(60)
        values = list(self._slots)
        self._barrier.wait(60)
        return values

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]

    def share(self, place: torch.Tensor, source: int) -> None:
        place.copy_(self.gather(place.clone())[source])


def on_ranks(size: int, work: Callable[[ThreadGroup], Result]) -> list[Result | Exception]:
    """What `work` returned or raised on each rank."""
    slots: list[Any] = [None] * size
    barrier = threading.Barrier(size)

    def one(rank: int) -> Result | Exception:
        try:
            return work(ThreadGroup(rank, size, slots, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
