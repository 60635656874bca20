"""Where the wall time of a run went, all incarnations together, from its log and heartbeats alone.

Covers: incarnations that were killed, that never told their times, whose clocks disagree: no part
is negative, and the parts add up to the wall time, to the millisecond.
Does not cover: starts that ended before they claimed the run, and the up to five seconds between
the last heartbeat and a kill; both are in the gap.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from checkpointing.beats import read_beat
from checkpointing.naming import read_run
from launch.grace import deadlines
from launch.time_ledger import PARTS
from storage.log import Log, Record
from storage.store import Store, open_store

GAP = "gap"
"""No incarnation was alive: a machine was waited for, or nobody started the program."""

_READERS = 8
_MOST = 1e12


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """One incarnation, in milliseconds since 1970 by its own host's clock.

    `parts` add up to `ended` - `began`. `told` when they come from its heartbeat; without one, all
    that the log shows of it is `other`. `new_steps` are steps that none before had reached.
    """

    generation: int
    began: int
    ended: int
    parts: Mapping[str, int]
    told: bool = False
    new_steps: int = 0
    beat: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """The wall time of a run, in milliseconds; `parts` add up to `wall`."""

    wall: int
    parts: Mapping[str, int]
    incarnations: int
    untold: int
    """Incarnations of which only the log tells."""
    notices_met: int
    notices_missed: int

    @property
    def goodput(self) -> float | None:
        """Useful step time over wall time; None where there is none."""
        return self.parts["step"] / self.wall if self.wall else None

    @property
    def goodput_alive(self) -> float | None:
        """Useful step time over the time in which an incarnation was alive."""
        alive = self.wall - self.parts[GAP]
        return self.parts["step"] / alive if alive else None

    def to_json(self) -> dict[str, Any]:
        """All of it, in seconds."""
        return {
            "wall_seconds": self.wall / 1000,
            "parts": {name: amount / 1000 for name, amount in self.parts.items()},
            "goodput": self.goodput,
            "goodput_alive": self.goodput_alive,
            "incarnations": self.incarnations,
            "untold": self.untold,
            "notices_met": self.notices_met,
            "notices_missed": self.notices_missed,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a run measured of itself; None where it has not yet."""

    step_seconds: float | None
    stall_seconds: float | None
    durable_seconds: float | None
    restart_seconds: float | None


def read_lives(store: Store, records: Sequence[Record]) -> list[Life]:
    """The incarnations of a run, by generation. `records` are all of its log."""
    spans = _spans(records)
    generations = sorted({*spans, *_beating(store.list("beats/"))})
    with ThreadPoolExecutor(_READERS) as pool:
        beats = pool.map(lambda generation: read_beat(store, generation), generations)
        found = [
            life_of(generation, spans.get(generation), beat)
            for generation, beat in zip(generations, beats, strict=True)
        ]
    return [life for life in found if life is not None]


def lives_of(url: str) -> list[Life]:
    """The incarnations of the run at a path or URL; ConfigurationError where there is no run."""
    store = open_store(url)
    read_run(store)
    return read_lives(store, Log(store, whole=True).refresh())


def account(lives: Sequence[Life]) -> Account:
    """Add up the incarnations, in the order of their generations, and the gaps between them.

    Durations were measured on clocks that nobody sets, and are believed; dates only tell the gaps.
    One that began while the one before still lived, waiting for its end, is counted from that end
    on; what is more than its start is a clock that was set, and is no overlap.
    """
    parts = dict.fromkeys((GAP, *PARTS), 0)
    for place, life in enumerate(lives):
        for name, amount in life.parts.items():
            parts[name] += amount
        if place:
            between = life.began - lives[place - 1].ended
            parts[GAP] += max(0, between)
            parts["start"] -= min(life.parts["start"], max(0, -between))
    met, missed = deadlines(life.beat for life in lives)
    return Account(
        wall=sum(parts.values()),
        parts=parts,
        incarnations=len(lives),
        untold=sum(not life.told for life in lives),
        notices_met=met,
        notices_missed=missed,
    )


def measured(lives: Sequence[Life]) -> Measured:
    """The costs that the incarnations told of. The first start of a run is no restart."""
    told = [life for life in lives if life.told]
    steps = sum(life.new_steps for life in told)
    useful = sum(life.parts["step"] for life in told) / 1000
    saves = [_saves(life.beat) for life in told]
    count = sum(n for n, _, _ in saves)
    durable = [seconds for _, _, seconds in saves if seconds > 0]
    restarts = [
        sum(life.parts[name] for name in ("start", "restore", "compile")) / 1000
        for life in told
        if life is not lives[0] and life.parts["compile"] > 0
    ]
    return Measured(
        step_seconds=useful / steps if steps and useful else None,
        stall_seconds=sum(stalled for _, stalled, _ in saves) / count if count else None,
        durable_seconds=statistics.median(durable) if durable else None,
        restart_seconds=statistics.median(restarts) if restarts else None,
    )


def life_of(generation: int, span: tuple[int, int] | None, beat: Mapping[str, Any]) -> Life | None:
    """An incarnation from its last heartbeat and the times of its first and last record.

    What the log shows of it after its last heartbeat is `other`. None when neither is there.
    """
    ledger = _ledger(beat.get("time"))
    if ledger is None:
        if span is None:
            return None
        alive = max(0, span[1] - span[0])
        parts = {**dict.fromkeys(PARTS, 0), "other": alive}
        return Life(
            generation=generation, began=span[0], ended=span[0] + alive, parts=parts, beat=beat
        )
    now, parts = ledger
    later = max(0, span[1] - now) if span is not None else 0
    parts["other"] += later
    step, reached = beat.get("step"), beat["time"].get("reached")
    known = isinstance(step, int) and isinstance(reached, int)
    return Life(
        generation=generation,
        began=now + later - sum(parts.values()),
        ended=now + later,
        parts=parts,
        told=True,
        new_steps=max(0, step - reached) if known else 0,
        beat=beat,
    )


def _spans(records: Sequence[Record]) -> dict[int, tuple[int, int]]:
    """When the first and the last record of each generation were written."""
    spans: dict[int, tuple[int, int]] = {}
    for record in records:
        if record.generation > 0:
            at = round(record.written_at * 1000)
            first, _ = spans.get(record.generation, (at, at))
            spans[record.generation] = (first, at)
    return spans


def _beating(keys: Iterable[str]) -> list[int]:
    names = (key.removeprefix("beats/g").removesuffix(".json") for key in keys)
    return [int(name) for name in names if name.isdigit()]


def _ledger(told: object) -> tuple[int, dict[str, int]] | None:
    """When a heartbeat's times were told, and its parts; None when they are none of ours."""
    if not isinstance(told, dict) or not isinstance(told.get("parts"), dict):
        return None
    values = _amounts([told.get("now"), *(told["parts"].get(name) for name in PARTS)])
    if values is None:
        return None
    now, *amounts = (round(value * 1000) for value in values)
    return now, dict(zip(PARTS, amounts, strict=True))


def _saves(beat: Mapping[str, Any]) -> tuple[int, float, float]:
    """How many saves are over, what they took from steps, how long the newest took."""
    told = beat.get("saves")
    if not isinstance(told, dict):
        return 0, 0.0, 0.0
    names = ("count", "stalled_seconds", "durable_seconds")
    values = _amounts([told.get(name) for name in names])
    return (int(values[0]), values[1], values[2]) if values is not None else (0, 0.0, 0.0)


def _amounts(values: Sequence[object]) -> list[float] | None:
    """The values as numbers from 0, None when one of them is none, or is no time."""
    found = [x for x in values if isinstance(x, int | float) and not isinstance(x, bool)]
    good = len(found) == len(values) and all(0 <= x < _MOST for x in found)
    return [float(x) for x in found] if good else None
