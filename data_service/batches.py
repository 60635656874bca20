"""The global batch of any step, as a pure function of (seed, plan, step).

World size, accumulation, workers and prefetch never enter: a rank asks for the rows it needs.

Covers: the same rows for the same arguments, in any order of asking, in any process; a cursor that
is recomputed and compared before a run goes on; which shards are read when, far ahead.
Does not cover: data that changes in place; a shard's sha256 is checked when it is first opened.
"""

import hashlib
import heapq
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from data_service.order import Place, SourceOrder, windows_in
from data_service.plan import Plan
from data_service.shares import NEVER
from data_service.source import Source
from data_service.timeline import Timeline
from data_service.tokenizer import Tokenizer
from storage.canonical import canonical_json, sha256_hex
from storage.errors import ConfigurationError, DataError

LANES = 8
LEAST_VALIDATION_WINDOWS = 10

_SAMPLES_AT_ONCE = 4096  # places are found for so many together: few array operations a sample
_KEPT_BLOCKS = 4
_BYTES_AT_ONCE = 2 * 2**20
_ROW_BYTES = np.dtype(np.int64).itemsize
_OPENED_AT_ONCE = 8

Rows = npt.NDArray[np.int64]
Learn = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]
Windows = npt.NDArray[np.unsignedinteger[Any]]
SampleId = tuple[str, int, str, int]
"""(source, epoch, shard, window)"""


class ShardUse(NamedTuple):
    """A shard is read from a step on."""

    step: int
    source: str
    shard: str


class _Samples(NamedTuple):
    """Consecutive samples, column by column: sources by number, shards by row."""

    sources: Integers
    epochs: Integers
    shards: Integers
    windows: Integers


class _Block(NamedTuple):
    """The samples of a few steps, and the shards that were opened for them.

    `opened` has per (source, shard) its windows, (windows, T+1), as views into the shard.
    """

    samples: _Samples
    opened: dict[tuple[int, int], Windows]


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
        self._names = list(self._sources)
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._orders = {name: self._order(source) for name, source in self._sources.items()}
        self._validation = {
            name: self._validation_starts(source) for name, source in self._sources.items()
        }
        self._timeline = Timeline(plan, global_batch_size)
        self._has_masks = any(source.has_masks for source in self._sources.values())
        self._has_cached = any(source.is_cached for source in self._sources.values())
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def sources(self) -> Mapping[str, Source]:
        """The sources that the plan names, opened."""
        return self._sources

    def batch(self, step: int) -> Rows:
        """(B, T+1) int64: the sequences of a step."""
        return self.rows(step, 0, self.global_batch_size)

    def rows(self, step: int, lo: int, hi: int) -> Rows:
        """(hi - lo, T+1) int64: sequences [lo, hi) of the step's global batch."""
        rows: Rows = self.rows_of_steps(step, step + 1, lo, hi)[0]
        return rows

    def rows_of_steps(self, first: int, end: int, lo: int, hi: int) -> Rows:
        """(end - first, hi - lo, T+1) int64: the same of steps [first, end), read together.

        They must lie in one `steps_together`.
        """
        samples, opened = self._samples(first, end, lo, hi)
        rows = np.empty((len(samples.sources), self.context + 1), dtype=np.int64)
        if not self._has_cached:
            self._open(samples, opened)
        for source, shard, which in _by_shard(samples):
            windows = opened.get((source, shard))
            if windows is None:  # one that is kept open would take room from the cache
                windows = self._windows_of(source, shard)
            rows[which] = windows[samples.windows[which]]
            del windows
        return rows.reshape(end - first, hi - lo, self.context + 1)

    def steps_together(self, step: int, sequences: int) -> int:
        """The end of the steps from `step` on that are best read at once: `sequences` of each.

        One step at a time where shards come through a cache.
        """
        if self._has_cached:
            return step + 1
        fitting = _BYTES_AT_ONCE // max(1, sequences * (self.context + 1) * _ROW_BYTES)
        return min(step + max(1, fitting), self._block_of(step)[1])

    def learn(self, step: int, lo: int, hi: int) -> Learn | None:
        """(hi - lo, T) bool: whether the model is trained to predict each target of `rows`.

        None when no source of the plan has loss masks: all are.
        """
        if not self._has_masks:
            return None
        samples, _ = self._samples(step, step + 1, lo, hi)
        learn = np.ones((hi - lo, self.context), dtype=np.bool_)
        bits: npt.NDArray[np.uint8] | None = None
        read = zip(*(column.tolist() for column in samples), strict=True)
        for number, (source, _, shard, window) in enumerate(read):
            bits = None  # before the next one is opened: each takes room from the cache
            bits = self._sources[self._names[source]].shard_mask(shard)
            if bits is not None:
                first = window * self.context + 1  # a target is the token after its position
                learn[number] = _bits(bits, first, first + self.context)
        return learn

    def sources_of(self, step: int) -> list[str]:
        """The source's name of each sequence of the global batch."""
        samples, _ = self._samples(step, step + 1, 0, self.global_batch_size)
        return [self._names[number] for number in samples.sources.tolist()]

    def sample_ids(self, step: int) -> list[SampleId]:
        """What a step consumes, in the order of its sequences."""
        samples, _ = self._samples(step, step + 1, 0, self.global_batch_size)
        found: list[SampleId] = []
        for source, epoch, shard, window in zip(*(c.tolist() for c in samples), strict=True):
            name = self._names[source]
            found.append((name, epoch, self._shard_name(name, shard), window))
        return found

    def sample_digest(self, step: int) -> bytes:
        """The sha256 of what a step consumes, in the order of its sequences.

        Of each: source, epoch, window, and its shard by the shard's own sha256, not by its name.
        """
        samples, _ = self._samples(step, step + 1, 0, self.global_batch_size)
        contents = np.empty(self.global_batch_size, dtype="V32")
        for number in np.unique(samples.sources).tolist():
            mine = samples.sources == number
            table = self._sources[self._names[number]].shards("train")
            contents[mine] = table.sha256s[samples.shards[mine]]
        names = [self._names[number] for number in samples.sources.tolist()]
        digest = hashlib.sha256(canonical_json(names))
        for column in (samples.epochs.astype("<i8"), samples.windows.astype("<i8"), contents):
            digest.update(column.tobytes())
        return digest.digest()

    def uses(self, step: int) -> Iterator[ShardUse]:
        """Which shards are read from `step` on, in the order of their first step; endless.

        First come those that each lane is in the middle of. A step may be told one too early, and
        never too late.
        """
        counts = self.counts(step)
        yield from heapq.merge(
            *(self._source_uses(name, count, step) for name, count in counts.items())
        )

    def next_use(self, source: str, shard: str, step: int) -> int:
        """The first step from `step` on that may read a shard, told as in `uses`.

        NEVER (2^60) for one that the plan does not read again.
        """
        row = self._sources[source].shards("train").row(shard)
        count, timeline = self.counts(step)[source], self._timeline
        while row is not None:
            position = self._orders[source].next_read(row, timeline.not_skipped(source, count))
            if position is None:
                break
            count = timeline.not_skipped(source, position)
            if count == position:
                return max(step, timeline.step_of(source, position))
        return NEVER

    def counts(self, step: int) -> dict[str, int]:
        """How many samples of each source the steps before `step` consume, sorted by name."""
        return self._timeline.counts(step)

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
        for name, source in self._sources.items():
            windows = [
                source.tokens(shard, start, start + self.context + 1)
                for shard, start in self._held_out(name, n)
            ]
            found[name] = np.array(windows, dtype=np.int64).reshape(-1, self.context + 1)
        return found

    def validation_learn(self, n: int) -> dict[str, Learn] | None:
        """Per source, for `validation_rows(n)`, what `learn` is for rows: (m, T) bool.

        None when no source of the plan has loss masks: all targets count.
        """
        if not self._has_masks:
            return None
        found: dict[str, Learn] = {}
        for name, source in self._sources.items():
            windows = self._held_out(name, n)
            learn = np.ones((len(windows), self.context), dtype=np.bool_)
            for number, (shard, start) in enumerate(windows):
                bits = source.mask(shard)
                if bits is not None:
                    learn[number] = _bits(bits, start + 1, start + 1 + self.context)
            found[name] = learn
        return found

    def windows(self) -> dict[str, int]:
        """The training windows of one epoch of each source."""
        return {name: order.windows for name, order in self._orders.items()}

    def _windows_of(self, source: int, shard: int) -> Windows:
        """(windows, T+1), a view into the shard."""
        tokens = self._sources[self._names[source]].shard_tokens(shard)
        return sliding_window_view(tokens, self.context + 1)[:: self.context]

    def _samples(self, first: int, end: int, lo: int, hi: int) -> _Block:
        """Sequences [lo, hi) of each of the steps [first, end), which lie in one block."""
        if not 0 <= lo <= hi <= self.global_batch_size:
            raise IndexError(
                f"step {first} has no sequences [{lo}, {hi}): a batch has {self.global_batch_size}"
            )
        begin, stop = self._block_of(first)
        if end > stop:
            raise IndexError(f"steps [{first}, {end}) are not read together: ask up to {stop}")
        with self._lock:
            found = self._blocks.get(begin)
            if found is None:
                found = self._blocks[begin] = self._block(begin, stop)
                while len(self._blocks) > _KEPT_BLOCKS:
                    self._blocks.popitem(last=False)
        columns = (
            column.reshape(-1, self.global_batch_size)[first - begin : end - begin, lo:hi].ravel()
            for column in found.samples
        )
        return _Block(_Samples(*columns), found.opened)

    def _block_of(self, step: int) -> tuple[int, int]:
        """The steps whose places are found together with those of `step`."""
        return self._timeline.steps_together(step, -(-_SAMPLES_AT_ONCE // self.global_batch_size))

    def _open(self, samples: _Samples, opened: dict[tuple[int, int], Windows]) -> None:
        """Open the shards of all samples: those of blocks before at once, the others in threads.

        A start opens a shard a lane; to read and verify one takes long enough to do several.
        """
        wanted = set(zip(samples.sources.tolist(), samples.shards.tolist(), strict=True))
        if wanted <= opened.keys():
            return
        with self._lock:
            others = [block.opened for block in self._blocks.values()]
        for pair in wanted - opened.keys():
            for other in others:
                if pair in other:
                    opened[pair] = other[pair]
        missing = sorted(wanted - opened.keys())
        errors: list[BaseException] = []

        def work(some: list[tuple[int, int]]) -> None:
            try:
                for source, shard in some:
                    opened[source, shard] = self._windows_of(source, shard)
            except BaseException as error:  # raised again in the caller's thread
                errors.append(error)

        threads = [  # daemons, because a hung read must not keep a preempted process
            threading.Thread(target=work, args=(missing[n::_OPENED_AT_ONCE],), daemon=True)
            for n in range(min(len(missing), _OPENED_AT_ONCE))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _block(self, first: int, end: int) -> _Block:
        """The samples of steps [first, end), which are of one segment."""
        count = (end - first) * self.global_batch_size
        found = _Samples(*(np.empty(count, dtype=np.int64) for _ in _Samples._fields))
        for name, which, positions in self._timeline.taken(first, end):
            places = self._orders[name].places(positions)
            found.sources[which] = self._numbers[name]
            found.epochs[which] = places.epochs
            found.shards[which] = places.shards
            found.windows[which] = places.windows
        return _Block(found, {})

    def _source_uses(self, name: str, count: int, step: int) -> Iterator[ShardUse]:
        order, timeline = self._orders[name], self._timeline
        openings = order.openings(timeline.not_skipped(name, count))
        while True:
            opening = next(openings)
            taken = timeline.not_skipped(name, opening.position)
            if taken > opening.position:
                openings = order.openings(taken)
                continue
            at = timeline.step_of(name, opening.position)
            if at == NEVER:
                return
            step = max(step, at)  # told one too early, it could lie before the last
            yield ShardUse(step, name, self._shard_name(name, opening.shard))

    def _shard_name(self, source: str, shard: int) -> str:
        return self._sources[source].shards("train").name(shard)

    def _order(self, source: Source) -> SourceOrder:
        shards = source.shards("train")
        order = SourceOrder(
            seed=self.seed,
            source=source.name,
            names=shards.names,
            name_keys=shards.name_keys,
            windows=windows_in(shards.tokens, self.context),
            lanes=self.lanes,
        )
        if order.windows == 0:
            raise DataError(
                f"source {source.name!r} at {source.url} has {int(shards.tokens.sum())} training "
                f"tokens in {len(shards)} shards, too few for one sequence of {self.context} + 1; "
                "use a shorter context or more text"
            )
        return order

    def _held_out(self, name: str, n: int) -> list[tuple[str, int]]:
        """(shard, first token) of the validation windows of a source."""
        starts = self._validation[name]
        windows = int(starts[-1])
        found = []
        for index in range(count := min(n, windows)):
            chosen = index * windows // count
            shard = int(np.searchsorted(starts, chosen, side="right")) - 1
            first = (chosen - int(starts[shard])) * self.context
            found.append((self._sources[name].shards("validation").name(shard), first))
        return found

    def _validation_starts(self, source: Source) -> Integers:
        """How many held-out windows lie before each shard, and in all, in the order of names."""
        windows = windows_in(source.shards("validation").tokens, self.context)
        starts = np.zeros(len(windows) + 1, dtype=np.int64)
        np.cumsum(windows, out=starts[1:])
        if starts[-1] < LEAST_VALIDATION_WINDOWS:
            raise DataError(
                f"source {source.name!r} at {source.url} has {starts[-1]} validation windows of "
                f"{self.context} tokens, and needs at least {LEAST_VALIDATION_WINDOWS} to tell "
                f"over-fitting; prepare it again with a larger --{source.index.stamp.option} (it "
                f"is {source.index.stamp.permille}), use more text or a shorter context"
            )
        return starts

    def _lane(self, place: Place | None) -> dict[str, object] | None:
        if place is None:
            return None
        return {
            "shard": place.shard,
            "rank": place.rank,
            "window": place.window,
            "token": place.window * self.context,
        }


def _by_shard(samples: _Samples) -> Iterator[tuple[int, int, Integers]]:
    """(source, shard, which samples): each shard once."""
    order = np.lexsort((samples.shards, samples.sources))
    sources, shards = samples.sources[order], samples.shards[order]
    changes = np.flatnonzero((np.diff(sources) != 0) | (np.diff(shards) != 0)) + 1
    for which in np.split(order, changes):
        if which.size:
            yield int(samples.sources[which[0]]), int(samples.shards[which[0]]), which


def _bits(mask: npt.NDArray[np.uint8], lo: int, hi: int) -> Learn:
    """Bits [lo, hi) of a packed mask."""
    byte, bit = divmod(lo, 8)
    unpacked = np.unpackbits(mask[byte : (hi + 7) // 8], bitorder="little")
    return unpacked[bit : bit + hi - lo].astype(np.bool_)


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
