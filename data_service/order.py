"""The order within one source: each window exactly once per epoch, any position at once.

Window w of a shard is the T+1 tokens from w*T: each token is predicted once, and the last token of
a window is the first of the next. What is left at a shard's end, under T+1 tokens, is dropped.

Per (seed, source, epoch) the shards are sorted by a hash into one line of N windows, the line is
cut into L arcs (lanes), and sample t of the epoch reads lane t mod L at offset t div L; inside a
shard windows are read in hash order. So only about L shards are open at a time. Lane l starts a
l-th part of a shard into its arc and comes back to the rest at the end, or else all lanes would
change shards at once; a shard is opened again for that only, at most L times an epoch.

The hashes are sha256 of the named tuple and splitmix64 from there, both written out here: frozen,
whatever a library does.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from storage.canonical import canonical_json, sha256_hex

_KEPT_EPOCHS = 2  # two, because a batch may straddle their border


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one sample of a source is read."""

    epoch: int
    shard: str
    window: int
    rank: int  # the window's place in the hash order of its shard


def windows_in(tokens: int, context: int) -> int:
    """How many windows of `context` + 1 tokens a shard of `tokens` tokens holds."""
    return max(0, (tokens - 1) // context)


class SourceOrder:
    """The endless sequence of one source's windows. Positions count all epochs."""

    def __init__(
        self, *, seed: int, source: str, shards: Sequence[tuple[str, int]], lanes: int
    ) -> None:
        """`shards` gives (name, windows) in any order; those without windows are left out."""
        self._seed = seed
        self._source = source
        self._shards = [(name, windows) for name, windows in sorted(shards) if windows]
        self.windows = sum(windows for _, windows in self._shards)
        self.lanes = max(1, min(lanes, self.windows))
        self._lines: OrderedDict[int, _Line] = OrderedDict()
        self._permutations: OrderedDict[tuple[int, str], npt.NDArray[np.int32]] = OrderedDict()
        self._lock = threading.RLock()

    def place(self, position: int) -> Place:
        """Where the source's `position`-th sample is read."""
        epoch, t = divmod(position, self.windows)
        return self._read(epoch, t % self.lanes, t // self.lanes)

    def lane_places(self, position: int) -> list[Place | None]:
        """Where each lane reads next, from `position` on; None for one that is done this epoch."""
        epoch, t = divmod(position, self.windows)
        places: list[Place | None] = []
        for lane in range(self.lanes):
            offset = (t - lane + self.lanes - 1) // self.lanes
            done = offset >= self._arc(lane)[1]
            places.append(None if done else self._read(epoch, lane, offset))
        return places

    def _arc(self, lane: int) -> tuple[int, int]:
        """The start and the length of a lane's arc on the line."""
        length, longer = divmod(self.windows, self.lanes)
        return lane * length + min(lane, longer), length + (lane < longer)

    def _read(self, epoch: int, lane: int, offset: int) -> Place:
        start, length = self._arc(lane)
        mean_windows = -(-self.windows // len(self._shards))
        stagger = lane * min(mean_windows, self.windows // self.lanes) // self.lanes
        shard, windows, rank = self._line(epoch).at(start + (offset + stagger) % length)
        window = int(self._permutation(epoch, shard, windows)[rank])
        return Place(epoch=epoch, shard=shard, window=window, rank=rank)

    def _line(self, epoch: int) -> "_Line":
        with self._lock:
            line = self._lines.get(epoch)
            if line is None:
                line = self._lines[epoch] = _Line(
                    sorted(
                        self._shards,
                        key=lambda shard: order_key(
                            "shards", self._seed, self._source, epoch, shard[0]
                        ),
                    )
                )
                while len(self._lines) > _KEPT_EPOCHS:
                    self._lines.popitem(last=False)
            return line

    def _permutation(self, epoch: int, shard: str, windows: int) -> npt.NDArray[np.int32]:
        with self._lock:
            found = self._permutations.get((epoch, shard))
            if found is None:
                key = order_key("windows", self._seed, self._source, epoch, shard)
                found = self._permutations[epoch, shard] = permutation(key, windows)
                while len(self._permutations) > 2 * self.lanes + 2:
                    self._permutations.popitem(last=False)
            else:
                self._permutations.move_to_end((epoch, shard))
            return found


class _Line:
    """The shards of one epoch, one after the other."""

    def __init__(self, shards: Sequence[tuple[str, int]]) -> None:
        self._shards = shards
        self._starts = list(accumulate((windows for _, windows in shards), initial=0))

    def at(self, position: int) -> tuple[str, int, int]:
        """Shard, its windows, and the place within it, for a place on the line."""
        number = bisect_right(self._starts, position) - 1
        shard, windows = self._shards[number]
        return shard, windows, position - self._starts[number]


def order_key(purpose: str, seed: int, source: str, epoch: int, shard: str) -> int:
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
    """0 ... count-1 sorted by a hash of each, keyed by the first 128 of the key's 256 bits.

    splitmix64's finaliser (Steele, Lea, Flood, OOPSLA 2014) is one to one, so hashes never tie.
    """
    first, second = np.uint64(key >> 192), np.uint64((key >> 128) & 0xFFFF_FFFF_FFFF_FFFF)
    numbers = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    hashes = _splitmix64(_splitmix64(numbers + first) ^ second)
    return np.argsort(hashes, kind="stable").astype(np.int32)


def _splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
