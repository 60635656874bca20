"""Which source each sample comes from: chairman assignment over piecewise-linear weights.

Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980): before each sample,
among the sources at least 1/(2K-2) behind their exact share (this sample counted), take the one
whose deadline is the earliest. At every prefix each source's count is then within 1 - 1/(2K-2) of
its exact share, whatever the weights do. A deadline is the first moment at which that bound would
break, so it looks into the future: weights are taken as if the segment lasted for ever.

All arithmetic is in integers. A share is in parts per million (PPM) of a sample, constant within a
step. The j-th sample of a source is *released* when its share reaches j + 1/(2K-2) and *due* when
it exceeds j + 1 - 1/(2K-2); both follow from the shares alone, so samples are given out by a heap
of due dates, piece by piece. The state at any position is just the counts, and it can be found
without going through what lies before: see `_forgotten`.

Covers: the bound, per segment, also while weights ramp; random access.
Does not cover: a weight below one part in a million, which is rounded to none.
"""

import heapq
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_service.shares import NEVER, PPM, Points, Shares

BLOCK = 65_536  # samples between two anchors
_BLOCK_PIECES = 8  # a block is assigned in so many pieces: a start needs one
_FAR = 1 << 45  # beyond every deadline of a share above 0, and keys stay below 2^63
_NEAR = 1024  # so far back the past is forgotten when every share is above a few thousandths
_KEPT_PIECES = 256  # a whole period of at most PPM samples, and more

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """Which source each of its samples comes from, and which of that source's samples it is.

    `counts` are those at its first sample.
    """

    counts: tuple[int, ...]
    source: npt.NDArray[np.int16]
    ordinal: Integers

    def counts_after(self, samples: int) -> tuple[int, ...]:
        return _added(self.counts, self.source[:samples])


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
        self._shares = Shares(weights, from_step, samples_per_step, BLOCK)
        self.sources = len(weights)
        self._anchors = {0: (0,) * self.sources}
        for number, anchor in enumerate(anchors):
            self._anchors[number] = tuple(int(count) for count in anchor)
            self._check_anchor(number * BLOCK, self._anchors[number])
        self._pieces: OrderedDict[int, _Piece] = OrderedDict()
        self._lock = threading.RLock()
        # Positions from here on repeat: filled when a position beyond the first period is asked.
        self._periods: list[tuple[int, ...]] = []
        self._cycle: tuple[int, int] | None = None

    def counts_at(self, samples: int) -> tuple[int, ...]:
        """How many of the first `samples` samples come from each source."""
        if self.sources == 1:
            return (samples,)
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
        if self.sources == 1:
            return np.zeros(hi - lo, dtype=np.int64), np.arange(lo, hi)
        sources: list[Integers] = [np.empty(0, dtype=np.int64)]
        ordinals: list[Integers] = [np.empty(0, dtype=np.int64)]
        while lo < hi:
            position, offset = self._folded(lo)
            number, within = divmod(position, _piece_samples())
            count = min(hi - lo, _piece_samples() - within, self._shares.until_period_end(lo))
            piece = self._piece(number)
            source = piece.source[within : within + count]
            sources.append(source.astype(np.int64))
            ordinals.append(
                piece.ordinal[within : within + count] + np.array(offset, dtype=np.int64)[source]
            )
            lo += count
        return np.concatenate(sources), np.concatenate(ordinals)

    def window_of(self, source: int, ordinal: int) -> tuple[int, int]:
        """The first and the last sample that may be the `ordinal`-th of a source.

        From the shares alone: they are less than 1/share samples apart. NEVER where the share ends.
        """
        if self.sources == 1:
            return ordinal, ordinal
        shares = np.array(_release_and_due(self.sources), dtype=np.int64) + ordinal * PPM
        released, due = self._shares.first_at(source, shares).tolist()
        return (released - 1 if released < NEVER else NEVER), (due - 1 if due < NEVER else NEVER)

    def anchors(self) -> tuple[tuple[int, ...], ...]:
        """Counts at each 65,536th sample until the weights are constant: what to store with a plan.

        With them any position of a long ramp is reached at once; without, they are recomputed.
        """
        last = self._shares.ramp_samples // BLOCK
        with self._lock:
            return tuple(self._anchor(number) for number in range(last + 1))

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
        if samples % BLOCK == 0:
            return self._anchor(samples // BLOCK)
        number = (samples - 1) // _piece_samples()
        counts = None if number in self._pieces else self._forgotten(samples)
        if counts is None:
            counts = self._piece(number).counts_after(samples - number * _piece_samples())
        return counts

    def _anchor(self, number: int) -> tuple[int, ...]:
        if self.sources == 1:
            return (number * BLOCK,)
        with self._lock:
            if number not in self._anchors:
                counts = self._forgotten(number * BLOCK)
                if counts is None:
                    for next_one in range(self._last_anchor_before(number) + 1, number + 1):
                        last = self._piece(next_one * _BLOCK_PIECES - 1)
                        self._anchors[next_one] = last.counts_after(_piece_samples())
                else:
                    self._anchors[number] = counts
            return self._anchors[number]

    def _last_anchor_before(self, number: int) -> int:
        return next(n for n in range(number - 1, -1, -1) if n in self._anchors)

    def _forgotten(self, samples: int) -> tuple[int, ...] | None:
        """The counts after `samples` samples, found from a little before; None if that is not near.

        At a position it is known which jobs were released, so how many wait, and of each source
        only the newest can. Suppose that the ones due last wait. The true set and the supposed one
        then get the same jobs and each gives its first due, so the supposed one, never due earlier,
        gains no job that the true one has not: they are equal once its first ones are given, which
        is when they are due, at the latest. What came before is forgotten by then.
        """
        released, due = _release_and_due(self.sources)
        back = min(_NEAR, BLOCK)
        while back <= BLOCK and back < samples:
            start = samples - back
            exact = self._shares.exact(start)
            counts = [(share - released) // PPM + 1 for share in exact]
            waiting: list[tuple[int, int]] = []
            for k, count in enumerate(counts):
                last_due = np.array([(count - 1) * PPM + due], dtype=np.int64)
                deadline = int(self._shares.first_at(k, last_due)[0]) if count else 0
                if deadline > start:
                    waiting.append((deadline, k))
            if _all_due(waiting, samples):
                unassigned = sum(counts) - start
                for _, k in sorted(waiting)[len(waiting) - unassigned :]:
                    counts[k] -= 1
                return _added(counts, self._assign(start, counts, back))
            back *= 8
        return None

    def _piece(self, number: int) -> _Piece:
        with self._lock:
            piece = self._pieces.get(number)
            if piece is None:
                start, samples = number * _piece_samples(), _piece_samples()
                counts = self._counts_unfolded(start)
                source = self._assign(start, counts, samples)
                ordinal = np.empty(samples, dtype=np.int64)
                for k in range(self.sources):
                    mine = np.flatnonzero(source == k)
                    ordinal[mine] = counts[k] + np.arange(mine.size)
                piece = self._pieces[number] = _Piece(counts=counts, source=source, ordinal=ordinal)
                while len(self._pieces) > _KEPT_PIECES:
                    self._pieces.popitem(last=False)
            else:
                self._pieces.move_to_end(number)
            return piece

    def _assign(self, start: int, counts: Sequence[int], length: int) -> npt.NDArray[np.int16]:
        """The sources of samples [start, start + length), given the counts at `start`."""
        K, end = self.sources, start + length
        released, due = _release_and_due(K)
        exact = self._shares.exact(end)
        releases: list[Integers] = []
        keys: list[Integers] = []
        for k in range(K):
            candidates = np.arange(counts[k], max(counts[k], exact[k] // PPM + 1), dtype=np.int64)
            release = self._shares.first_at(k, candidates * PPM + released)
            in_block = release <= end
            deadline = self._shares.first_at(k, candidates[in_block] * PPM + due)
            releases.append(release[in_block])
            keys.append(np.minimum(deadline - start, _FAR) * K + k)  # ties: the first source
        release_times = np.concatenate(releases)
        by_release = np.argsort(release_times, kind="stable")
        samples = np.arange(start + 1, end + 1)
        released_by = np.searchsorted(release_times[by_release], samples, side="right")
        due_keys = np.concatenate(keys)[by_release]
        chosen = _earliest_deadline_first(released_by.tolist(), due_keys.tolist())
        return (np.array(chosen, dtype=np.int64) % K).astype(np.int16)

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


def _piece_samples() -> int:
    return BLOCK // _BLOCK_PIECES


def _all_due(waiting: Sequence[tuple[int, int]], samples: int) -> bool:
    """Whether every (deadline, source) lies within the first `samples` samples."""
    return all(deadline <= samples for deadline, _ in waiting)


def _added(counts: Sequence[int], sources: npt.NDArray[np.int16]) -> tuple[int, ...]:
    """The counts after samples of these sources."""
    given = np.bincount(sources, minlength=len(counts))
    return tuple(count + int(more) for count, more in zip(counts, given, strict=True))


def _release_and_due(K: int) -> tuple[int, int]:
    """The least integer shares beyond j samples at which the j-th is released, and is due."""
    parts = 2 * K - 2
    return -(-PPM // parts), PPM * (parts - 1) // parts + 1


def _earliest_deadline_first(released_by: list[int], due_keys: list[int]) -> list[int]:
    """One due key for each sample, `released_by` of which wait or have been given out by then.

    Tijdeman's theorem says that one always waits.
    """
    chosen: list[int] = []
    heap: list[int] = []
    following = 0
    push, pop, push_and_pop, give = heapq.heappush, heapq.heappop, heapq.heappushpop, chosen.append
    for released in released_by:
        if following < released:
            for key in due_keys[following : released - 1]:
                push(heap, key)
            give(push_and_pop(heap, due_keys[released - 1]))
            following = released
        else:
            give(pop(heap))
    return chosen
