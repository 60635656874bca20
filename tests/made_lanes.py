"""Objects of a remote place, and lanes that read them: what a cache sees of a run."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_service.cache import Cache
from data_service.download import Remote
from data_service.shard_format import npy_bytes
from storage.canonical import sha256_hex
from storage.store import LocalStore, Store
from tests.faulty_store import FaultyStore, Script


def made_objects(
    folder: Path, sizes: Sequence[int], script: Script = lambda operation: None
) -> tuple[FaultyStore, list[Remote]]:
    """A place with an array of each size (at least 70 elements of two bytes)."""
    inner = LocalStore(folder)
    store = FaultyStore(inner, script)
    return store, [made_object(inner, store, number, size) for number, size in enumerate(sizes)]


def made_object(inner: Store, store: Store, number: int, size: int) -> Remote:
    data = npy_bytes(np.full(size, number, dtype="<u2"))
    key = f"shard-{number}.npy"
    inner.put(key, data)
    return Remote(
        source="web", key=key, sha256=sha256_hex(data), size_bytes=len(data), stores=(store,)
    )


@dataclass(frozen=True)
class Visit:
    """A lane reads an object in the steps [start, end)."""

    start: int
    end: int
    remote: Remote


class Lanes:
    """An `Upcoming` of lanes, each of which reads one object after the other."""

    def __init__(self, lanes: Sequence[Sequence[Visit]]) -> None:
        self.lanes = lanes
        self.visits = [visit for lane in lanes for visit in lane]
        sizes = sorted({v.remote.sha256: v.remote.size_bytes for v in self.visits}.values())
        self.minimum_bytes = sum(sizes[-len(lanes) :]) + sizes[-1]
        self.steps = max(visit.end for visit in self.visits)

    def read(self, step: int) -> list[Remote]:
        return [visit.remote for visit in self.visits if visit.start <= step < visit.end]

    def uses(self, step: int) -> Iterator[tuple[int, Remote]]:
        left = [visit for visit in self.visits if visit.end > step]
        for visit in sorted(left, key=lambda v: v.start):
            yield max(step, visit.start), visit.remote

    def next_use(self, sha256: str, step: int) -> int | None:
        uses = [v for v in self.visits if v.remote.sha256 == sha256]
        return (
            min((max(step, v.start) for v in uses if v.end > step), default=2**60) if uses else None
        )

    def recognise(self, names: Iterable[str]) -> None:
        """All are known."""


def shuffled_lanes(
    remotes: Sequence[Remote], *, lanes: int, epochs: int, seed: int, longest: int = 3
) -> Lanes:
    """Every object once an epoch, in another order each time, for some steps each."""
    chance = random.Random(seed)
    at = [0] * lanes
    visits: list[list[Visit]] = [[] for _ in range(lanes)]
    for _ in range(epochs):
        for remote in chance.sample(remotes, len(remotes)):
            lane = at.index(min(at))
            end = at[lane] + chance.randint(1, longest)
            visits[lane].append(Visit(at[lane], end, remote))
            at[lane] = end
        at = [max(at)] * lanes
    return Lanes([lane for lane in visits if lane])


def downloads(store: FaultyStore) -> list[str]:
    """The keys read from the place, in order."""
    return [operation.key for operation in store.operations if operation.name == "get"]


def read_step(cache: Cache, lanes: Lanes, step: int) -> None:
    """Read what the step reads, and compare it with what was written."""
    cache.at(step)
    for remote in lanes.read(step):
        number = int(remote.key.removeprefix("shard-").removesuffix(".npy"))
        assert (cache.array(remote) == number).all()
