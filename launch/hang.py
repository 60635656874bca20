"""Whether a rank hangs: how long each kind of work may take, learnt from how long it took.

A computation that has no news for ten times its rolling median has stopped, but never before a
minute. What waits for a store has longer, since a store's own patience is minutes.
"""

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

FACTOR = 10.0
FLOOR_SECONDS = {"step": 60.0, "evaluate": 60.0, "sample": 60.0}
"""By kind of work; any other waits for data or for a store, and has `STORE_FLOOR_SECONDS`."""
STORE_FLOOR_SECONDS = 600.0
_REMEMBERED = 50
OWN_KINDS = ("evaluate", "sample", "wait_for_save", "edit")
"""Phases between steps, as far as `:`; any other, in a step, is of its computation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hang:
    """A rank without news for longer than its limit. Rank -1: none has said anything yet."""

    rank: int
    phase: str
    step: int
    seconds: float
    limit: float

    def __str__(self) -> str:
        who = f"rank {self.rank}" if self.rank >= 0 else "torchrun"
        return (
            f"{who} hangs in phase {self.phase!r} at step {self.step}: no news for "
            f"{self.seconds:.1f} s, where {self.limit:.1f} s are the limit"
        )


class AwakeClock:
    """Seconds in which somebody looked: a gap between two looks counts as one of at most five.

    A supervisor that was itself stopped (SIGSTOP, a frozen container, a suspended machine) has not
    heard its ranks, and must not take that for their silence.
    """

    def __init__(self, clock: Callable[[], float], longest: float = 5.0) -> None:
        self._clock = clock
        self._longest = longest
        self._last = clock()
        self._seconds = 0.0

    def __call__(self) -> float:
        now = self._clock()
        self._seconds += min(max(0.0, now - self._last), self._longest)
        self._last = now
        return self._seconds


@dataclass(slots=True)
class _Work:
    kind: str
    phase: str
    step: int
    since: float


class HangWatch:
    """Told every place of every rank of one start; says who is overdue. Its clock looks often."""

    def __init__(self, start_limit_seconds: float, clock: Callable[[], float]) -> None:
        self._start_limit = start_limit_seconds
        self._clock = clock
        self._work = {-1: _Work("torchrun", "torchrun", 0, clock())}
        self._first_step: dict[int, int] = {}
        self._took: dict[str, deque[float]] = {}

    def heard(self, rank: int, phase: str, step: int) -> None:
        """A rank has entered a phase."""
        self._work.pop(-1, None)
        now = self._clock()
        kind = self._kind(rank, phase, step)
        before = self._work.get(rank)
        if before is not None and before.kind == kind and kind not in ("start", "data"):
            before.phase, before.step = phase, step
            return
        if before is not None and before.kind != "start":
            took = self._took.setdefault(before.kind, deque(maxlen=_REMEMBERED))
            took.append(now - before.since)
        self._work[rank] = _Work(kind, phase, step, now)

    def ended(self, rank: int) -> None:
        """A rank has said its last word."""
        self._work.pop(rank, None)

    def hang(self) -> Hang | None:
        """The rank that is longest beyond its limit, if one is."""
        now = self._clock()
        late = [
            Hang(rank=rank, phase=w.phase, step=w.step, seconds=now - w.since, limit=limit)
            for rank, w in self._work.items()
            if now - w.since > (limit := self._limit(w.kind))
        ]
        return max(late, key=lambda hang: hang.seconds - hang.limit, default=None)

    def _kind(self, rank: int, phase: str, step: int) -> str:
        """What a phase is: until the first step of a start is done, the start (it may compile)."""
        first = self._first_step.get(rank)
        if first is None:
            if phase == "step":
                self._first_step[rank] = step
            return "start"
        if step <= first:
            return "start"
        if phase == "step":
            return "data"  # it waits for its rows before it computes
        kind = phase.partition(":")[0]
        return kind if kind in OWN_KINDS else "step"

    def _limit(self, kind: str) -> float:
        took = self._took.get(kind)
        if kind == "start" or not took:
            return self._start_limit
        floor = FLOOR_SECONDS.get(kind, STORE_FLOOR_SECONDS)
        return max(floor, FACTOR * statistics.median(took))
