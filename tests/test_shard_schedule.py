"""Real batches through the cache: the same rows as from local files, and few downloads."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_service.batches import Batches
from data_service.cache import Cache
from data_service.cache_folder import CacheFolder
from data_service.loader import Loader
from data_service.plan import Plan
from data_service.shard_schedule import ShardSchedule
from data_service.source import Source, open_source
from storage.errors import ConfigurationError
from storage.store import LocalStore
from tests.faulty_store import FaultyStore
from tests.made_sources import plan_of, segment_of, write_source

CONTEXT = 16
BATCH = 8


class Remote:
    """A source of which the same is there as local files, and as a place that counts reads."""

    def __init__(self, folder: Path, name: str, train: Sequence[int], **options: object) -> None:
        url = write_source(folder / name, train=train, **options)  # type: ignore[arg-type]
        self.name = name
        self.local = open_source(name, url)
        self.store = FaultyStore(LocalStore(folder / name))

    def cached(self, cache: Cache) -> Source:
        return open_source(self.name, self.local.url, store=self.store, cache=cache)

    def downloads(self) -> list[str]:
        keys = [op.key for op in self.store.operations if op.name == "get"]
        return [key for key in keys if key.startswith("train") and key.endswith(".npy")]


def batches_of(plan: Plan, sources: Sequence[Source], lanes: int = 4) -> Batches:
    return Batches(
        plan=plan,
        sources={source.name: source for source in sources},
        seed=3,
        context=CONTEXT,
        global_batch_size=BATCH,
        lanes=lanes,
    )


def read_both(cache: Cache, expected: Batches, cached: Batches, steps: int) -> None:
    """The same rows and masks at every step, through a loader."""
    halves = [(BATCH // 2, BATCH), (0, BATCH // 2)]
    with (
        Loader(expected, halves, start_step=0) as local,
        Loader(cached, halves, start_step=0, before_step=cache.at) as remote,
    ):
        for step in range(steps):
            one, other = local.next(step), remote.next(step)
            assert np.array_equal(one.tokens, other.tokens)
            assert (one.learn is None) == (other.learn is None)
            if one.learn is not None and other.learn is not None:
                assert np.array_equal(one.learn, other.learn)


def shard_bytes(source: Source) -> int:
    return max(entry.bytes for entry in source.shards("train"))


def steps_of_epochs(batches: Batches, epochs: int) -> int:
    return epochs * sum(batches.windows().values()) // BATCH


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_same_rows_within_the_limit_with_few_downloads(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("made")
    sizes = data.draw(st.lists(st.integers(300, 2500), min_size=2, max_size=12))
    lanes = data.draw(st.integers(1, 4))
    remote = Remote(folder, "web", sizes)
    plan = plan_of([remote.local])
    expected = batches_of(plan, [remote.local], lanes)
    minimum = remote.local.shards("train").shard_bytes
    minimum = int(np.sort(minimum)[-lanes:].sum() + minimum.max())
    few_more = data.draw(st.integers(3, 5)) * shard_bytes(remote.local)
    cache_folder = CacheFolder(folder / "cache", limit_bytes=minimum + few_more)
    epochs = data.draw(st.integers(1, 3))
    with Cache(cache_folder) as cache:
        source = remote.cached(cache)
        cached = batches_of(plan, [source], lanes)
        cache.follow(ShardSchedule(cached), 0)
        read_both(cache, expected, cached, steps_of_epochs(expected, epochs))
        assert cache_folder.used_bytes() <= cache_folder.limit_bytes
    assert len(remote.downloads()) <= (epochs + 1) * (len(sizes) + lanes)  # looks an epoch ahead


def test_at_the_very_minimum_the_rows_are_the_same_and_below_it_is_refused(tmp_path: Path) -> None:
    remote = Remote(tmp_path, "web", [1000] * 9)
    plan = plan_of([remote.local])
    expected = batches_of(plan, [remote.local])
    minimum = 5 * shard_bytes(remote.local)
    with Cache(CacheFolder(tmp_path / "cache", limit_bytes=minimum)) as cache:
        source = remote.cached(cache)
        cached = batches_of(plan, [source])
        cache.follow(ShardSchedule(cached), 0)
        read_both(cache, expected, cached, steps_of_epochs(expected, 3))
    with (
        Cache(CacheFolder(tmp_path / "cache", limit_bytes=minimum - 1)) as cache,
        pytest.raises(ConfigurationError, match=f"must be at least {minimum:,} bytes"),
    ):
        cache.follow(ShardSchedule(cached), 0)


def test_room_is_asked_for_the_largest_shard_of_held_out_text_too(tmp_path: Path) -> None:
    remote = Remote(tmp_path, "web", [1000] * 3, validation=(9000,))
    (held_out,) = remote.local.shards("validation")
    minimum = 3 * shard_bytes(remote.local) + held_out.bytes
    with Cache(CacheFolder(tmp_path / "cache", limit_bytes=minimum)) as cache:
        cached = batches_of(plan_of([remote.local]), [remote.cached(cache)])
        assert ShardSchedule(cached).minimum_bytes == minimum
        assert len(cached.validation_rows(10)["web"]) == 10


def test_local_sources_need_no_room_and_are_left_out(tmp_path: Path) -> None:
    remote = Remote(tmp_path, "web", [1000] * 9)
    local = open_source("books", write_source(tmp_path / "books", train=[1500] * 3, start=9))
    plan = plan_of([remote.local, local])
    with Cache(CacheFolder(tmp_path / "cache", limit_bytes=10**6)) as cache:
        source = remote.cached(cache)
        same = open_source("books", local.url, cache=cache)
        assert not same.is_cached
        cached = batches_of(plan, [source, same])
        schedule = ShardSchedule(cached)
        assert schedule.minimum_bytes == 5 * shard_bytes(remote.local)
        first = list(itertools.islice(schedule.uses(0), 30))
        assert {remote.source for _, remote in first} == {"web"}
        cache.follow(schedule, 0)
        read_both(cache, batches_of(plan, [remote.local, local]), cached, 40)


def test_a_plan_that_leaves_the_remote_source_ends_the_uses(tmp_path: Path) -> None:
    remote = Remote(tmp_path, "web", [1000] * 3)
    local = open_source("books", write_source(tmp_path / "books", train=[1500] * 3, start=9))
    plan = Plan(segments=(segment_of([remote.local]), segment_of([local], from_step=5)))
    with Cache(CacheFolder(tmp_path / "cache", limit_bytes=10**6)) as cache:
        source = remote.cached(cache)
        batches = batches_of(plan, [source, local])
        uses = list(ShardSchedule(batches).uses(0))
    assert uses and all(remote.source == "web" for _, remote in uses)


def test_loss_masks_come_through_the_cache(tmp_path: Path) -> None:
    remote = Remote(tmp_path, "chat", [1000] * 6, masked=True)
    plan = plan_of([remote.local])
    with Cache(CacheFolder(tmp_path / "cache", limit_bytes=10**6)) as cache:
        source = remote.cached(cache)
        cached = batches_of(plan, [source])
        cache.follow(ShardSchedule(cached), 0)
        read_both(cache, batches_of(plan, [remote.local]), cached, 40)
    assert len(remote.downloads()) == 12


def test_what_an_earlier_start_left_is_recognised(tmp_path: Path) -> None:
    remote = Remote(tmp_path, "web", [1000] * 6)
    plan = plan_of([remote.local])
    with Cache(CacheFolder(tmp_path / "cache", limit_bytes=10**6)) as cache:
        source = remote.cached(cache)
        schedule = ShardSchedule(batches_of(plan, [source]))
        entry = remote.local.shards("train")[4]
        assert schedule.next_use(entry.sha256, 0) is None
        schedule.recognise([entry.sha256, "0" * 64])
        assert schedule.next_use(entry.sha256, 0) == schedule._batches.next_use(
            "web", entry.name, 0
        )
        assert schedule.next_use("0" * 64, 0) is None
