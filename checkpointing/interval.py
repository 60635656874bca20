"""How often to save: from what a save costs, and how often the run has been preempted.

Pure functions. The interval balances the time that saves take from training against the steps that
a preemption makes the run repeat.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from checkpointing.history import History

PRIOR_SECONDS = 3 * 3600.0
"""Before a run knows better: one preemption in three hours, which counts as one observation."""

NEAR_SECONDS = 600.0
OVERALL_WEIGHT = 2
"""How far beyond twice its age an incarnation looks for what became of others, and how many
interruptions at the overall rate count beside theirs: chosen by simulation (docs/benchmarks.md)."""

GUESS_SECONDS = 1.0
"""What a save costs, before a run has made one."""

MAXIMUM_SECONDS = 30 * 60.0

MINIMUM_SECONDS = 15.0
"""Where a save costs nothing, requests to the store and records in the log still do."""


@dataclass(frozen=True, slots=True)
class Life:
    """How long an incarnation lived, in seconds, and whether it was interrupted."""

    seconds: float
    interrupted: bool


def lives(past: History, now: float) -> tuple[list[Life], float]:
    """The lives of this run's newest incarnations that are over, and the age of the one that lives.

    `now` is on the wall clock. Interrupted are those without an END that another generation
    followed, whatever stopped them.

    A life ends at the last record, not at the next CLAIM: the CLAIM has the clock of another host,
    and the wait for a new machine lies between. That is too short by half an interval on average,
    and errs towards more saves.
    """
    over, age = [], 0.0
    for lifespan in past.lifespans:
        alive = lifespan.generation == past.generation and not lifespan.ended
        until = now if alive else lifespan.last_sign_at
        seconds = max(0.0, until - lifespan.claimed_at)
        if alive:
            age = seconds
        else:
            interrupted = lifespan.generation < past.generation and not lifespan.ended
            over.append(Life(seconds, interrupted))
    return over, age


def mean_time_to_preemption(over: Iterable[Life], age: float) -> float:
    """Seconds that an incarnation of this age has left on average, if nothing changed with its age.

    Machines are lost more often soon after they came (Kadupitiya, Jadhao and Sharma, "Modeling the
    temporally constrained preemptions of transient cloud VMs", HPDC 2020). So this is the time
    lived from this age to twice it and ten minutes, over the interruptions in it, beside two
    interruptions at the rate of the whole run: the time of all lives over all interruptions, where
    the prior counts as one after three hours. (For exponential lifetimes the time lived over the
    interruptions is the most likely mean; a life that goes on adds its time, and none.)
    """
    lived, interruptions = PRIOR_SECONDS + age, 1
    near, interruptions_near = 0.0, 0
    until = 2 * age + NEAR_SECONDS
    for life in over:
        lived += life.seconds
        interruptions += life.interrupted
        near += max(0.0, min(life.seconds, until) - age)
        interruptions_near += life.interrupted and age <= life.seconds < until
    return (OVERALL_WEIGHT * lived / interruptions + near) / (OVERALL_WEIGHT + interruptions_near)


def interval_seconds(
    cost_seconds: float,
    mean_seconds: float,
    *,
    minimum_seconds: float,
    maximum_seconds: float = MAXIMUM_SECONDS,
) -> float:
    """Seconds from one save to the next: sqrt(2 * cost * mean), within the bounds.

    Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974.
    Daly's higher-order formula (FGCS 22(3), 2006, eq. 37) is about 2/3 of the cost shorter, which
    is nothing where a save costs less than a second, and it jumps where the cost is twice the mean.

    `cost_seconds` is what a save takes from training (effective stall), not the time until it is
    durable: that delays every save alike, and moves no optimum. `minimum_seconds` is the time until
    a save is durable; it wins over the maximum, because one save is in flight at most.
    """
    if not (cost_seconds >= 0 and mean_seconds > 0):
        raise ValueError(
            "cost_seconds must be at least 0 and mean_seconds above 0; "
            f"got {cost_seconds} and {mean_seconds}"
        )
    best = math.sqrt(2 * cost_seconds * mean_seconds)
    return max(minimum_seconds, min(best, maximum_seconds))


class SaveCost:
    """What a save takes from training: how much longer steps take while one is in flight.

    Measured against the median of the newest 50 steps without a save, so that interference is
    charged as well as waiting.
    """

    def __init__(self, seconds: float = GUESS_SECONDS) -> None:
        self._idle: deque[float] = deque(maxlen=50)
        self._extra = 0.0
        self._saving = False
        self.seconds = seconds
        """Of the newest save that is over; before, what is given."""
        self.saves = 0
        self.total_seconds = 0.0
        """Of all saves that are over, so many."""

    def step(self, seconds: float, *, saving: bool) -> None:
        """Charge one step, which took so long; `saving` if a save was in flight during it."""
        if saving and self._idle:
            self._extra += max(0.0, seconds - statistics.median(self._idle))
        if not saving:
            self._idle.append(seconds)
            if self._saving:
                self.seconds, self._extra = self._extra, 0.0
                self.saves += 1
                self.total_seconds += self.seconds
        self._saving = saving
