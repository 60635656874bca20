"""The order within a source: exactly once, few open shards, frozen."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_service.order import SourceOrder, order_key, permutation, windows_in
from storage.canonical import canonical_json, sha256_hex


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    lanes=st.integers(1, 14),
    seed=st.integers(0, 2**40),
)
def test_each_window_comes_exactly_once_per_epoch(sizes: list[int], lanes: int, seed: int) -> None:
    shards = [(f"s{number}", size) for number, size in enumerate(sizes)]
    order = SourceOrder(seed=seed, source="a", shards=shards, lanes=lanes)
    everything = sorted((name, window) for name, size in shards for window in range(size))
    for epoch in (0, 1):
        places = [order.place(epoch * order.windows + t) for t in range(order.windows)]
        assert sorted((place.shard, place.window) for place in places) == everything
        assert {place.epoch for place in places} == {epoch}


def downloads(shards: list[str], capacity: int) -> int:
    """Misses of a cache that evicts the shard needed last (Belady), which the future allows."""
    following: dict[str, int] = {}
    next_use = [0] * len(shards)
    for place in range(len(shards) - 1, -1, -1):
        next_use[place] = following.get(shards[place], len(shards))
        following[shards[place]] = place
    held: dict[str, int] = {}
    missed = 0
    for place, shard in enumerate(shards):
        if shard not in held:
            missed += 1
            if len(held) == capacity:
                del held[max(held, key=held.__getitem__)]
        held[shard] = next_use[place]
    return missed


@pytest.mark.parametrize("seed", range(40))
def test_a_cache_of_one_shard_a_lane_loads_at_most_shards_plus_lanes(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randint(1, 50)
    sizes = [size if seed % 2 else rng.randint(1, 60) for _ in range(rng.randint(1, 40))]
    order = SourceOrder(
        seed=seed,
        source="a",
        shards=[(f"s{number}", windows) for number, windows in enumerate(sizes)],
        lanes=rng.randint(1, 12),
    )
    read = [order.place(t).shard for t in range(order.windows)]
    assert downloads(read, order.lanes) <= len(sizes) + order.lanes


def test_lanes_do_not_change_shards_all_at_once() -> None:
    order = SourceOrder(seed=1, source="a", shards=[(f"s{n}", 64) for n in range(32)], lanes=8)
    read = [order.place(t).shard for t in range(order.windows)]
    changes = [read[t] != read[t - 8] for t in range(8, len(read))]
    assert max(sum(changes[t : t + 8]) for t in range(0, len(changes), 8)) <= 2


def test_the_order_does_not_depend_on_the_list_of_shards() -> None:
    shards = [(f"s{number}", 5 + number) for number in range(9)]
    one = SourceOrder(seed=1, source="a", shards=shards, lanes=4)
    other = SourceOrder(seed=1, source="a", shards=shards[::-1], lanes=4)
    assert [one.place(t) for t in range(200)] == [other.place(t) for t in range(200)]


def test_seed_source_and_epoch_each_change_the_order() -> None:
    shards = [(f"s{number}", 20) for number in range(4)]

    def first(seed: int, source: str, epoch: int) -> list[tuple[str, int]]:
        order = SourceOrder(seed=seed, source=source, shards=shards, lanes=2)
        places = [order.place(epoch * 80 + t) for t in range(30)]
        return [(place.shard, place.window) for place in places]

    orders = [first(0, "a", 0), first(0, "a", 1), first(1, "a", 0), first(0, "b", 0)]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))


def test_keys_of_seed_plus_epoch_would_collide_and_ours_do_not() -> None:
    pairs = [(seed, epoch) for seed in range(4) for epoch in range(4)]
    added = {seed + epoch for seed, epoch in pairs}
    named = {order_key("windows", seed, "a", epoch, "s") for seed, epoch in pairs}
    assert len(added) < len(pairs)  # the negative control
    assert len(named) == len(pairs)


def test_lane_places_are_what_comes_next() -> None:
    order = SourceOrder(seed=3, source="a", shards=[("x", 10), ("y", 7), ("z", 2)], lanes=4)
    for position in range(2 * order.windows):
        epoch, t = divmod(position, order.windows)
        coming = {(t + ahead) % 4: t + ahead for ahead in range(3, -1, -1)}
        for lane, place in enumerate(order.lane_places(position)):
            at = coming[lane]
            expected = order.place(epoch * order.windows + at) if at < order.windows else None
            assert place == expected


def test_windows_share_one_token_and_drop_the_remainder() -> None:
    assert [windows_in(tokens, 8) for tokens in (0, 1, 8, 9, 16, 17, 24, 25)] == [
        *(0, 0, 0, 1, 1, 2, 2, 3)
    ]


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_a_permutation_has_each_number_once(count: int) -> None:
    assert sorted(permutation(order_key("p", 1, "a", 2, "s"), count).tolist()) == [*range(count)]


def test_a_permutation_looks_random() -> None:
    """Mean distance of neighbours is a third of the length for a random order."""
    shuffled = permutation(order_key("p", 1, "a", 2, "s"), 30_000)
    assert abs(np.abs(np.diff(shuffled)).mean() / 30_000 - 1 / 3) < 0.01  # 4 sigma is 0.006


def test_the_order_is_frozen() -> None:
    assert permutation(order_key("windows", 1337, "web", 2, "shard-1"), 12).tolist() == [
        5,
        6,
        0,
        11,
        2,
        4,
        10,
        8,
        9,
        7,
        1,
        3,
    ]
    order = SourceOrder(
        seed=1337, source="web", shards=[(f"shard-{n}", 3 + n) for n in range(10)], lanes=4
    )
    places = [order.place(t) for t in range(2 * order.windows)]
    assert [(p.shard, p.window) for p in places[:3]] == [
        ("shard-5", 3),
        ("shard-7", 2),
        ("shard-9", 8),
    ]
    named = [[p.epoch, p.shard, p.window, p.rank] for p in places]
    assert (
        sha256_hex(canonical_json(named))
        == "a5aff1d2dc39d2968ba4c29b05adb9067f2b8ff5f7f885ddc353c5960ad7e332"
    )
