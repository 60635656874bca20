"""The global batch of any step, as a pure function of (seed, plan, step).

World size, accumulation, workers and prefetch never enter: a rank asks for the rows it needs.

Covers: the same rows for the same arguments, in any order of asking, in any process; a cursor that
is recomputed and compared before a run goes on.
Does not cover: data that changes in place; a shard's sha256 is checked when it is first opened.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_service.mixture import Mixture
from data_service.order import Place, SourceOrder, windows_in
from data_service.plan import Plan, Segment
from data_service.source import Source
from data_service.tokenizer import Tokenizer
from storage.canonical import canonical_json, sha256_hex
from storage.errors import ConfigurationError, DataError

LANES = 8
LEAST_VALIDATION_WINDOWS = 10

Rows = npt.NDArray[np.int64]
SampleId = tuple[str, int, str, int]
"""(source, epoch, shard, window)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class _SegmentState:
    segment: Segment
    mixture: Mixture
    before: dict[str, int]  # samples of each source taken before this segment


class Batches:
    """Which tokens each step trains on. Safe to use from several threads."""

    def __init__(
        self,
        *,
        plan: Plan,
        sources: Mapping[str, Source],
        seed: int,
        context: int,
        global_batch_size: int,
        lanes: int = LANES,
    ) -> None:
        """`sources` holds every source that the plan names; `context` is T."""
        _check_shape(context, global_batch_size, lanes)
        self.plan = plan
        self.seed = seed
        self.context = context
        self.global_batch_size = global_batch_size
        self.lanes = lanes
        self._sources = {name: _source_of(name, sources) for name in plan.sources}
        _check_sources(plan, self._sources)
        self.tokenizer: Tokenizer = next(iter(self._sources.values())).tokenizer
        self.vocab_size = self.tokenizer.vocab_size
        self._orders = {name: self._order(source) for name, source in self._sources.items()}
        self._validation = {
            name: self._validation_windows(source) for name, source in self._sources.items()
        }
        self._segments = self._segment_states()

    def batch(self, step: int) -> Rows:
        """(B, T+1) int64: the sequences of a step."""
        return self.rows(step, 0, self.global_batch_size)

    def rows(self, step: int, lo: int, hi: int) -> Rows:
        """(hi - lo, T+1) int64: sequences [lo, hi) of the step's global batch."""
        places = self._places(step, lo, hi)
        rows = np.empty((len(places), self.context + 1), dtype=np.int64)
        for row, (name, place) in zip(rows, places, strict=True):
            start = place.window * self.context
            row[:] = self._sources[name].tokens(place.shard, start, start + self.context + 1)
        return rows

    def sample_ids(self, step: int) -> list[SampleId]:
        """What a step consumes, in the order of its sequences."""
        return [
            (name, place.epoch, place.shard, place.window)
            for name, place in self._places(step, 0, self.global_batch_size)
        ]

    def counts(self, step: int) -> dict[str, int]:
        """How many samples of each source the steps before `step` consume, sorted by name."""
        state = self._segment_at(max(0, step - 1))
        return self._counts_in(state, step)

    def cursor(self, step: int) -> dict[str, object]:
        """The position when `step` steps are done: JSON, under 1 KB for a dozen sources.

        `digest` covers what came before (counts), what decides (seed, plan, contents, shape) and
        the samples of the last step, so that a change of the algorithm shows as well.
        """
        plan = self.plan.prefix(step)
        counts = self.counts(step)
        taken = {name: counts[name] for name in plan.sources}
        decides = {
            "plan": plan.hash,
            "step": step,
            "counts": taken,
            "seed": self.seed,
            "context": self.context,
            "global_batch_size": self.global_batch_size,
            "lanes": self.lanes,
            "last": [list(sample) for sample in self.sample_ids(step - 1)] if step else [],
        }
        return {
            "plan": plan.hash,
            "step": step,
            "sources": {
                name: [count, count // self._orders[name].windows] for name, count in taken.items()
            },
            "digest": sha256_hex(canonical_json(decides)),
        }

    def check_cursor(self, cursor: Mapping[str, object]) -> int:
        """The step of a cursor that this data gives too; DataError naming the difference if not."""
        step = cursor.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise DataError(f"a cursor must hold its step as a whole number, found {step!r}")
        own = self.cursor(step)
        for field in ("plan", "sources", "digest"):
            if cursor.get(field) != own[field]:
                raise DataError(
                    f"the data does not continue the checkpoint at step {step}: its cursor says "
                    f"{field} {cursor.get(field)!r:.300}, this run's plan and data give "
                    f"{own[field]!r:.300}; start with the plan, data, seed, context and global "
                    "batch that the checkpoint was made with, or start anew in another run"
                )
        return step

    def bookmarks(self, step: int) -> dict[str, dict[str, object]]:
        """The same position told in files: per source, what each lane reads next.

        `rank` counts windows of the shard in reading order, `token` is the next window's offset in
        the shard's tokens; a lane is None when it is done for the epoch.
        """
        found: dict[str, dict[str, object]] = {}
        for name, count in self.counts(step).items():
            order = self._orders[name]
            found[name] = {
                "count": count,
                "epoch": count // order.windows,
                "windows": order.windows,
                "lanes": [self._lane(place) for place in order.lane_places(count)],
            }
        return found

    def validation_rows(self, n: int) -> dict[str, Rows]:
        """Per source at most n windows of T+1 held-out tokens, (m, T+1) int64: always the same.

        They are spread evenly over the source's held-out windows.
        """
        found: dict[str, Rows] = {}
        for name, windows in self._validation.items():
            count = min(n, len(windows))
            chosen = [windows[index * len(windows) // count] for index in range(count)]
            rows = np.empty((count, self.context + 1), dtype=np.int64)
            for row, (shard, start) in zip(rows, chosen, strict=True):
                row[:] = self._sources[name].tokens(shard, start, start + self.context + 1)
            found[name] = rows
        return found

    def windows(self) -> dict[str, int]:
        """The training windows of one epoch of each source."""
        return {name: order.windows for name, order in self._orders.items()}

    def _places(self, step: int, lo: int, hi: int) -> list[tuple[str, Place]]:
        if not (step >= 0 and 0 <= lo <= hi <= self.global_batch_size):
            raise IndexError(
                f"step {step} has no sequences [{lo}, {hi}): a batch has {self.global_batch_size}"
            )
        state = self._segment_at(step)
        first = (step - state.segment.from_step) * self.global_batch_size
        which, ordinals = state.mixture.sources_of(first + lo, first + hi)
        places: list[tuple[str, Place]] = []
        for index, ordinal in zip(which.tolist(), ordinals.tolist(), strict=True):
            name = state.segment.sources[index].name
            places.append((name, self._orders[name].place(state.before[name] + ordinal)))
        return places

    def _segment_at(self, step: int) -> _SegmentState:
        return next(s for s in reversed(self._segments) if s.segment.from_step <= step)

    def _counts_in(self, state: _SegmentState, step: int) -> dict[str, int]:
        samples = (step - state.segment.from_step) * self.global_batch_size
        counts = dict(state.before)
        for source, count in zip(
            state.segment.sources, state.mixture.counts_at(samples), strict=True
        ):
            counts[source.name] += count
        return counts

    def _segment_states(self) -> list[_SegmentState]:
        states: list[_SegmentState] = []
        for segment in self.plan.segments:
            before = (
                self._counts_in(states[-1], segment.from_step)
                if states
                else dict.fromkeys(self._sources, 0)
            )
            mixture = segment.mixture(self.global_batch_size)
            states.append(_SegmentState(segment=segment, mixture=mixture, before=before))
        return states

    def _order(self, source: Source) -> SourceOrder:
        shards = [
            (entry.name, windows_in(entry.tokens, self.context)) for entry in source.shards("train")
        ]
        order = SourceOrder(seed=self.seed, source=source.name, shards=shards, lanes=self.lanes)
        if order.windows == 0:
            tokens = sum(entry.tokens for entry in source.shards("train"))
            raise DataError(
                f"source {source.name!r} at {source.url} has {tokens} training tokens in "
                f"{len(shards)} shards, too few for one sequence of {self.context} + 1; "
                "use a shorter context or more text"
            )
        return order

    def _validation_windows(self, source: Source) -> list[tuple[str, int]]:
        """(shard, first token) of every held-out window, in the order of the index."""
        windows = [
            (entry.name, number * self.context)
            for entry in source.shards("validation")
            for number in range(windows_in(entry.tokens, self.context))
        ]
        if len(windows) < LEAST_VALIDATION_WINDOWS:
            raise DataError(
                f"source {source.name!r} at {source.url} has {len(windows)} validation windows of "
                f"{self.context} tokens, and needs at least {LEAST_VALIDATION_WINDOWS} to tell "
                "over-fitting; prepare it again with a larger --validation_permille (it is "
                f"{source.index.stamp.permille}), use more text or a shorter context"
            )
        return windows

    def _lane(self, place: Place | None) -> dict[str, object] | None:
        if place is None:
            return None
        return {
            "shard": place.shard,
            "rank": place.rank,
            "window": place.window,
            "token": place.window * self.context,
        }


def _check_shape(context: int, global_batch_size: int, lanes: int) -> None:
    for name, value in (
        ("context", context),
        ("global_batch_size", global_batch_size),
        ("lanes", lanes),
    ):
        if value < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {value}")


def _source_of(name: str, sources: Mapping[str, Source]) -> Source:
    if name not in sources:
        raise DataError(
            f"the plan names source {name!r}, which is not among the open ones "
            f"({', '.join(sorted(sources)) or 'none'}); open it too"
        )
    return sources[name]


def _check_sources(plan: Plan, sources: Mapping[str, Source]) -> None:
    """All sources are what the plan names, speak of one vocabulary, and hold out the same text."""
    names: Sequence[str] = list(sources)
    first = sources[names[0]]
    for name, source in sources.items():
        planned = plan.sources[name].fingerprint
        if source.fingerprint != planned:
            raise DataError(
                f"source {name!r} at {source.url} is not the data of the plan: fingerprint "
                f"{source.fingerprint[:12]}, the plan says {planned[:12]}; bring the data back, "
                "or add the new data under another name"
            )
        if source.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise DataError(
                f"sources {names[0]!r} ({first.tokenizer.name}) and {name!r} "
                f"({source.tokenizer.name}) have different tokenizers; prepare one of them again "
                "with the other's --tokenizer"
            )
        if source.index.stamp != first.index.stamp:
            raise DataError(
                f"sources {names[0]!r} ({first.index.stamp.permille} permille held out) and "
                f"{name!r} ({source.index.stamp.permille}) were split differently, so a duplicate "
                "could be in training here and in validation there; prepare both with the same "
                "--validation_permille"
            )
