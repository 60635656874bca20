"""The order within a source: exactly once, few open shards, frozen."""

import itertools
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_service.order import Opening, SourceOrder, order_key, permutation, windows_in
from data_service.shard_table import name_key
from storage.canonical import canonical_json, sha256_hex


def order_of(
    shards: Sequence[tuple[str, int]], *, lanes: int, seed: int = 1, source: str = "a"
) -> SourceOrder:
    """The order of shards given as (name, windows)."""
    rows = sorted(shards)
    return SourceOrder(
        seed=seed,
        source=source,
        names=np.array([name.encode() for name, _ in rows]),
        name_keys=np.array([name_key(name) for name, _ in rows], dtype=np.uint64),
        windows=np.array([windows for _, windows in rows], dtype=np.int64),
        lanes=lanes,
    )


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    lanes=st.integers(1, 14),
    seed=st.integers(0, 2**40),
)
def test_each_window_comes_exactly_once_per_epoch(sizes: list[int], lanes: int, seed: int) -> None:
    shards = [(f"s{number}", size) for number, size in enumerate(sizes)]
    order = order_of(shards, lanes=lanes, seed=seed)
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


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.one_of(
        st.lists(st.integers(1, 60), min_size=1, max_size=40),
        st.builds(lambda size, n: [size] * n, st.integers(1, 50), st.integers(1, 40)),
    ),
    lanes=st.integers(1, 12),
    seed=st.integers(0, 2**40),
)
def test_a_cache_of_one_shard_a_lane_loads_at_most_shards_plus_lanes(
    sizes: list[int], lanes: int, seed: int
) -> None:
    shards = [(f"s{number}", windows) for number, windows in enumerate(sizes)]
    order = order_of(shards, lanes=lanes, seed=seed)
    read = [str(row) for row in order.places(np.arange(order.windows)).shards]
    assert downloads(read, order.lanes) <= len(sizes) + order.lanes


def test_lanes_do_not_change_shards_all_at_once() -> None:
    order = order_of([(f"s{n}", 64) for n in range(32)], lanes=8)
    read = [order.place(t).shard for t in range(order.windows)]
    changes = [read[t] != read[t - 8] for t in range(8, len(read))]
    assert max(sum(changes[t : t + 8]) for t in range(0, len(changes), 8)) <= 2


def test_the_order_depends_on_names_and_not_on_the_list_of_shards() -> None:
    shards = [(f"s{number}", 5 + number) for number in range(9)]
    one = order_of(shards, lanes=4)
    other = order_of([*shards[::-1], ("empty", 0)], lanes=4)
    assert [one.place(t) for t in range(200)] == [other.place(t) for t in range(200)]


def test_seed_source_and_epoch_each_change_the_order() -> None:
    shards = [(f"s{number}", 20) for number in range(4)]

    def first(seed: int, source: str, epoch: int) -> list[tuple[str, int]]:
        order = order_of(shards, lanes=2, seed=seed, source=source)
        places = [order.place(epoch * 80 + t) for t in range(30)]
        return [(place.shard, place.window) for place in places]

    orders = [first(0, "a", 0), first(0, "a", 1), first(1, "a", 0), first(0, "b", 0)]
    assert first(0, "a", 1) == first(0, "a", 1)
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))


def test_keys_of_seed_plus_epoch_would_collide_and_ours_do_not() -> None:
    pairs = [(seed, epoch) for seed in range(4) for epoch in range(4)]
    added = {seed + epoch for seed, epoch in pairs}
    named = {order_key("windows", seed, "a", epoch, "s") for seed, epoch in pairs}
    assert len(added) < len(pairs)  # the negative control
    assert len(named) == len(pairs)


sizes_of_shards = st.lists(st.integers(0, 30), min_size=1, max_size=9).filter(any)


@settings(max_examples=150, deadline=None)
@given(
    sizes=sizes_of_shards,
    lanes=st.integers(1, 12),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_positions_asked_together_in_any_order_are_those_asked_alone(
    sizes: list[int], lanes: int, seed: int, data: st.DataObject
) -> None:
    shards = [(f"s{number}", size) for number, size in enumerate(sizes)]
    order = order_of(shards, lanes=lanes, seed=seed)
    positions = data.draw(st.lists(st.integers(0, 4 * order.windows), max_size=50))
    places = order.places(np.array(positions, dtype=np.int64))
    for number, position in enumerate(positions):
        alone = order_of(shards, lanes=lanes, seed=seed).place(position)
        row = places.shards[number]
        assert alone.shard == sorted(shards)[row][0]
        assert (alone.epoch, alone.window, alone.rank) == (
            places.epochs[number],
            places.windows[number],
            places.ranks[number],
        )


@settings(max_examples=150, deadline=None)
@given(
    sizes=sizes_of_shards,
    lanes=st.integers(1, 12),
    seed=st.integers(0, 2**40),
    at=st.floats(0, 2),
)
def test_openings_and_next_reads_are_those_of_the_places(
    sizes: list[int], lanes: int, seed: int, at: float
) -> None:
    """Against the reference: read every window of four epochs, and look."""
    order = order_of([(f"s{n}", size) for n, size in enumerate(sizes)], lanes=lanes, seed=seed)
    start, end = int(at * order.windows), 4 * order.windows
    shards = order.places(np.arange(start, end)).shards.tolist()
    expected: list[Opening] = []
    held: dict[tuple[int, int], int] = {}  # what each lane holds in an epoch
    for position, shard in enumerate(shards, start):
        epoch, t = divmod(position, order.windows)
        lane = epoch, t % order.lanes
        if held.get(lane) != shard:
            expected.append(Opening(position, shard))
        held[lane] = shard
    found = list(itertools.takewhile(lambda o: o.position < end, order.openings(start)))
    # A lane that comes back at its epoch's end to a shard it never left opens it once more.
    assert set(expected) <= set(found)
    assert all(shards[o.position - start] == o.shard for o in found)
    assert [o.position for o in found] == sorted({o.position for o in found})
    openings_of_epoch = sum(1 for o in found if 2 <= o.position // order.windows < 3)
    assert openings_of_epoch <= sum(map(bool, sizes)) + 2 * order.lanes
    for shard, size in enumerate(sizes):
        expected_read = start + shards.index(shard) if size else None
        assert order.next_read(shard, start) == expected_read


def test_lane_places_are_what_comes_next() -> None:
    order = order_of([("x", 10), ("y", 7), ("z", 2)], lanes=4, seed=3)
    for position in range(2 * order.windows):
        epoch, t = divmod(position, order.windows)
        coming = {(t + ahead) % 4: t + ahead for ahead in range(3, -1, -1)}
        for lane, place in enumerate(order.lane_places(position)):
            at = coming[lane]
            expected = order.place(epoch * order.windows + at) if at < order.windows else None
            assert place == expected


def test_windows_share_one_token_and_drop_the_remainder() -> None:
    tokens = np.array([0, 1, 8, 9, 16, 17, 24, 25])
    assert windows_in(tokens, 8).tolist() == [0, 0, 0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_a_permutation_has_each_number_once(count: int) -> None:
    assert sorted(permutation(order_key("p", 1, "a", 2, "s"), count).tolist()) == [*range(count)]


Permutation = Callable[[int, int], npt.NDArray[np.int32]]
"""(number of the permutation, length) -> the permutation"""


def of_epochs(number: int, count: int) -> npt.NDArray[np.int32]:
    """The windows of one shard, epoch by epoch, seed by seed: what a run sees."""
    return permutation(order_key("windows", number // 40, "a", number % 40, "s"), count)


@cache
def order_of_single_windows(seed: int, count: int) -> SourceOrder:
    return order_of([(f"s{n:05d}", 1) for n in range(count)], lanes=1, seed=seed)


def of_shards(number: int, count: int) -> npt.NDArray[np.int32]:
    """The same shards, of one window each, in one lane."""
    order = order_of_single_windows(number // 40, count)
    positions = np.arange(count) + number % 40 * count
    return order.places(positions).shards.astype(np.int32)


def deviations(shuffled: Permutation) -> dict[str, float]:
    """How far permutations are from what chance gives, in standard deviations."""
    n = 30_000
    one, following = shuffled(7, n), shuffled(8, n)
    between = np.abs(np.diff(one)) / n  # of a random order: mean 1/3, variance 1/18
    parity = np.count_nonzero(np.diff(one) % 2)  # every other neighbour, on average
    counts = np.zeros(24)
    corner = np.zeros((12, 12))
    odd = 0
    for number in range(2400):
        small = shuffled(number, 4).tolist()
        counts[sorted(itertools.permutations(range(4))).index(tuple(small))] += 1
        odd += sum(small[i] > small[j] for j in range(4) for i in range(j)) % 2
        corner[np.arange(12), shuffled(number, 12)] += 1
    return {
        "distance of neighbours": (between.mean() - 1 / 3) / np.sqrt(1 / 18 / n),
        "correlation of neighbours": np.corrcoef(one[:-1], one[1:])[0, 1] * np.sqrt(n),
        "correlation with the place": np.corrcoef(one, np.arange(n))[0, 1] * np.sqrt(n),
        "correlation of two epochs": np.corrcoef(one, following)[0, 1] * np.sqrt(n),
        "changes of parity": (parity - n / 2) / np.sqrt(n / 4),
        "odd permutations": (odd - 1200) / np.sqrt(2400 / 4),
        "each of 24 permutations": chi_square(counts, 100, 23),
        "each number at each place": chi_square(corner, 200, 121),
    }


def chi_square(counts: npt.NDArray[np.float64], expected: float, freedom: int) -> float:
    """In standard deviations of the distribution, which is close to normal here."""
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("shuffled", [of_epochs, of_shards])
def test_permutations_look_random(shuffled: Permutation) -> None:
    """One in 16,000 random ones is beyond four deviations; ours are fixed, and never are."""
    for what, deviation in deviations(shuffled).items():
        assert abs(deviation) < 4, what


def test_a_shuffle_that_only_looks_mixed_fails_the_gates() -> None:
    """A negative control: multiples of an odd number modulo 2^64, without splitmix64."""

    def weyl(number: int, count: int) -> npt.NDArray[np.int32]:
        start = np.uint64(order_key("windows", 0, "a", number, "s") >> 192)
        hashes = start + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return np.argsort(hashes).astype(np.int32)

    failed = {what for what, deviation in deviations(weyl).items() if abs(deviation) > 4}
    assert {"distance of neighbours", "each of 24 permutations"} <= failed


def test_seed_0_epoch_1_is_not_seed_1_epoch_0() -> None:
    shards = [(f"s{n}", 1) for n in range(1000)]
    zero, one = (order_of(shards, lanes=1, seed=seed) for seed in (0, 1))
    read_1, read_0 = (
        order.places(np.arange(1000) + epoch * 1000).shards
        for order, epoch in ((zero, 1), (one, 0))
    )
    assert np.count_nonzero(read_1 == read_0) < 10  # one is expected by chance


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
    order = order_of([(f"shard-{n}", 3 + n) for n in range(10)], lanes=4, seed=1337, source="web")
    places = [order.place(t) for t in range(2 * order.windows)]
    assert [(p.shard, p.window) for p in places[:3]] == [
        ("shard-6", 1),
        ("shard-8", 2),
        ("shard-9", 9),
    ]
    named = [[p.epoch, p.shard, p.window, p.rank] for p in places]
    assert (
        sha256_hex(canonical_json(named))
        == "aed407e5b4ec0bb54fb14dc69839fb37932f54891fb320bfb2cc823024bfe85f"
    )
