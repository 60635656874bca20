"""Whether the samples of a run's steps are, per source, each window exactly once per epoch.

Three things together show it: the mixture hands out each source's samples in order, none left out
(an edit may skip some, and says so); the source's order puts them on windows, each once an epoch;
and the batches are what these two say.

Up to 4 million samples, each is looked at. Beyond, the first is looked at in blocks at random, and
of the second the arithmetic: the line of an epoch has every shard once, the lanes' arcs cover the
line, windows within a shard are permuted. The third is always at steps drawn at random, and at the
edges of segments.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_service.batches import Batches, SampleId
from data_service.mixture import BLOCK
from data_service.order import SourceOrder, windows_in
from data_service.plan import Segment
from data_service.recorded import RecordedPlan
from data_service.source import Source

EXHAUSTIVE_SAMPLES = 4_000_000
DRAWN_STEPS = 64
_DRAWN_EPOCHS = 3
_DRAWN_BLOCKS = 8
_DRAWN_SHARDS = 32
_DRAWN_RUNS = 64
_RUN = 1024

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceVerdict:
    """What was found of one source. `samples` were consumed, `skipped` passed over by edits.

    `wrong` says what is violated, "" when nothing is; `exhaustive` when each sample was looked at.
    """

    source: str
    samples: int
    skipped: int
    windows: int
    exhaustive: bool
    wrong: str

    @property
    def positions(self) -> int:
        """How far the source has come in its own order."""
        return self.samples + self.skipped


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stretch:
    """Steps [first, end) of one segment. A source's positions before it, and skipped just there."""

    segment: Segment
    first: int
    end: int
    before: dict[str, int]
    skipped: dict[str, int]


class _Windows:
    """The windows of a source in the order of a run, made anew from its index."""

    def __init__(self, recorded: RecordedPlan, source: Source) -> None:
        self._source = source.name
        self.table = source.shards("train")
        self.in_shard = windows_in(self.table.tokens, recorded.context)
        self.order = SourceOrder(
            seed=recorded.seed,
            source=source.name,
            names=self.table.names,
            name_keys=self.table.name_keys,
            windows=self.in_shard,
            lanes=recorded.lanes,
        )
        self._starts = np.concatenate([[0], np.cumsum(self.in_shard)])

    def samples(self, positions: Numbers) -> list[SampleId]:
        """The samples at these positions."""
        found = self.order.places(positions)
        return [
            (self._source, epoch, self.table.name(shard), window)
            for epoch, shard, window in zip(
                found.epochs.tolist(), found.shards.tolist(), found.windows.tolist(), strict=True
            )
        ]

    def wrong_at(self, positions: Numbers) -> str:
        """Why the windows at these positions of one epoch are not each another one."""
        numbers: list[Numbers] = []
        for part in np.array_split(positions, -(-len(positions) // BLOCK)):
            found = self.order.places(part)
            inside = (found.windows >= 0) & (found.windows < self.in_shard[found.shards])
            if not inside.all():
                at = int(np.argmin(inside))
                return (
                    f"shard {self.table.name(int(found.shards[at]))} has no window "
                    f"{int(found.windows[at])}, which comes at position {int(part[at])}"
                )
            numbers.append(self._starts[found.shards] + found.windows)
        windows, times = np.unique(np.concatenate(numbers), return_counts=True)
        if len(windows) == len(positions):
            return ""
        number = int(windows[np.argmax(times)])
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return (
            f"window {number - int(self._starts[shard])} of shard {self.table.name(shard)} comes "
            f"{int(times.max())} times, and {len(positions) - len(windows)} samples are repeats"
        )


def source_verdicts(
    recorded: RecordedPlan,
    batches: Batches,
    sources: Sequence[Source],
    steps: int,
    *,
    exhaustive_samples: int = EXHAUSTIVE_SAMPLES,
) -> list[SourceVerdict]:
    """The verdict on each source after `steps` steps of `batches`, which `recorded` decides."""
    draw = random.Random(steps)
    stretches = list(_stretches(recorded, steps))
    reached = _reached(recorded, stretches)
    exhaustive = sum(reached.values()) <= exhaustive_samples
    wrong = {source.name: "" for source in sources}
    for stretch in stretches:
        _note(wrong, _wrong_mixture(recorded, stretch, draw, exhaustive=exhaustive))
    windows = {source.name: _Windows(recorded, source) for source in sources}
    for name, own in windows.items():
        if exhaustive:
            _note(wrong, {name: _wrong_samples(own, reached[name])})
        else:
            _note(wrong, {name: _wrong_arithmetic(own, reached[name], draw)})
    for stretch in stretches:
        _note(wrong, _wrong_batches(recorded, batches, stretch, windows, draw))
    skipped = {name: sum(s.skipped.get(name, 0) for s in stretches) for name in windows}
    return [
        SourceVerdict(
            source=name,
            samples=reached[name] - skipped[name],
            skipped=skipped[name],
            windows=own.order.windows,
            exhaustive=exhaustive,
            wrong=wrong[name],
        )
        for name, own in windows.items()
    ]


def _note(wrong: dict[str, str], found: dict[str, str]) -> None:
    """Keep the first thing that is wrong with each source."""
    for name, reason in found.items():
        wrong[name] = wrong[name] or reason


def _stretches(recorded: RecordedPlan, steps: int) -> Iterator[_Stretch]:
    """What the steps before `steps` consist of, by the plan and the mixtures alone."""
    segments = [s for s in recorded.plan.segments if s.from_step < steps]
    before = dict.fromkeys(recorded.plan.sources, 0)
    for number, segment in enumerate(segments):
        skipped: dict[str, int] = {}
        if segment.skip_steps:
            previous = segments[number - 1]
            at = _counts(recorded, previous, segment.from_step)
            beyond = _counts(recorded, previous, segment.from_step + segment.skip_steps)
            skipped = {name: beyond[name] - at[name] for name in at}
            before = {name: count + skipped.get(name, 0) for name, count in before.items()}
        last = number + 1 == len(segments)
        end = steps if last else segments[number + 1].from_step
        yield _Stretch(
            segment=segment,
            first=segment.from_step,
            end=end,
            before=dict(before),
            skipped=skipped,
        )
        for name, count in _counts(recorded, segment, end).items():
            before[name] += count


def _reached(recorded: RecordedPlan, stretches: Sequence[_Stretch]) -> dict[str, int]:
    """The position of each source after all stretches."""
    reached = dict.fromkeys(recorded.plan.sources, 0)
    if stretches:
        last = stretches[-1]
        reached |= last.before
        for name, count in _counts(recorded, last.segment, last.end).items():
            reached[name] += count
    return reached


def _counts(recorded: RecordedPlan, segment: Segment, step: int) -> dict[str, int]:
    """Samples of each source in the steps of a segment before `step`."""
    samples = (step - segment.from_step) * recorded.global_batch_size
    counts = segment.mixture(recorded.global_batch_size).counts_at(samples)
    return {source.name: count for source, count in zip(segment.sources, counts, strict=True)}


def _wrong_mixture(
    recorded: RecordedPlan, stretch: _Stretch, draw: random.Random, *, exhaustive: bool
) -> dict[str, str]:
    """Sources whose samples the mixture does not hand out one after another."""
    wrong: dict[str, str] = {}
    mixture = stretch.segment.mixture(recorded.global_batch_size)
    samples = (stretch.end - stretch.first) * recorded.global_batch_size
    blocks = range(-(-samples // BLOCK))
    chosen = blocks if exhaustive else sorted(draw.sample(blocks, min(len(blocks), _DRAWN_BLOCKS)))
    for block in chosen:
        lo, hi = block * BLOCK, min(samples, (block + 1) * BLOCK)
        which, ordinals = mixture.sources_of(lo, hi)
        begin, end = mixture.counts_at(lo), mixture.counts_at(hi)
        for k, source in enumerate(stretch.segment.sources):
            if not np.array_equal(ordinals[which == k], np.arange(begin[k], end[k])):
                wrong[source.name] = (
                    f"the mixture leaves out or repeats samples of it between steps "
                    f"{stretch.first + lo // recorded.global_batch_size} and "
                    f"{stretch.first + hi // recorded.global_batch_size}"
                )
    return wrong


def _wrong_samples(windows: _Windows, reached: int) -> str:
    """What is wrong with the windows at positions [0, reached), every one looked at."""
    for start in range(0, reached, windows.order.windows):
        count = min(windows.order.windows, reached - start)
        wrong = windows.wrong_at(np.arange(start, start + count))
        if wrong:
            return f"epoch {start // windows.order.windows}: {wrong}"
    return ""


def _wrong_arithmetic(windows: _Windows, reached: int, draw: random.Random) -> str:
    """What is wrong with the order of epochs, shards and positions drawn at random."""
    size = windows.order.windows
    epochs = range(-(-reached // size))
    for epoch in sorted(draw.sample(epochs, min(len(epochs), _DRAWN_EPOCHS))):
        positions = range(epoch * size, min(reached, (epoch + 1) * size))
        runs = range(-(-len(positions) // _RUN))  # neighbours lie in the same few shards
        drawn = draw.sample(runs, min(len(runs), _DRAWN_RUNS))
        chosen = [np.array(positions[run * _RUN : (run + 1) * _RUN]) for run in sorted(drawn)]
        wrong = _wrong_cover(windows, epoch, draw) or windows.wrong_at(np.concatenate(chosen))
        if wrong:
            return f"epoch {epoch}: {wrong}"
    return ""


def _wrong_cover(windows: _Windows, epoch: int, draw: random.Random) -> str:
    """Why lanes, line and shards of an epoch do not cover each window once, by their arithmetic.

    Lane l reads the samples t with t mod L = l, at the places of its arc one after another from
    somewhere in it and around: as many as the arc is long, so each once.
    """
    order = windows.order
    made, lane = order.anatomy(epoch), np.arange(order.lanes)
    reads = order.windows // order.lanes + (lane < order.windows % order.lanes)
    if not (
        np.array_equal(made.arc_lengths, reads)
        and np.array_equal(made.arc_starts, np.cumsum(reads) - reads)
    ):
        return "the lanes' arcs do not cover the line once"
    if not np.array_equal(np.sort(made.shards), np.flatnonzero(windows.in_shard)):
        return "the line does not have every shard once"
    ends = np.cumsum(windows.in_shard[made.shards])
    if not np.array_equal(made.starts, np.concatenate([[0], ends])):
        return "the shards do not lie one after another on the line"
    for number in draw.sample(range(len(made.shards)), min(len(made.shards), _DRAWN_SHARDS)):
        places = np.arange(made.starts[number], made.starts[number + 1])
        lanes = np.searchsorted(made.arc_starts, places, side="right") - 1
        offsets = (places - made.arc_starts[lanes] - made.staggers[lanes]) % reads[lanes]
        found = order.places(epoch * order.windows + offsets * order.lanes + lanes)
        shard = int(made.shards[number])
        if not (
            (found.shards == shard).all()
            and np.array_equal(np.sort(found.windows), np.arange(windows.in_shard[shard]))
        ):
            return f"shard {windows.table.name(shard)} is not read once"
    return ""


def _wrong_batches(
    recorded: RecordedPlan,
    batches: Batches,
    stretch: _Stretch,
    windows: Mapping[str, _Windows],
    draw: random.Random,
) -> dict[str, str]:
    """Sources of which a batch holds something else than the mixture and the order say."""
    size = recorded.global_batch_size
    mixture = stretch.segment.mixture(size)
    steps = range(stretch.first, stretch.end)
    chosen = {steps[0], steps[-1], *draw.sample(steps, min(len(steps), DRAWN_STEPS))}
    wrong: dict[str, str] = {}
    for step in sorted(chosen):
        first = (step - stretch.first) * size
        which, ordinals = mixture.sources_of(first, first + size)
        found = batches.sample_ids(step)
        for k, source in enumerate(stretch.segment.sources):
            mine = np.flatnonzero(which == k)
            expected = windows[source.name].samples(stretch.before[source.name] + ordinals[mine])
            given = [found[number] for number in mine.tolist()]
            if given != expected:
                at = next(n for n, wanted in enumerate(expected) if given[n] != wanted)
                wrong.setdefault(
                    source.name,
                    f"step {step} consumes {given[at]}, the order gives {expected[at]}",
                )
    return wrong
