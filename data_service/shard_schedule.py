"""Which shards of cached sources a run will read, and when, from its batches."""

from collections.abc import Iterable, Iterator

import numpy as np

from data_service.batches import Batches
from data_service.download import Remote

_PASSED = 10_000


class ShardSchedule:
    """What the training rows of `batches` will read of cached sources. Any thread may ask."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._sources = {name: s for name, s in batches.sources.items() if s.is_cached}
        self._shards: dict[str, set[tuple[str, str]]] = {}  # by sha256: (source, shard)
        self._looked_for: set[str] = set()
        self.minimum_bytes = self._minimum_bytes()

    def uses(self, step: int) -> Iterator[tuple[int, Remote]]:
        passed = 0
        for use in self._batches.uses(step) if self._sources else ():
            if use.source not in self._sources:
                passed += 1
                if passed > _PASSED:  # the plan may never come back to a cached source
                    return
                continue
            passed = 0
            for remote in self._sources[use.source].remotes(use.shard):
                self._shards.setdefault(remote.sha256, set()).add((use.source, use.shard))
                yield use.step, remote

    def next_use(self, sha256: str, step: int) -> int | None:
        known = self._shards.get(sha256)
        if known is None:
            return None
        return min(self._batches.next_use(source, shard, step) for source, shard in known)

    def recognise(self, names: Iterable[str]) -> None:
        unknown = set(names) - self._shards.keys() - self._looked_for
        if not unknown:
            return
        for name, source in self._sources.items():
            train = source.shards("train")
            for sha256, row in train.rows_of(unknown):
                self._shards.setdefault(sha256, set()).add((name, train.name(row)))
        self._looked_for |= unknown

    def _minimum_bytes(self) -> int:
        """The largest that the lanes can read at a time, of the segments' sources; and one more,
        also of those that are evaluated."""
        if not self._sources:
            return 0
        under_way, largest = dict[str, int](), 0
        for name, source in self._sources.items():
            sizes = np.sort(source.shards("train").all_bytes)
            held_out = source.shards("validation").all_bytes
            under_way[name] = int(sizes[-self._batches.lanes :].sum())
            largest = max(largest, int(sizes[-1]), int(held_out.max(initial=0)))
        return largest + max(
            sum(under_way.get(source.name, 0) for source in segment.sources)
            for segment in self._batches.plan.segments
        )
