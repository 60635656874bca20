"""The order within one source: each window exactly once per epoch, any position at once.

Window w of a shard is the T+1 tokens from w*T: each token is predicted once, and the last token of
a window is the first of the next. What is left at a shard's end, under T+1 tokens, is dropped.

Per (seed, source, epoch) the shards are sorted by a hash into one line of N windows, the line is
cut into L arcs (lanes), and sample t of the epoch reads lane t mod L at offset t div L; inside a
shard windows are read in hash order. So only about L shards are open at a time. Lane l starts a
l-th part of a shard into its arc and comes back to the rest at the end, or else all lanes would
change shards at once; a shard is opened again for that only, at most L times an epoch.

The hashes are sha256 of the named tuple and splitmix64 from there, both written out here: frozen,
whatever a library does. A shard enters with the 64-bit key of its name, so that a million are
sorted by a few array operations.
"""

import heapq
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storage.canonical import canonical_json, sha256_hex

_KEPT_EPOCHS = 3  # two that a block of samples straddles, and one that is looked ahead to

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one sample of a source is read."""

    epoch: int
    shard: str
    window: int
    rank: int  # the window's place in the hash order of its shard


class Places(NamedTuple):
    """Where samples of a source are read, column by column; shards by their row."""

    epochs: Integers
    shards: Integers
    windows: Integers
    ranks: Integers


class Opening(NamedTuple):
    """A lane begins to read a shard at a position of the source."""

    position: int
    shard: int


class Anatomy(NamedTuple):
    """What an epoch's order is made of, for those who check it.

    Shards by row as they lie on the line, and where each begins; per lane the start and the length
    of its arc, and how far into it reading begins.
    """

    shards: Integers
    starts: Integers
    arc_starts: Integers
    arc_lengths: Integers
    staggers: Integers


class SourceOrder:
    """The endless sequence of one source's windows. Positions count all epochs."""

    def __init__(
        self,
        *,
        seed: int,
        source: str,
        names: npt.NDArray[np.bytes_],
        name_keys: npt.NDArray[np.uint64],
        windows: Integers,
        lanes: int,
    ) -> None:
        """Columns of the source's shards, sorted by name. Those without windows are never read."""
        self._seed = seed
        self._source = source
        self._names = names
        self._name_keys = name_keys
        self._shard_windows = windows
        self._rows = np.flatnonzero(windows)
        self.windows = int(windows.sum())
        self.lanes = max(1, min(lanes, self.windows))
        self._lines: OrderedDict[int, _Line] = OrderedDict()
        self._permutations: OrderedDict[tuple[int, int], npt.NDArray[np.int32]] = OrderedDict()
        self._lock = threading.RLock()
        # Per lane: where its arc begins on the line, its length, and where in it reading begins.
        lane = np.arange(self.lanes)
        length, longer = divmod(self.windows, self.lanes)
        self._arc_starts = lane * length + np.minimum(lane, longer)
        self._arc_lengths = length + (lane < longer)
        mean_windows = -(-self.windows // max(1, len(self._rows)))
        self._staggers = lane * min(mean_windows, length) // self.lanes

    def places(self, positions: Integers) -> Places:
        """Where the samples at `positions` are read. Fast when they are near each other."""
        epochs, t = np.divmod(positions, self.windows)
        lane, offset = t % self.lanes, t // self.lanes
        at = self._arc_starts[lane] + (offset + self._staggers[lane]) % self._arc_lengths[lane]
        found = Places(epochs, *(np.empty_like(at) for _ in range(3)))
        for epoch in np.unique(epochs).tolist():
            self._read(epoch, np.flatnonzero(epochs == epoch), at, found)
        return found

    def place(self, position: int) -> Place:
        """Where the source's `position`-th sample is read."""
        return self._place(self.places(np.array([position])), 0)

    def lane_places(self, position: int) -> list[Place | None]:
        """Where each lane reads next, from `position` on; None for one that is done this epoch."""
        epoch, t = divmod(position, self.windows)
        coming = np.arange(self.lanes) + np.array(self._offsets_from(t)) * self.lanes
        done = coming >= self.windows
        found = self.places(epoch * self.windows + np.where(done, t, coming))
        return [None if done[lane] else self._place(found, lane) for lane in range(self.lanes)]

    def openings(self, position: int) -> Iterator[Opening]:
        """The shards under way at `position`, then each time a lane begins one: endless, in order.

        A lane opens its first shard of an epoch at the epoch's beginning.
        """
        epoch, t = divmod(position, self.windows)
        lanes = [
            self._lane_openings(lane, epoch, offset)
            for lane, offset in enumerate(self._offsets_from(t))
        ]
        return heapq.merge(*lanes)

    def next_read(self, shard: int, position: int) -> int | None:
        """The first position from `position` on that reads a shard; None if it has no windows."""
        if not self._shard_windows[shard]:
            return None
        epoch, t = divmod(position, self.windows)
        found = self._first_read(shard, epoch, self._offsets_from(t))
        if found is None:
            found = self._first_read(shard, epoch + 1, [0] * self.lanes)
        return found

    def anatomy(self, epoch: int) -> Anatomy:
        """Not copies: not to be written to."""
        line = self._line(epoch)
        return Anatomy(
            line.shards, line.starts, self._arc_starts, self._arc_lengths, self._staggers
        )

    def _offsets_from(self, t: int) -> list[int]:
        """Per lane, the offset that it reads first from the epoch's sample t on."""
        return [(t - lane + self.lanes - 1) // self.lanes for lane in range(self.lanes)]

    def _read(self, epoch: int, which: Integers, at: Integers, found: Places) -> None:
        """Fill in the shards, ranks and windows of places on an epoch's line."""
        line = self._line(epoch)
        number = np.searchsorted(line.starts, at[which], side="right") - 1
        found.shards[which] = line.shards[number]
        found.ranks[which] = at[which] - line.starts[number]
        by_shard = np.argsort(number, kind="stable")
        ordered = which[by_shard]
        cuts = np.flatnonzero(np.diff(number[by_shard])) + 1
        for group in np.split(ordered, cuts):
            shuffled = self._permutation(epoch, int(found.shards[group[0]]))
            found.windows[group] = shuffled[found.ranks[group]]

    def _place(self, found: Places, index: int) -> Place:
        return Place(
            epoch=int(found.epochs[index]),
            shard=self._name(int(found.shards[index])),
            window=int(found.windows[index]),
            rank=int(found.ranks[index]),
        )

    def _name(self, shard: int) -> str:
        return bytes(self._names[shard]).decode("ascii")

    def _lane_openings(self, lane: int, epoch: int, offset: int) -> Iterator[Opening]:
        start, length = int(self._arc_starts[lane]), int(self._arc_lengths[lane])
        stagger = int(self._staggers[lane])
        while True:
            line = self._line(epoch)
            while offset < length:
                at = (offset + stagger) % length
                number = line.number_at(start + at)
                yield Opening(
                    epoch * self.windows + offset * self.lanes + lane, int(line.shards[number])
                )
                end = min(int(line.starts[number + 1]) - start, length)
                # The lane ends an epoch where it began, maybe in the middle of this shard.
                offset += (stagger if at < stagger < end else end) - at
            epoch, offset = epoch + 1, 0

    def _first_read(self, shard: int, epoch: int, offsets: list[int]) -> int | None:
        """The first position that reads a shard in an epoch, lanes being at `offsets`."""
        line = self._line(epoch)
        number = int(line.numbers[shard])
        lo, hi = int(line.starts[number]), int(line.starts[number + 1])
        first, last = (
            int(np.searchsorted(self._arc_starts, place, side="right")) - 1
            for place in (lo, hi - 1)
        )
        found: list[int] = []
        for lane in range(first, last + 1):
            start, length = int(self._arc_starts[lane]), int(self._arc_lengths[lane])
            begin, stop = max(lo - start, 0), min(hi - start, length)
            stagger = int(self._staggers[lane])
            for piece, end, shift in (
                (max(begin, stagger), stop, -stagger),
                (begin, min(stop, stagger), length - stagger),
            ):
                offset = max(piece + shift, offsets[lane])
                if piece < end and offset < end + shift:
                    found.append(epoch * self.windows + offset * self.lanes + lane)
        return min(found, default=None)

    def _line(self, epoch: int) -> "_Line":
        with self._lock:
            line = self._lines.get(epoch)
            if line is None:
                line = self._lines[epoch] = self._new_line(epoch)
                while len(self._lines) > _KEPT_EPOCHS:
                    self._lines.popitem(last=False)
            else:
                self._lines.move_to_end(epoch)
            return line

    def _new_line(self, epoch: int) -> "_Line":
        """Equal keys, of which a million shards have one in 10^7 chances, keep the names' order."""
        key = order_key("shards", self._seed, self._source, epoch)
        hashes = _keyed(key, self._name_keys[self._rows])
        shards = self._rows[_ascending(hashes)]
        return _Line(shards, self._shard_windows)

    def _permutation(self, epoch: int, shard: int) -> npt.NDArray[np.int32]:
        with self._lock:
            found = self._permutations.get((epoch, shard))
            if found is None:
                key = order_key("windows", self._seed, self._source, epoch, self._name(shard))
                found = permutation(key, int(self._shard_windows[shard]))
                self._permutations[epoch, shard] = found
                while len(self._permutations) > 2 * self.lanes + 2:
                    self._permutations.popitem(last=False)
            else:
                self._permutations.move_to_end((epoch, shard))
            return found


class _Line:
    """The shards of one epoch, one after the other: their rows, and where each begins."""

    def __init__(self, shards: Integers, windows: Integers) -> None:
        self.shards = shards
        self.starts = np.zeros(len(shards) + 1, dtype=np.int64)
        np.cumsum(windows[shards], out=self.starts[1:])
        self._all_shards = len(windows)

    def number_at(self, place: int) -> int:
        """Which shard of the line holds a place on it."""
        return int(np.searchsorted(self.starts, place, side="right")) - 1

    @cached_property
    def numbers(self) -> Integers:
        """Per row, the shard's number on the line."""
        numbers = np.zeros(self._all_shards, dtype=np.int64)
        numbers[self.shards] = np.arange(len(self.shards))
        return numbers


def windows_in(tokens: Integers, context: int) -> Integers:
    """How many windows of `context` + 1 tokens shards of `tokens` tokens hold."""
    return np.maximum(0, (tokens - 1) // context)


def order_key(purpose: str, seed: int, source: str, epoch: int, shard: str = "") -> int:
    """256 bits for the named tuple: no two (seed, epoch) pairs share an order."""
    named = {
        "purpose": purpose,
        "seed": seed,
        "source": source,
        "epoch": epoch,
        "shard": shard,
    }
    return int(sha256_hex(canonical_json(named)), 16)


def permutation(key: int, count: int) -> npt.NDArray[np.int32]:
    """0 ... count-1 sorted by a hash of each, under a key of `order_key`."""
    numbers = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return _ascending(_keyed(key, numbers)).astype(np.int32)


def _ascending(hashes: npt.NDArray[np.uint64]) -> Integers:
    """What a stable argsort gives; of random hashes, in a third of its time.

    A radix sort of the highest 16 bits leaves so little that the second sort merges long runs.
    """
    nearly = np.argsort((hashes >> np.uint64(48)).astype(np.uint16), kind="stable")
    return nearly[np.argsort(hashes[nearly], kind="stable")]


def _keyed(key: int, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A hash of each number, keyed by the first 128 of the key's 256 bits.

    splitmix64's finaliser (Steele, Lea, Flood, OOPSLA 2014) is one to one, so hashes tie only where
    numbers do.
    """
    first, second = np.uint64(key >> 192), np.uint64((key >> 128) & 0xFFFF_FFFF_FFFF_FFFF)
    return _splitmix64(_splitmix64(numbers + first) ^ second)


def _splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
