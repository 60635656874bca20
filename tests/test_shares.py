"""The shares against their lines, and their sums against each other."""

import random

import numpy as np
import pytest

from data_service.shares import NEVER, PPM, Shares, shares_of_steps


def test_shares_sum_to_a_million_and_follow_the_lines_within_one() -> None:
    weights = [[(0, 900_000), (1000, 100_000)], [(200, 0), (700, 900_001)], [(0, 7)]]
    table = shares_of_steps(weights, 0, 1100)
    assert (table.sum(axis=1) == PPM).all()
    for step in (0, 199, 200, 450, 700, 999, 1000, 1099):
        lines = np.array([np.interp(step, *zip(*points, strict=True)) for points in weights])
        assert np.abs(table[step] - lines / lines.sum() * PPM).max() <= 1 + 1e-6  # float's own


def test_shares_of_huge_weights_do_not_overflow() -> None:
    big = [[(0, 10**12), (999_983, 1)], [(0, 1), (999_979, 10**12)]]
    small = [[(0, 10**6), (999_983, 0)], [(0, 0), (999_979, 10**6)]]
    wide, narrow = (shares_of_steps(weights, 4321, 4400) for weights in (big, small))
    assert np.abs(wide - narrow).max() <= 1


@pytest.mark.parametrize("seed", range(20))
def test_sums_and_their_inverse_are_those_of_the_shares_one_by_one(seed: int) -> None:
    rng = random.Random(seed)
    per_step, from_step = rng.choice([1, 3, 16]), rng.randint(0, 20)
    weights = [
        [
            (step, rng.choice([0, 5, rng.randint(0, PPM)]))
            for step in sorted(rng.sample(range(60), 3))
        ]
        for _ in range(3)
    ]
    weights[0] = [(0, 7)]
    shares = Shares(weights, from_step, per_step, 64)
    table = shares_of_steps(weights, from_step, from_step + 100).repeat(per_step, axis=0)
    sums = np.concatenate([np.zeros((1, 3), dtype=np.int64), table.cumsum(axis=0)])
    for samples in rng.sample(range(len(sums)), 40):
        assert shares.exact(samples) == tuple(sums[samples].tolist())
    for k in range(3):
        for wanted in rng.sample(range(1, int(sums[-1, k]) + PPM), 20):
            found = int(shares.first_at(k, np.array([wanted]))[0])
            if wanted <= sums[-1, k]:
                assert found == np.searchsorted(sums[:, k], wanted)
            else:
                assert found >= len(sums)
                assert (found == NEVER) == (shares.tail[k] == 0)


def test_a_period_is_a_multiple_of_the_shortest_that_is_long_enough() -> None:
    for weights, shortest in (([1], 1), ([1, 1], 2), ([3, 1], 4), ([333_333, 666_667], PPM)):
        shares = Shares([[(0, weight)] for weight in weights], 0, 1, 1000)
        assert shares.period % shortest == 0
        assert 1000 <= shares.period < 1000 + shortest or shares.period == shortest


def test_a_ramp_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a ramp of .* samples is too long"):
        Shares([[(0, 1), (1 << 21, 2)]], 0, 1 << 20, 64)
