"""The size of the data: a start and a batch take no work for each shard, and little memory.

Work is counted in calls of functions, which do not depend on the machine; seconds are told by
`benchmarks/data_scale.py`.
"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.data_scale_process import MEMORY, measured
from benchmarks.synthetic_sources import open_sources, plan_of_all, write_sources
from data_service.batches import Batches
from data_service.source import LISTED_SHARDS

FEW, MANY = 2 * LISTED_SHARDS + 100, 60_000
STEP = 10**9 // 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two sources of few shards, and two of many."""
    found = {size: tmp_path_factory.mktemp("sources") for size in (FEW, MANY)}
    for size, folder in found.items():
        write_sources(folder, sources=2, shards=size, shard_tokens=2_000_000)
    return found


def start(folder: Path) -> Batches:
    sources = open_sources(folder)
    return Batches(
        plan=plan_of_all(sources), sources=sources, seed=1, context=1024, global_batch_size=64
    )


def calls(work: Callable[[], object]) -> int:
    """How many functions `work` calls, of Python and of C."""
    count = 0

    def heard(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(heard)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_nothing_is_called_for_each_shard(folders: dict[int, Path]) -> None:
    works: dict[str, Callable[[Batches], object]] = {
        "cursor": lambda batches: batches.check_cursor(batches.cursor(STEP)),
        "places": lambda batches: batches.sample_ids(3 * STEP),
        "validation": lambda batches: batches.validation_rows(8),
        "bookmarks": lambda batches: batches.bookmarks(STEP),
        "uses": lambda batches: list(itertools.islice(batches.uses(STEP), 50)),
        "next use": lambda batches: batches.next_use("source-00", "train-0000007", STEP),
    }
    for size in (FEW, MANY):
        assert calls(lambda: start(folders[size])) < 5_000  # noqa: B023
    few, many, first = (start(folders[size]) for size in (FEW, MANY, FEW))
    for what, work in works.items():
        work(first)  # imports and caches of libraries
        more = calls(lambda: work(many)) - calls(lambda: work(few))  # noqa: B023
        assert more < 5_000, what


def test_the_count_of_calls_sees_a_look_at_each_shard(folders: dict[int, Path]) -> None:
    """A negative control."""
    shards = open_sources(folders[MANY])["source-00"].shards("train")
    assert calls(lambda: [entry.tokens for entry in shards]) > len(shards)


@pytest.mark.soak
def test_a_million_shards_take_less_than_500_megabytes(tmp_path: Path) -> None:
    write_sources(tmp_path / "data", sources=12, shards=1_000_000, shard_tokens=2_000_000)
    assert measured(tmp_path)[MEMORY] < 500e6
