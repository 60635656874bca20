"""What a spot trace would cost a run: a discrete simulation, exact in microseconds.

Pure and deterministic: a trace, costs and a policy in; node-seconds by what became of them out. The
parts add up to the available time, to the microsecond.

Covers: losses with and without notice, saves that block or run beside training, one save in flight,
the interval that a run chooses for itself, a world that shrinks at once and grows after a save.
Does not cover: losses that a trace does not show, because the machine was replaced within a tick;
stores or machines that fail; snapshots on hosts that survive; the first save of a run, before which
`auto` has to guess what one costs.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from checkpointing.history import MOST_LIFESPANS
from checkpointing.interval import (
    MINIMUM_SECONDS,
    Life,
    interval_seconds,
    mean_time_to_preemption,
)
from storage.errors import ConfigurationError

Mode = Literal["single", "gang", "elastic"]

MODES: tuple[Mode, ...] = ("single", "gang", "elastic")

PARTS = ("useful", "lost", "restart", "save", "leaving", "waiting")
"""What becomes of available time. `lost`: steps whose results went with the machine. `leaving`:
after a notice, when all is saved. `waiting`: machines that join at the next save."""

_MICRO = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A stretch of a trace with the same number of usable nodes, in microseconds."""

    begin: int
    end: int
    nodes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What a run measured of itself.

    `step_seconds` is that of the full world. `stall_seconds` is what a save takes from training,
    `durable_seconds` the time from its beginning until it counts. `restart_seconds` is from a
    machine that is there to the first new step.
    """

    step_seconds: float
    stall_seconds: float
    durable_seconds: float
    restart_seconds: float

    def __post_init__(self) -> None:
        rest = (self.stall_seconds, self.durable_seconds, self.restart_seconds)
        if not (1e-6 <= self.step_seconds < math.inf and all(0 <= x < math.inf for x in rest)):
            raise ConfigurationError(
                f"seconds of a step must be at least 0.000001, the others at least 0; got {self}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """When to save, and what that costs. Neither seconds nor steps: as `--save_interval auto`."""

    name: str
    costs: Costs
    every_seconds: float = 0.0
    every_steps: int = 0

    def __post_init__(self) -> None:
        given = [x for x in (self.every_seconds, self.every_steps) if x]
        if len(given) > 1 or any(not 0 < x < math.inf for x in given):
            raise ConfigurationError(
                f"a policy has one interval above 0, in seconds or steps, or none; got {self}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of the available time. `parts` are in microseconds of the whole world."""

    available: int
    parts: dict[str, int]
    losses: int
    restarts: int
    saves: int
    notices_met: int = 0
    notices_missed: int = 0

    @property
    def goodput(self) -> float:
        """Useful time over available time; 1 where nothing was ever available."""
        return self.parts["useful"] / self.available if self.available else 1.0


def segments(counts: Sequence[int], gap_seconds: float, mode: Mode, nodes: int) -> list[Segment]:
    """The stretches of a trace in which the usable number of nodes stays the same.

    A single host is 0 or 1 node; a gang is 0 or `nodes`, counted as one; elastic is 0 to `nodes`.
    """
    gap = round(gap_seconds * _MICRO)
    found: list[Segment] = []
    begin = 0
    for place in range(1, len(counts) + 1):
        here = _usable(counts[begin], mode, nodes)
        if place == len(counts) or _usable(counts[place], mode, nodes) != here:
            found.append(Segment(begin=begin * gap, end=place * gap, nodes=here))
            begin = place
    return found


def simulate(
    stretches: Sequence[Segment], policy: Policy, *, nodes: int, notice_seconds: float = 0.0
) -> Outcome:
    """Run through a trace. `nodes` is the full world, 1 for a single host and for a gang.

    A loss takes what is not durable by then; with `notice_seconds` the run is told so long before,
    finishes its step, saves and leaves, where that fits. The end of the trace is no loss.
    """
    run = _Run(policy, nodes, notice=round(notice_seconds * _MICRO))
    for here, after in _with_next(stretches):
        run.enter(here)
        run.leave(here, after)
    return run.outcome()


def _usable(count: int, mode: Mode, nodes: int) -> int:
    if mode == "single":
        return min(count, 1)
    if mode == "gang":
        return int(count >= nodes)
    return min(count, nodes)


def _with_next(stretches: Sequence[Segment]) -> Iterator[tuple[Segment, Segment | None]]:
    for place, here in enumerate(stretches):
        yield here, stretches[place + 1] if place + 1 < len(stretches) else None


class _Run:
    """A run in a trace. Work and parts are in node-microseconds until the outcome.

    `now` is how far time is accounted; a save or a restart may put it behind the segment's end.
    """

    def __init__(self, policy: Policy, nodes: int, *, notice: int) -> None:
        costs = policy.costs
        self._policy = policy
        self._nodes = nodes
        self._notice = notice
        self._step = max(1, round(costs.step_seconds * _MICRO))
        self._stall = round(costs.stall_seconds * _MICRO)
        self._durable = max(self._stall, round(costs.durable_seconds * _MICRO))
        self._restart = round(costs.restart_seconds * _MICRO)
        self._lives = _Lives()
        self._world = 0
        self._wanted = 0
        self._mark = 0  # since when the wanted world and the present one are what they are
        self._now = 0
        self._ready: int | None = None  # when the restart under way is over
        self._due = 0
        self._pending: int | None = None  # when the save in flight is durable
        self._growing = False  # the save in flight is the last one of this world
        self._saving, self._unsaved = 0, 0  # work in the save in flight, and after its beginning
        self._parts = dict.fromkeys(PARTS, 0)
        self._available = self._losses = self._restarts = self._saves = 0
        self._met = self._missed = 0

    def enter(self, here: Segment) -> None:
        """The number of nodes is that of `here` from its beginning on."""
        self._count_waiting(here.begin)
        self._wanted = here.nodes
        if here.nodes > 0 and self._world == 0:
            self._begin_restart(here.begin, here.nodes)

    def leave(self, here: Segment, after: Segment | None) -> None:
        """Go on to the end of `here`, and suffer what comes then."""
        self._available += here.nodes * (here.end - here.begin)
        left = self._nodes if after is None else after.nodes
        loss = after is not None and left < self._world
        if loss and self._notice:
            told = max(here.begin, here.end - self._notice)
            self._advance(told)
            loss = after is not None and left < self._world  # it may have grown until then
            if loss and self._leave_in_time(told, here.end, left):
                self._advance(here.end)
                return
        self._advance(here.end)
        if after is not None and left < self._world:
            self._lose(here.end, left)
        elif after is None:
            self._cut(here.end)

    def outcome(self) -> Outcome:
        """What became of it all. The work at hand is not lost when a trace ends."""
        self._count_waiting(self._now if self._world else self._mark)
        self._parts["useful"] += self._saving + self._unsaved
        assert sum(self._parts.values()) == self._available, "each node-microsecond is in one part"
        return Outcome(
            available=self._available // self._nodes,
            parts=_scaled(self._parts, self._available, self._nodes),
            losses=self._losses,
            restarts=self._restarts,
            saves=self._saves,
            notices_met=self._met,
            notices_missed=self._missed,
        )

    def _advance(self, until: int) -> None:
        """Restart, train and save up to `until`: whole steps, and what was begun before."""
        while self._world and self._now < until:
            if self._ready is not None:
                self._pass("restart", min(until, self._ready))
                if self._now < self._ready:
                    return
                self._ready = None
                self._lives.begin(self._now)
                self._due = self._next_due(self._now)
            elif self._growing:
                self._commit()
                self._growing = False
                self._lives.end()
                self._begin_restart(self._now, self._wanted)
            elif not self._train_to_save(until):
                return

    def _train_to_save(self, until: int) -> bool:
        """Whole steps until a save begins; False when `until` comes before."""
        duration = self._duration()
        begin = self._due if self._pending is None else max(self._due, self._pending)
        steps = max(1, -((self._now - begin) // duration))
        fit = (until - self._now) // duration
        steps_now = min(steps, fit)
        self._unsaved += self._world * duration * steps_now
        self._now += duration * steps_now
        if fit < steps:
            return False
        self._commit()
        self._begin_save()
        return True

    def _begin_save(self) -> None:
        self._saves += 1
        self._saving, self._unsaved = self._unsaved, 0
        begun = self._now
        self._pending = begun + self._durable
        self._growing = self._wanted > self._world
        self._pass("save", self._pending if self._growing else begun + self._stall)
        self._due = self._next_due(begun)

    def _leave_in_time(self, told: int, end: int, left: int) -> bool:
        """After a notice: finish the step if that fits, save, leave. False: nothing was saved."""
        if self._ready is not None or self._growing:
            return False  # there is nothing new to save, or that is being done
        free = max(self._now, self._pending or 0, told)
        step_over = self._now + self._duration()
        if self._now < told and max(free, step_over) + self._durable <= end:
            self._unsaved += self._world * self._duration()
            self._now = step_over
            free = max(free, step_over)
        elif free + self._durable <= end:
            self._pass("lost", max(told, self._now))  # the step is abandoned
        else:
            self._missed += 1
            return False
        self._pass("save", free + self._durable)
        self._saving, self._unsaved = self._saving + self._unsaved, 0
        self._pending = self._now
        self._commit()
        self._lives.end()
        self._met += 1
        self._saves += 1
        self._losses += 1
        if left:
            self._begin_restart(self._now, left)
            self._parts["leaving"] += (self._wanted - left) * (end - self._now)
            self._wanted = left  # those that leave are no newcomers
            return True
        self._pass("leaving", end)
        self._count_waiting(end)
        self._world = 0
        return True

    def _lose(self, end: int, left: int) -> None:
        """Some of the world is gone at `end`; the others start again from what is durable."""
        self._cut(end)
        if self._pending is not None and self._pending <= end:
            self._commit()
        self._parts["lost"] += self._saving + self._unsaved
        self._saving = self._unsaved = 0
        self._pending = None
        self._growing = False
        self._losses += 1
        self._lives.end()
        self._count_waiting(end)
        self._world, self._ready = 0, None
        if left:
            self._begin_restart(end, left)

    def _cut(self, end: int) -> None:
        """Account exactly to `end`: what was begun before ends there, in the middle."""
        if not self._world:
            return
        if self._now > end:
            self._parts["save"] -= self._world * (self._now - end)
            self._now = end
        self._pass("restart" if self._ready is not None else "lost", end)

    def _begin_restart(self, at: int, world: int) -> None:
        self._count_waiting(at)
        self._world = world
        self._now = at
        self._ready = at + self._restart
        self._restarts += 1

    def _commit(self) -> None:
        """The save in flight counts."""
        if self._pending is not None:
            self._lives.sign(self._pending)
            self._parts["useful"] += self._saving
            self._saving = 0
            self._pending = None

    def _pass(self, part: str, until: int) -> None:
        self._parts[part] += self._world * (until - self._now)
        self._now = until

    def _count_waiting(self, at: int) -> None:
        """Nodes that are there and not of the world, since the last change of either."""
        self._parts["waiting"] += (self._wanted - self._world) * (at - self._mark)
        self._mark = at

    def _duration(self) -> int:
        """A step of the present world: the speed is proportional to it."""
        return max(1, self._step * self._nodes // self._world)

    def _next_due(self, begun: int) -> int:
        """When the save after the one that `begun` names is due; training goes on at `now`."""
        policy = self._policy
        if policy.every_steps:
            return self._now + self._duration() * policy.every_steps
        if policy.every_seconds:
            return begun + round(policy.every_seconds * _MICRO)
        costs = policy.costs
        seconds = interval_seconds(
            costs.stall_seconds,
            self._lives.mean_seconds(self._now),
            minimum_seconds=max(MINIMUM_SECONDS, costs.durable_seconds),
        )
        return begun + round(seconds * _MICRO)


class _Lives:
    """How long incarnations live, as a run's log tells it."""

    def __init__(self) -> None:
        self._over: deque[Life] = deque(maxlen=MOST_LIFESPANS - 1)
        self._claimed: int | None = None
        self._last_sign = 0

    def begin(self, now: int) -> None:
        """A life begins."""
        self._claimed = self._last_sign = now

    def sign(self, now: int) -> None:
        """It wrote a record."""
        self._last_sign = max(self._last_sign, now)

    def end(self) -> None:
        """It is over."""
        if self._claimed is not None:
            self._over.append(Life((self._last_sign - self._claimed) / _MICRO, interrupted=True))
            self._claimed = None

    def mean_seconds(self, now: int) -> float:
        """Until the next preemption, for the life that goes on."""
        age = 0 if self._claimed is None else now - self._claimed
        return mean_time_to_preemption(self._over, age / _MICRO)


def _scaled(parts: dict[str, int], available: int, nodes: int) -> dict[str, int]:
    """Node-microseconds as microseconds of the whole world; what rounding leaves is lost."""
    scaled = {name: amount // nodes for name, amount in parts.items()}
    scaled["lost"] += available // nodes - sum(scaled.values())
    return scaled
