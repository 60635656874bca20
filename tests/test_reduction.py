"""The sum over virtual ranks has the same bits in any number of processes, and needs few buffers.

Here the processes of a world are threads of one, each with a gloo group of its own; processes of
the operating system are in `test_worlds.py`.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.reduction import GradientReducer, Range, hosted_range, subtrees

MOST = 12
"""Virtual ranks up to which every world is tried."""

Parts = Sequence[Tensor]
"""By virtual rank, (length,) float32: what it adds."""

Result = TypeVar("Result")


class Worlds:
    """Worlds of 1 to `most` ranks in this process. A thread is the same rank in all of them."""

    def __init__(self, most: int = MOST) -> None:
        self._threads = [ThreadPoolExecutor(1) for _ in range(most)]
        self._mine = threading.local()
        stores = {size: dist.HashStore() for size in range(2, most + 1)}

        def join(rank: int) -> None:
            self._mine.groups = {
                size: dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=60))
                for size, store in stores.items()
                if rank < size
            }

        self._on_ranks(most, join)

    def close(self) -> None:
        """End the groups, which takes gloo a while for each, at the same time."""
        self._on_ranks(len(self._threads), lambda rank: self._mine.groups.clear())
        for thread in self._threads:
            thread.shutdown()

    def run(self, size: int, work: Callable[[int], Result]) -> list[Result]:
        """What `work(rank)` gives on every rank of a world."""

        def in_world(rank: int) -> Result:
            self._mine.group = self._mine.groups.get(size)
            return work(rank)

        with (
            patch.object(dist, "all_to_all_single", self._all_to_all_single),
            patch.object(dist, "all_gather_into_tensor", self._all_gather_into_tensor),
            patch.object(dist, "all_reduce", self._all_reduce),
        ):
            return self._on_ranks(size, in_world)

    def _on_ranks(self, size: int, work: Callable[[int], Result]) -> list[Result]:
        jobs = [self._threads[rank].submit(work, rank) for rank in range(size)]
        return [job.result() for job in jobs]

    def _all_to_all_single(
        self, received: Tensor, sent: Tensor, counts: list[int], own: list[int]
    ) -> None:
        self._mine.group.alltoall_base(received, sent, counts, own).wait()

    def _all_gather_into_tensor(self, result: Tensor, part: Tensor) -> None:
        self._mine.group._allgather_base(result, part).wait()

    def _all_reduce(self, vector: Tensor) -> None:
        self._mine.group.allreduce([vector]).wait()


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    made = Worlds()
    yield made
    made.close()


def parts_of(virtual_ranks: int, length: int, seed: int) -> list[Tensor]:
    """Numbers of many magnitudes, so that the order of additions shows."""
    generator = torch.Generator().manual_seed(seed)
    shape = (virtual_ranks, length)
    sizes = torch.randint(-12, 12, shape, generator=generator)
    return list(torch.ldexp(torch.randn(shape, generator=generator), sizes))


def reducer_of(parts: Parts, rank: int, size: int, *, exact: bool = True) -> GradientReducer:
    return GradientReducer(
        len(parts[0]),
        virtual_ranks=len(parts),
        rank=rank,
        size=size,
        device=torch.device("cpu"),
        exact=exact,
    )


def adding(parts: Parts) -> Callable[[int, Tensor], None]:
    def accumulate(virtual_rank: int, vector: Tensor) -> None:
        vector[: len(parts[0])] += parts[virtual_rank]

    return accumulate


def sums(worlds: Worlds, parts: Parts, size: int, *, exact: bool = True) -> list[Tensor]:
    """The sum as every rank of a world has it."""

    def work(rank: int) -> Tensor:
        return reducer_of(parts, rank, size, exact=exact).reduce(adding(parts))[: len(parts[0])]

    return worlds.run(size, work)


def tree(parts: Parts) -> Tensor:
    """The definition: halves added up, each by the same rule."""
    mid = len(parts) // 2
    return parts[0] if mid == 0 else tree(parts[:mid]) + tree(parts[mid:])


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("virtual_ranks", range(1, MOST + 1))
def test_every_world_has_the_bits_of_the_tree(worlds: Worlds, virtual_ranks: int) -> None:
    parts = parts_of(virtual_ranks, 37, seed=virtual_ranks)
    expected = tree(parts)
    for size in range(1, virtual_ranks + 1):
        assert all(same_bits(found, expected) for found in sums(worlds, parts, size)), size


@settings(max_examples=60, deadline=None)
@given(data=st.data(), length=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_any_length_and_world_has_the_bits_of_one_process(
    worlds: Worlds, data: st.DataObject, length: int, seed: int
) -> None:
    virtual_ranks = data.draw(st.integers(1, MOST), label="virtual_ranks")
    size = data.draw(st.integers(1, virtual_ranks), label="size")
    parts = parts_of(virtual_ranks, length, seed)
    [alone] = sums(worlds, parts, 1)
    assert all(same_bits(found, alone) for found in sums(worlds, parts, size))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("virtual_ranks", "size"), [(1, 1), (8, 1), (8, 3), (12, 5)])
def test_the_sum_is_the_sum(worlds: Worlds, virtual_ranks: int, size: int, exact: bool) -> None:
    parts = parts_of(virtual_ranks, 101, seed=9)
    reference = torch.stack(list(parts)).double().sum(dim=0)
    # At most 12 roundings, each of a partial sum that is at most the sum of the magnitudes.
    error = 12 * 2.0**-24 * torch.stack(list(parts)).abs().double().sum(dim=0)
    for found in sums(worlds, parts, size, exact=exact):
        assert ((found.double() - reference).abs() <= error).all()


def test_without_the_tree_the_number_of_processes_shows(worlds: Worlds) -> None:
    """Negative control: `fast` adds what a process hosts in order, and then the processes."""
    parts = parts_of(8, 37, seed=3)
    found = {
        tuple(sums(worlds, parts, size, exact=False)[0].view(torch.int32).tolist())
        for size in (1, 2, 4)
    }
    assert len(found) == 3


def test_fast_alone_is_a_fold_from_the_left(worlds: Worlds) -> None:
    parts = parts_of(8, 37, seed=3)
    fold = torch.zeros(37)
    for part in parts:
        fold = fold + part
    [found] = sums(worlds, parts, 1, exact=False)
    assert same_bits(found, fold)
    assert not same_bits(found, tree(parts))


@settings(deadline=None)
@given(virtual_ranks=st.integers(1, 100), data=st.data())
def test_processes_host_every_virtual_rank_once_and_none_is_idle(
    virtual_ranks: int, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, virtual_ranks))
    hosted = [hosted_range(rank, size, virtual_ranks) for rank in range(size)]
    assert [v for lo, hi in hosted for v in range(lo, hi)] == list(range(virtual_ranks))
    counts = [hi - lo for lo, hi in hosted]
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1


def nodes(node: Range) -> set[Range]:
    """All nodes of the tree below one, itself included."""
    lo, hi = node
    mid = (lo + hi) // 2
    below = nodes((lo, mid)) | nodes((mid, hi)) if hi - lo > 1 else set()
    return {node} | below


@settings(deadline=None)
@given(virtual_ranks=st.integers(1, 64), data=st.data())
def test_subtrees_are_the_fewest_nodes_that_cover_a_range_once(
    virtual_ranks: int, data: st.DataObject
) -> None:
    lo = data.draw(st.integers(0, virtual_ranks))
    hi = data.draw(st.integers(lo, virtual_ranks))
    whole = (0, virtual_ranks)
    found = subtrees((lo, hi), whole)
    assert [v for a, b in found for v in range(a, b)] == list(range(lo, hi))
    everything = nodes(whole)
    assert set(found) <= everything
    inside = {(a, b) for a, b in everything if lo <= a and b <= hi}
    contained = {n for n in inside for m in inside if n != m and m[0] <= n[0] and n[1] <= m[1]}
    assert set(found) == inside - contained


@pytest.mark.parametrize("virtual_ranks", [1, 2, 3, 4, 7, 8, 12, 31, 64, 100])
def test_a_process_alone_needs_a_vector_for_each_level_of_the_tree(virtual_ranks: int) -> None:
    parts = parts_of(virtual_ranks, 11, seed=1)
    reducer = reducer_of(parts, 0, 1)
    vectors: dict[int, Tensor] = {}  # held, so that no address is used twice

    def accumulate(virtual_rank: int, vector: Tensor) -> None:
        assert not vector.any()
        vectors[vector.data_ptr()] = vector
        adding(parts)(virtual_rank, vector)

    for _ in range(3):
        total = reducer.reduce(accumulate)
        assert same_bits(total[:11], tree(parts))
        reducer.release(total)
    assert len(vectors) <= math.log2(virtual_ranks) + 2


@pytest.mark.parametrize("size", [2, 3, 5, 12])
def test_a_process_of_a_world_uses_its_vectors_again(worlds: Worlds, size: int) -> None:
    parts = parts_of(12, 11, seed=1)
    counts = []

    def work(rank: int) -> Tensor:
        reducer = reducer_of(parts, rank, size)
        vectors: dict[int, Tensor] = {}

        def accumulate(virtual_rank: int, vector: Tensor) -> None:
            assert not vector.any()
            vectors[vector.data_ptr()] = vector
            adding(parts)(virtual_rank, vector)

        for _ in range(3):
            total = reducer.reduce(accumulate)
            reducer.release(total)
        counts.append(len(vectors))
        return total[:11]

    for found in worlds.run(size, work):
        assert same_bits(found, tree(parts))
    assert max(counts) <= math.log2(12) + 2


@settings(deadline=None)
@given(length=st.integers(0, 1000), size=st.integers(1, 16))
def test_a_vector_is_cut_into_equal_slices(length: int, size: int) -> None:
    reducer = GradientReducer(
        length, virtual_ranks=16, rank=0, size=size, device=torch.device("cpu"), exact=True
    )
    assert reducer.length % size == 0
    assert length <= reducer.length < length + size


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_the_exchange_is_announced_after_all_own_parts(
    worlds: Worlds, size: int, exact: bool
) -> None:
    parts = parts_of(6, 5, seed=0)
    heard: list[list[str]] = [[] for _ in range(size)]

    def work(rank: int) -> Tensor:
        def accumulate(virtual_rank: int, vector: Tensor) -> None:
            heard[rank].append(str(virtual_rank))

        return reducer_of(parts, rank, size, exact=exact).reduce(accumulate, heard[rank].append)

    worlds.run(size, work)
    for rank in range(size):
        own = [str(v) for v in range(*hosted_range(rank, size, 6))]
        assert heard[rank] == [*own, "reduce"]
