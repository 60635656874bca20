"""Which source each sample comes from: chairman assignment over piecewise-linear weights.

Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980): before each sample,
among the sources at least 1/(2K-2) behind their exact share (this sample counted), take the one
whose deadline is the earliest. At every prefix each source's count is then within 1 - 1/(2K-2) of
its exact share, whatever the weights do. A deadline is the first moment at which that bound would
break, so it looks into the future: weights are taken as if the segment lasted for ever.

All arithmetic is in integers. A share is in parts per million (PPM) of a sample, constant within a
step. The j-th sample of a source is *released* when its share reaches j + 1/(2K-2) and *due* when
it exceeds j + 1 - 1/(2K-2); both follow from the shares alone, so samples are given out by a heap
of due dates, block by block. The state at any position is just the counts.

Covers: the bound, per segment, also while weights ramp; random access.
Does not cover: a weight below one part in a million, which is rounded to none.
"""

import heapq
import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, lcm

import numpy as np
import numpy.typing as npt

PPM = 1_000_000
BLOCK = 65_536  # samples between two anchors
_NEVER = 1 << 60
_KEPT_BLOCKS = 4

Integers = npt.NDArray[np.int64]
Points = Sequence[tuple[int, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """Which source each sample of a block comes from, and which of that source's samples it is."""

    source: Integers
    ordinal: Integers


class Mixture:
    """The assignment of one segment. Samples are counted from the segment's first."""

    def __init__(
        self,
        *,
        weights: Sequence[Points],
        from_step: int,
        samples_per_step: int,
        anchors: Sequence[Sequence[int]] = (),
    ) -> None:
        """`weights` has, per source, (step, weight) points: linear between, constant outside.

        `anchors` are counts at each 65,536th sample, as `anchors()` of the same mixture gave them.
        """
        self._shares = _Shares(weights, from_step, samples_per_step)
        self.sources = len(weights)
        self._anchors = [tuple(int(count) for count in anchor) for anchor in anchors]
        self._anchors = self._anchors or [(0,) * self.sources]
        for number, anchor in enumerate(self._anchors):
            self._check_anchor(number * BLOCK, anchor)
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        self._lock = threading.RLock()
        # Positions from here on repeat: filled when a position beyond the first period is asked.
        self._periods: list[tuple[int, ...]] = []
        self._cycle: tuple[int, int] | None = None

    def counts_at(self, samples: int) -> tuple[int, ...]:
        """How many of the first `samples` samples come from each source."""
        whole = self._shares.whole_counts(samples)
        if whole is not None:
            return whole
        position, offset = self._folded(samples)
        return tuple(
            count + more
            for count, more in zip(self._counts_unfolded(position), offset, strict=True)
        )

    def sources_of(self, lo: int, hi: int) -> tuple[Integers, Integers]:
        """For samples [lo, hi): the index of the source, and its own number of the sample."""
        sources: list[Integers] = [np.empty(0, dtype=np.int64)]
        ordinals: list[Integers] = [np.empty(0, dtype=np.int64)]
        while lo < hi:
            position, offset = self._folded(lo)
            within = position % BLOCK
            count = min(hi - lo, BLOCK - within, self._shares.until_period_end(lo))
            block = self._block(position // BLOCK)
            source = block.source[within : within + count]
            sources.append(source)
            ordinals.append(
                block.ordinal[within : within + count] + np.array(offset, dtype=np.int64)[source]
            )
            lo += count
        return np.concatenate(sources), np.concatenate(ordinals)

    def anchors(self) -> tuple[tuple[int, ...], ...]:
        """Counts at each 65,536th sample until the weights are constant: what to store with a plan.

        With them any position of a long ramp is reached at once; without, they are recomputed.
        """
        last = self._shares.ramp_samples // BLOCK
        with self._lock:
            self._anchor(last)
            return tuple(self._anchors[: last + 1])

    def _folded(self, samples: int) -> tuple[int, tuple[int, ...]]:
        """An equivalent position in the first periods, and the counts to add to those there."""
        shares = self._shares
        period = shares.period
        beyond = (samples - shares.ramp_samples) // period
        none = (0,) * self.sources
        if beyond < 1:
            return samples, none
        with self._lock:
            while self._cycle is None and len(self._periods) <= beyond:
                self._extend_periods()
            if self._cycle is None:
                return samples, none
            first, second = self._cycle
            folded = first + (beyond - first) % (second - first) if beyond >= second else beyond
        skipped = (beyond - folded) * period
        return samples - skipped, tuple(share * skipped // PPM for share in shares.tail)

    def _extend_periods(self) -> None:
        """Look at the state one period on; a state seen before closes the cycle."""
        number = len(self._periods)
        at = self._shares.ramp_samples + number * self._shares.period
        counts = self._shares.whole_counts(at) or self._counts_unfolded(at)
        behind = tuple(
            exact - count * PPM for exact, count in zip(self._shares.exact(at), counts, strict=True)
        )
        if behind in self._periods:
            self._cycle = (self._periods.index(behind), number)
        else:
            self._periods.append(behind)

    def _counts_unfolded(self, samples: int) -> tuple[int, ...]:
        anchor = self._anchor(samples // BLOCK)
        within = samples % BLOCK
        if within == 0:
            return anchor
        given = np.bincount(self._block(samples // BLOCK).source[:within], minlength=self.sources)
        return tuple(count + int(more) for count, more in zip(anchor, given, strict=True))

    def _anchor(self, number: int) -> tuple[int, ...]:
        with self._lock:
            while len(self._anchors) <= number:
                last = len(self._anchors) - 1
                given = np.bincount(self._block(last).source, minlength=self.sources)
                self._anchors.append(
                    tuple(
                        count + int(more)
                        for count, more in zip(self._anchors[last], given, strict=True)
                    )
                )
            return self._anchors[number]

    def _block(self, number: int) -> _Block:
        with self._lock:
            block = self._blocks.get(number)
            if block is None:
                counts = self._anchor(number)
                source = self._assign(number * BLOCK, counts)
                ordinal = np.empty(BLOCK, dtype=np.int64)
                for k in range(self.sources):
                    mine = np.flatnonzero(source == k)
                    ordinal[mine] = counts[k] + np.arange(mine.size)
                block = self._blocks[number] = _Block(source=source, ordinal=ordinal)
                while len(self._blocks) > _KEPT_BLOCKS:
                    self._blocks.popitem(last=False)
            else:
                self._blocks.move_to_end(number)
            return block

    def _assign(self, start: int, counts: Sequence[int]) -> Integers:
        """The sources of samples [start, start + BLOCK), given the counts at `start`."""
        K = self.sources
        if K == 1:
            return np.zeros(BLOCK, dtype=np.int64)
        released, due = _release_and_due(K)
        exact = self._shares.exact(start + BLOCK)
        releases: list[Integers] = []
        keys: list[int] = []
        for k in range(K):
            candidates = np.arange(counts[k], max(counts[k], exact[k] // PPM + 1), dtype=np.int64)
            release = self._shares.first_at(k, candidates * PPM + released)
            in_block = release <= start + BLOCK
            deadline = self._shares.first_at(k, candidates[in_block] * PPM + due)
            releases.append(release[in_block])
            keys.extend(int(time) * K + k for time in deadline)  # ties: the first source
        release_times = np.concatenate(releases)
        by_release = np.argsort(release_times, kind="stable")
        waiting = release_times[by_release].tolist()
        due_keys = [keys[index] for index in by_release.tolist()]
        return np.array(_earliest_deadline_first(start, waiting, due_keys, K), dtype=np.int64)

    def _check_anchor(self, samples: int, counts: tuple[int, ...]) -> None:
        """Anchors come from a file: refuse what this mixture cannot have given."""
        exact = self._shares.exact(samples)
        if (
            len(counts) != self.sources
            or sum(counts) != samples
            or any(
                abs(count * PPM - share) >= PPM for count, share in zip(counts, exact, strict=True)
            )
        ):
            raise ValueError(f"counts {counts} after {samples} samples are not of this mixture")


def _release_and_due(K: int) -> tuple[int, int]:
    """The least integer shares beyond j samples at which the j-th is released, and is due."""
    parts = 2 * K - 2
    return -(-PPM // parts), PPM * (parts - 1) // parts + 1


def _earliest_deadline_first(
    start: int, releases: list[int], due_keys: list[int], K: int
) -> list[int]:
    """One source for each sample of a block; Tijdeman's theorem says that one always waits."""
    chosen: list[int] = []
    heap: list[int] = []
    following, count = 0, len(releases)
    push, pop = heapq.heappush, heapq.heappop
    for samples in range(start + 1, start + BLOCK + 1):
        while following < count and releases[following] <= samples:
            push(heap, due_keys[following])
            following += 1
        chosen.append(pop(heap) % K)
    return chosen


class _Shares:
    """The exact shares: cumulative parts per million per source, as a function of samples."""

    def __init__(self, weights: Sequence[Points], from_step: int, samples_per_step: int) -> None:
        last_point = max(points[-1][0] for points in weights)
        ramp_steps = max(0, last_point - from_step)
        self.samples_per_step = samples_per_step
        self.ramp_samples = ramp_steps * samples_per_step
        if self.ramp_samples >= 1 << 41:
            raise ValueError(f"a ramp of {self.ramp_samples} samples is too long")
        table = shares_of_steps(weights, from_step, from_step + ramp_steps + 1)
        self._ramp = table[:-1]
        self.tail = tuple(int(share) for share in table[-1])
        self.period = PPM // gcd(*self.tail)
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
        found = np.full(shares.shape, _NEVER, dtype=np.int64)
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
