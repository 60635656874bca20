"""Adds the gradients of virtual ranks along one fixed tree, whatever the number of processes.

Share v of the global batch is virtual rank v's. The tree halves [0, V) at its midpoint down to
single virtual ranks; a sum over [lo, hi) is always sum[lo, mid) + sum[mid, hi). A process hosts a
range of virtual ranks and adds the largest subtrees inside it; the processes exchange slices of
those subtrees' sums, finish the tree on their slice, and gather the slices.

Covers: 1 to V processes give the same bits, also 3 or 5.
Does not cover: `fast`, which adds each process's gradients in order and all-reduces them.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Range = tuple[int, int]


def hosted_range(rank: int, size: int, virtual_ranks: int) -> Range:
    """The virtual ranks [lo, hi) of a process."""
    return rank * virtual_ranks // size, (rank + 1) * virtual_ranks // size


def subtrees(inside: Range, node: Range) -> list[Range]:
    """The largest nodes of the tree under `node` that lie inside a range, from left to right."""
    lo, hi = node
    if hi <= inside[0] or lo >= inside[1]:
        return []
    if inside[0] <= lo and hi <= inside[1]:
        return [node]
    mid = (lo + hi) // 2
    return subtrees(inside, (lo, mid)) + subtrees(inside, (mid, hi))


class GradientReducer:
    """Sums one flat float32 vector per virtual rank over all processes.

    `accumulate(v, vector)` adds virtual rank v's part into a zeroed vector; with `fast`, into that
    of the virtual ranks before it. `length` counts what is added: the gradient, and what rides
    behind it. Not thread-safe; all processes of the world call `reduce` together.
    """

    def __init__(
        self,
        length: int,
        *,
        virtual_ranks: int,
        rank: int,
        size: int,
        device: torch.device,
        exact: bool,
    ) -> None:
        self._slice = -(-length // size)
        self._virtual_ranks = virtual_ranks
        self._rank = rank
        self._size = size
        self._device = device
        self._exact = exact
        self._free: list[Tensor] = []

    @property
    def length(self) -> int:
        """Elements of a vector: what is added, then padding."""
        return self._slice * self._size

    def reduce(
        self,
        accumulate: Callable[[int, Tensor], None],
        announce: Callable[[str], None] = lambda phase: None,
    ) -> Tensor:
        """The sum over all virtual ranks, `(length,)` float32. Give it back with `release`."""
        inside = hosted_range(self._rank, self._size, self._virtual_ranks)
        if not self._exact:
            return self._reduce_fast(accumulate, inside, announce)
        whole = (0, self._virtual_ranks)
        roots = [(node, self._subtree(accumulate, node)) for node in subtrees(inside, whole)]
        announce("reduce")
        if self._size == 1:
            return roots[0][1]
        return self._finish(roots)

    def release(self, vector: Tensor) -> None:
        """Let the vector be used again."""
        self._free.append(vector)

    def _subtree(self, accumulate: Callable[[int, Tensor], None], node: Range) -> Tensor:
        lo, hi = node
        if hi - lo == 1:
            vector = self._take()
            accumulate(lo, vector)
            return vector
        mid = (lo + hi) // 2
        left = self._subtree(accumulate, (lo, mid))
        right = self._subtree(accumulate, (mid, hi))
        left += right
        self.release(right)
        return left

    def _finish(self, roots: Sequence[tuple[Range, Tensor]]) -> Tensor:
        """Exchange slices of the roots, finish the tree on one's own, gather all slices."""
        whole = (0, self._virtual_ranks)
        nodes = [
            subtrees(hosted_range(rank, self._size, self._virtual_ranks), whole)
            for rank in range(self._size)
        ]
        sent = torch.stack([vector.view(self._size, self._slice) for _, vector in roots], dim=1)
        counts = [len(of_rank) * self._slice for of_rank in nodes]
        received = torch.empty(sum(counts), device=self._device)
        own = [len(roots) * self._slice] * self._size
        dist.all_to_all_single(received, sent.view(-1), counts, own)
        sums = dict(
            zip(
                [node for of_rank in nodes for node in of_rank],
                received.view(-1, self._slice).unbind(0),
                strict=True,
            )
        )
        finished = _complete(sums, whole)
        result = roots[0][1]
        dist.all_gather_into_tensor(result, finished.contiguous())
        for _, vector in roots[1:]:
            self.release(vector)
        return result

    def _reduce_fast(
        self,
        accumulate: Callable[[int, Tensor], None],
        inside: Range,
        announce: Callable[[str], None],
    ) -> Tensor:
        vector = self._take()
        for virtual_rank in range(*inside):
            accumulate(virtual_rank, vector)
        announce("reduce")
        if self._size > 1:
            dist.all_reduce(vector)
        return vector

    def _take(self) -> Tensor:
        if self._free:
            return self._free.pop().zero_()
        return torch.zeros(self.length, dtype=torch.float32, device=self._device)


def _complete(sums: dict[Range, Tensor], node: Range) -> Tensor:
    """The sum of a node, from the sums of nodes that cover it."""
    if node in sums:
        return sums[node]
    lo, hi = node
    mid = (lo + hi) // 2
    return _complete(sums, (lo, mid)) + _complete(sums, (mid, hi))
