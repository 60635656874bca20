"""The exact shares of sources over samples, from piecewise-linear weights over steps.

All arithmetic is in integers. A share is in parts per million (PPM) of a sample, constant within a
step; from the last point on it is constant: the tail.
"""

import itertools
from collections.abc import Sequence
from math import gcd, lcm

import numpy as np
import numpy.typing as npt

PPM = 1_000_000
NEVER = 1 << 60
"""A number of samples that no run reaches."""

Integers = npt.NDArray[np.int64]
Points = Sequence[tuple[int, int]]


class Shares:
    """The exact shares: cumulative parts per million per source, as a function of samples."""

    def __init__(
        self,
        weights: Sequence[Points],
        from_step: int,
        samples_per_step: int,
        least_period: int,
    ) -> None:
        """`period` is after how many samples the shares of the tail are whole again: a multiple
        of the shortest such, so that it is not below `least_period`."""
        last_point = max(points[-1][0] for points in weights)
        ramp_steps = max(0, last_point - from_step)
        self.samples_per_step = samples_per_step
        self.ramp_samples = ramp_steps * samples_per_step
        if self.ramp_samples >= 1 << 41:
            raise ValueError(f"a ramp of {self.ramp_samples} samples is too long")
        table = shares_of_steps(weights, from_step, from_step + ramp_steps + 1)
        self._ramp = table[:-1]
        self.tail = tuple(int(share) for share in table[-1])
        shortest = PPM // gcd(*self.tail)
        self.period = -(-least_period // shortest) * shortest
        zero = np.zeros((1, len(weights)), dtype=np.int64)
        self._at_step = np.concatenate(
            [zero, np.cumsum(self._ramp * samples_per_step, axis=0, dtype=np.int64)]
        )

    def exact(self, samples: int) -> tuple[int, ...]:
        """Each source's exact share of the first `samples` samples, in parts per million."""
        if samples >= self.ramp_samples:
            more = samples - self.ramp_samples
            at_end = self._at_step[-1]
            return tuple(
                int(share) + more * tail for share, tail in zip(at_end, self.tail, strict=True)
            )
        step, within = divmod(samples, self.samples_per_step)
        exact = self._at_step[step] + within * self._ramp[step]
        return tuple(int(share) for share in exact)

    def whole_counts(self, samples: int) -> tuple[int, ...] | None:
        """The counts where every exact share is a whole number: the bound leaves no other."""
        exact = self.exact(samples)
        if any(share % PPM for share in exact):
            return None
        return tuple(share // PPM for share in exact)

    def until_period_end(self, samples: int) -> int:
        """Samples left until the ramp or the period that holds `samples` ends."""
        if samples < self.ramp_samples:
            return self.ramp_samples - samples
        return self.period - (samples - self.ramp_samples) % self.period

    def first_at(self, k: int, shares: Integers) -> Integers:
        """The least number of samples after which source k's share is at least each of `shares`."""
        at_step = self._at_step[:, k]
        found = np.full(shares.shape, NEVER, dtype=np.int64)
        in_ramp = shares <= at_step[-1]
        if in_ramp.any():
            wanted = shares[in_ramp]
            step = np.searchsorted(at_step, wanted, side="left") - 1
            found[in_ramp] = step * self.samples_per_step - (
                -(wanted - at_step[step]) // self._ramp[step, k]
            )
        if self.tail[k]:
            beyond = shares[~in_ramp] - at_step[-1]
            found[~in_ramp] = self.ramp_samples - (-beyond // self.tail[k])
        return found


def shares_of_steps(weights: Sequence[Points], first: int, end: int) -> Integers:
    """(end - first, K) shares of steps [first, end) in parts per million; each row sums to PPM.

    Rows are rounded by differences of rounded-down running sums, so that no source is off by one
    part in a million or more, and a weight of zero is a share of zero.
    """
    cuts = sorted({first, end, *(s for points in weights for s, _ in points if first < s < end)})
    rows = [_shares_between(weights, lo, hi) for lo, hi in itertools.pairwise(cuts)]
    return np.concatenate(rows)


def _shares_between(weights: Sequence[Points], lo: int, hi: int) -> Integers:
    """Shares of steps [lo, hi), between which no source has a point."""
    lines = [_line(points, lo) for points in weights]
    common = lcm(*(length for _, _, length, _ in lines))
    # Weights at lo and their growth per step, all over one denominator, in unbounded integers.
    at_lo = [(w + grow * (lo - start)) for w, start, _, grow in _scaled(lines, common)]
    growth = [grow for _, _, _, grow in _scaled(lines, common)]
    largest = sum(max(a, a + g * (hi - lo)) for a, g in zip(at_lo, growth, strict=True)) * PPM
    kind = np.int64 if largest < 1 << 62 else object
    steps = np.arange(hi - lo).astype(kind)[:, None]
    values = np.array(at_lo, dtype=kind)[None, :] + steps * np.array(growth, dtype=kind)[None, :]
    running = np.cumsum(values, axis=1)
    rounded = (running * PPM // running[:, -1:]).astype(np.int64)
    shares: Integers = np.diff(rounded, axis=1, prepend=0)
    return shares


def _line(points: Points, step: int) -> tuple[int, int, int, int]:
    """(weight at start, start, length, rise over the length) of the line that holds `step`."""
    if step < points[0][0]:
        return points[0][1], step, 1, 0
    for (start, weight), (end, next_weight) in itertools.pairwise(points):
        if start <= step < end:
            return weight, start, end - start, next_weight - weight
    return points[-1][1], step, 1, 0


def _scaled(
    lines: Sequence[tuple[int, int, int, int]], common: int
) -> list[tuple[int, int, int, int]]:
    return [
        (weight * common, start, length, rise * (common // length))
        for weight, start, length, rise in lines
    ]
