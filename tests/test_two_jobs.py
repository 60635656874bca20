"""Two supervised jobs on one run, for a simulated day: one trains, the other waits for its turn.

The claims, the log, the heartbeats, and the supervisor's loop are the real ones.
"""

import random
import uuid

import pytest

from checkpointing.beats import Beats
from checkpointing.history import history
from checkpointing.incarnation import claim_run
from launch.crash_loop import Ended
from launch.exit_codes import FENCED, INTERNAL, START_AGAIN
from launch.outcome import Outcome
from launch.supervise import Backoff, mind
from storage.canonical import canonical_json
from storage.errors import RunBusyError
from storage.log import Log
from storage.store import Store, open_store
from tests.made_runs import RUN
from tests.simulated_day import Day

DAY = 86_400.0
IMPORT_SECONDS = 12.0
MEAN_LIFE_SECONDS = 2700.0


class Job:
    """Restarted for ever by its platform; preempted with or without a notice, or it crashes."""

    def __init__(self, day: Day, store: Store, seed: int, take_over: bool) -> None:
        self._day = day
        self._store = store
        self._random = random.Random(seed)
        self._take_over = take_over
        self._noticed = False
        self._step = 0
        self.owned_seconds = 0.0
        self.lives = 0
        self.said: list[str] = []

    def run(self) -> None:
        while True:
            self._noticed = False
            mind(
                self._start,
                lambda came: None,
                wait=self._wait,
                noticed=lambda: self._noticed,
                say=self.said.append,
                backoff=Backoff(self._random.uniform),
            )
            self._day.sleep(self._random.uniform(30.0, 300.0))  # a new machine, or a new pod

    def _wait(self, seconds: float) -> bool:
        self._day.sleep(seconds)
        return True

    def _start(self) -> Outcome:
        self._day.sleep(IMPORT_SECONDS)
        day = self._day
        try:
            owner = claim_run(
                self._store,
                Log(self._store),
                body={},
                take_over=self._take_over,
                clock=day.clock,
                sleep=day.sleep,
            )
        except RunBusyError as error:
            return self._came(START_AGAIN, str(error), busy=True)
        self.lives += 1
        beats = Beats(self._store, owner, lambda: ("step", self._step))
        end = day.clock() + self._random.expovariate(1 / MEAN_LIFE_SECONDS)
        while day.clock() < end:
            beats._beat()
            if beats.fenced:
                return self._came(FENCED, "fenced")
            day.sleep(5.0)
            self.owned_seconds += 5.0
            self._step += 5
        how = self._random.choice(["notice", "taken", "crash"])
        self._noticed = how != "crash"
        if how == "notice":
            beats._left = True
            beats._beat()
        return self._came(INTERNAL if how == "crash" else START_AGAIN, how)

    def _came(self, code: int, cause: str, *, busy: bool = False) -> Outcome:
        ended = Ended(generation=0, phase="step", step=self._step, reached=self._step)
        return Outcome(code=code, cause=cause, ended=ended, busy=busy)


def simulate(seconds: float, *, take_over: bool) -> tuple[int, list[Job]]:
    """How many claims so many seconds saw, and the jobs."""
    store = open_store(f"memory://{uuid.uuid4().hex}")
    store.put("run.json", canonical_json(RUN))
    day = Day(seconds)
    jobs = [Job(day, store, seed, take_over) for seed in (1, 2)]
    day.run([job.run for job in jobs])
    return history(Log(store).refresh()).generation, jobs


@pytest.mark.parametrize("seconds", [DAY / 4, pytest.param(DAY, marks=pytest.mark.soak)])
def test_two_jobs_on_one_run_do_not_fight_for_it(seconds: float) -> None:
    claims, jobs = simulate(seconds, take_over=False)
    lives = sum(job.lives for job in jobs)
    assert claims == lives < 3 * seconds / MEAN_LIFE_SECONDS
    assert sum(job.owned_seconds for job in jobs) > 0.9 * seconds
    waits = [line for job in jobs for line in job.said if "is in use by generation" in line]
    assert len(waits) < 1000
    assert waits and all("on host " in line and "in phase 'step' at step" in line for line in waits)


@pytest.mark.soak
def test_two_jobs_that_take_over_fight_all_day() -> None:
    """The control: what claims by force is fenced by force."""
    claims, _jobs = simulate(DAY, take_over=True)
    assert claims > 400
