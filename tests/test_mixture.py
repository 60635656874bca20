"""The mixture against its theorem, at every prefix of random schedules."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

import data_service.mixture
from data_service.mixture import Mixture
from data_service.shares import NEVER, PPM, shares_of_steps
from storage.canonical import sha256_hex

Points = list[tuple[int, int]]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 samples, so that small schedules cross many anchors."""
    monkeypatch.setattr(data_service.mixture, "BLOCK", 64)


def random_weights(rng: random.Random, sources: int) -> list[Points]:
    """Ramps from and to zero, steps, constants; one source is always there."""
    weights: list[Points] = []
    for _ in range(sources):
        steps = sorted(rng.sample(range(120), rng.randint(1, 4)))
        weights.append([(s, rng.choice([0, 0, 1, 7, 333_333, rng.randint(0, PPM)])) for s in steps])
    weights[rng.randrange(sources)] = [(0, rng.randint(1, PPM))]
    return weights


def exact_shares(weights: Sequence[Points], from_step: int, samples: int, per_step: int) -> list:
    """Parts per million after each of `samples` samples, sample by sample: the reference."""
    steps = -(-samples // per_step)
    table = shares_of_steps(weights, from_step, from_step + steps)
    return np.cumsum(np.repeat(table, per_step, axis=0)[:samples], axis=0).tolist()


def worst_break(sources: Sequence[int], exact: Sequence[Sequence[int]], K: int) -> float:
    """The largest distance from the exact share over the bound 1 - 1/(2K-2)."""
    counts = np.zeros((len(sources), K), dtype=np.int64)
    counts[np.arange(len(sources)), list(sources)] = 1
    distance = np.abs(np.cumsum(counts, axis=0) * PPM - np.array(exact)).max()
    return float(distance * (2 * K - 2) / (PPM * (2 * K - 3)))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("seed", range(60))
def test_every_prefix_is_within_the_bound_while_weights_ramp(seed: int) -> None:
    rng = random.Random(seed)
    K, per_step, from_step = 2 + seed % 11, rng.choice([1, 2, 5, 16]), rng.randint(0, 30)
    weights = random_weights(rng, K)
    mixture = Mixture(weights=weights, from_step=from_step, samples_per_step=per_step)
    sources, ordinals = mixture.sources_of(0, 1200)
    exact = exact_shares(weights, from_step, 1200, per_step)
    assert worst_break(sources.tolist(), exact, K) <= 1
    for k in range(K):
        assert ordinals[sources == k].tolist() == list(range(int((sources == k).sum())))
    for position in rng.sample(range(1201), 20):
        expected = np.bincount(sources[:position], minlength=K).tolist()
        assert list(mixture.counts_at(position)) == expected


def test_floor_and_largest_remainder_breaks_the_bound() -> None:
    """A negative control: the scheme that looks right, under the same test."""

    def naive(exact: Sequence[Sequence[int]], K: int) -> list[int]:
        counts = [0] * K
        chosen = []
        for shares in exact:
            behind = [share - count * PPM for share, count in zip(shares, counts, strict=True)]
            source = behind.index(max(behind))
            counts[source] += 1
            chosen.append(source)
        return chosen

    broken = 0
    for seed in range(60):
        rng = random.Random(seed)
        K = 2 + seed % 11
        exact = exact_shares(random_weights(rng, K), 0, 1200, 5)
        broken += worst_break(naive(exact, K), exact, K) > 1
    assert broken > 0


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("seed", range(20))
def test_far_positions_equal_those_reached_one_by_one(seed: int) -> None:
    """Weights with a short period, so that many periods lie within reach."""
    rng = random.Random(seed)
    K = rng.randint(2, 5)
    ends = [rng.randint(1, 9) * 12_500 for _ in range(K - 1)]
    tail = [*ends, PPM - sum(ends)]
    weights = [[(0, rng.randint(0, PPM)), (rng.randint(1, 40), end)] for end in tail]
    last = max(points[-1][0] for points in weights)
    mixture = Mixture(weights=weights, from_step=0, samples_per_step=3)
    assert mixture._shares.period < 64 + 80
    sources, ordinals = mixture.sources_of(0, 4000)
    assert worst_break(sources.tolist(), exact_shares(weights, 0, 4000, 3), K) <= 1
    unfolded = Mixture(weights=weights, from_step=0, samples_per_step=3)
    unfolded._folded = lambda samples: (samples, (0,) * K)  # type: ignore[method-assign]
    assert np.array_equal(unfolded.sources_of(0, 4000)[0], sources)
    for _ in range(30):
        lo = rng.randint(0, 3990)
        fresh = Mixture(weights=weights, from_step=0, samples_per_step=3)
        some, some_ordinals = fresh.sources_of(lo, lo + 10)
        assert np.array_equal(some, sources[lo : lo + 10]), (lo, last)
        assert np.array_equal(some_ordinals, ordinals[lo : lo + 10])


def test_a_constant_mixture_is_exact_after_its_period_however_far() -> None:
    mixture = Mixture(weights=[[(0, 1)], [(0, 2)]], from_step=0, samples_per_step=7)
    assert mixture.counts_at(3 * 10**18) == (999_999 * 10**12, 2_000_001 * 10**12)
    sources, ordinals = mixture.sources_of(10**15, 10**15 + 6)
    again, later = mixture.sources_of(10**15 + PPM, 10**15 + PPM + 6)
    assert np.array_equal(sources, again)
    assert (later > ordinals).all()


@pytest.fixture
def short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_service.mixture, "BLOCK", 512)
    monkeypatch.setattr(data_service.mixture, "_NEAR", 8)


def found_from_near_by(seeds: range) -> tuple[int, int]:
    """How often the counts of random schedules were found without the past, and how often wrong."""
    found = wrong = 0
    for seed in seeds:
        rng = random.Random(seed)
        K, per_step = 2 + seed % 11, rng.choice([1, 2, 5, 16])
        mixture = Mixture(weights=random_weights(rng, K), from_step=0, samples_per_step=per_step)
        forgotten = mixture._forgotten
        mixture._forgotten = lambda samples: None  # type: ignore[method-assign]
        sources, _ = mixture.sources_of(0, 1200)
        for position in rng.sample(range(1200), 100):
            counts = forgotten(position)
            if counts is not None:
                found += 1
                wrong += list(counts) != np.bincount(sources[:position], minlength=K).tolist()
    return found, wrong


@pytest.mark.usefixtures("short_memory")
def test_counts_found_without_the_past_are_those_reached_one_by_one() -> None:
    found, wrong = found_from_near_by(range(40))
    assert found > 2000
    assert wrong == 0


@pytest.mark.usefixtures("short_memory")
def test_without_a_look_at_the_deadlines_they_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control."""
    monkeypatch.setattr(data_service.mixture, "_all_due", lambda waiting, samples: True)
    assert found_from_near_by(range(10))[1] > 0


def test_any_position_of_a_long_ramp_is_reached_without_anchors() -> None:
    weights = [[(0, 900_000), (10**5, 100_000)], [(0, 100_000), (10**5, 900_000)]]
    mixture = Mixture(weights=weights, from_step=0, samples_per_step=6400)
    mixture.sources_of(3 * 10**8, 3 * 10**8 + 10)
    mixture.counts_at(5 * 10**8 + 1)
    assert len(mixture._pieces) == 1  # and not the thousands before


def test_one_source_is_constant() -> None:
    mixture = Mixture(weights=[[(5, 3), (90_000, 8)]], from_step=2, samples_per_step=4)
    assert mixture.anchors()[-1] == (5 * 65_536,)
    sources, ordinals = mixture.sources_of(10**9, 10**9 + 3)
    assert sources.tolist() == [0, 0, 0]
    assert ordinals.tolist() == [10**9, 10**9 + 1, 10**9 + 2]
    assert mixture.counts_at(123) == (123,)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("seed", range(20))
def test_a_sample_lies_in_its_window_and_gains_less_than_one_in_it(
    seed: int,
) -> None:
    rng = random.Random(seed)
    K, per_step = 1 + seed % 6, rng.choice([1, 3, 16])
    weights = random_weights(rng, K)
    mixture = Mixture(weights=weights, from_step=0, samples_per_step=per_step)
    sources, ordinals = mixture.sources_of(0, 1200)
    shares = np.array(exact_shares(weights, 0, 1200, per_step))
    for sample in range(1200):
        k = int(sources[sample])
        first, last = mixture.window_of(k, int(ordinals[sample]))
        assert first <= sample <= last
        waited = shares[max(first, sample - 1), k] - shares[first, k]  # in parts per million
        assert waited < PPM


def test_hundreds_of_sources_stay_within_the_bound_where_some_end() -> None:
    K, per_step, samples = 300, 50, 3000
    weights = [[(0, 1 + k), (20, k % 3)] for k in range(K)]
    mixture = Mixture(weights=weights, from_step=0, samples_per_step=per_step)
    sources = mixture.sources_of(0, samples)[0].tolist()
    assert worst_break(sources, exact_shares(weights, 0, samples, per_step), K) <= 1


def test_what_is_never_drawn_is_drawn_never() -> None:
    mixture = Mixture(weights=[[(0, 5), (9, 0)], [(0, 1)]], from_step=0, samples_per_step=4)
    drawn = mixture.counts_at(70_000)[0]
    assert mixture.window_of(0, drawn - 1)[0] < 36
    assert mixture.window_of(0, drawn + 1) == (NEVER, NEVER)


def test_a_source_of_weight_zero_is_never_drawn() -> None:
    mixture = Mixture(weights=[[(0, 0)], [(0, 1)], [(0, 2)]], from_step=0, samples_per_step=4)
    assert mixture.counts_at(70_000)[0] == 0


def test_anchors_give_the_same_mixture_without_going_through_the_ramp() -> None:
    weights = [[(0, 900_000), (3000, 100_000)], [(0, 100_000), (3000, 900_000)]]
    whole = Mixture(weights=weights, from_step=0, samples_per_step=64)
    anchors = whole.anchors()
    assert len(anchors) == 3000 * 64 // 65_536 + 1
    quick = Mixture(weights=weights, from_step=0, samples_per_step=64, anchors=anchors)
    for got, expected in zip(
        quick.sources_of(190_000, 190_100), whole.sources_of(190_000, 190_100), strict=True
    ):
        assert np.array_equal(got, expected)
    assert {piece * 8192 // 65_536 for piece in quick._pieces} == {190_000 // 65_536}


def test_anchors_of_another_mixture_are_refused() -> None:
    with pytest.raises(ValueError, match="not of this mixture"):
        Mixture(
            weights=[[(0, 1)], [(0, 1)]],
            from_step=0,
            samples_per_step=1,
            anchors=[(0, 0), (65_536, 0)],
        )


def test_the_assignment_is_frozen() -> None:
    mixture = Mixture(
        weights=[[(0, 900_000), (500, 200_000)], [(100, 0), (500, 500_000)], [(0, 100_000)]],
        from_step=10,
        samples_per_step=6,
    )
    sources, ordinals = mixture.sources_of(0, 70_000)
    digest = sha256_hex(sources.astype("<i8").tobytes() + ordinals.astype("<i8").tobytes())
    assert sources[:20].tolist() == [0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0]
    assert digest == "ffb71e81c8086d9342d9ef335e7a0a049df822a1863badf38a60008f34e8e7eb"
