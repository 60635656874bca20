"""What checkpointing asks of the processes that share a run: say something, hear everybody."""

from typing import Any, Protocol

import torch


class Group(Protocol):
    """The processes of one incarnation. Every process must make the same calls in the same order.

    Values are JSON. `checkpointing` knows no collectives: `launch` passes them in.
    """

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, to every process."""

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, to every process."""

    def share(self, place: torch.Tensor, source: int) -> None:
        """Fill `place`, uint8 in CPU memory, on every process with what `source` has in its own."""


class Solo:
    """A group of one process."""

    rank = 0
    size = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def share(self, place: torch.Tensor, source: int) -> None:
        return None
