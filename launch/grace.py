"""The time between a notice and the deadline: what fits into it, and that nothing goes past it.

The deadline is what the supervisor wrote, else the notice plus `--grace_seconds`. Estimates are
medians of what was measured in this start; before anything was measured, it is tried.

Covers: a main thread, a store or another process that hangs; a clock that is set meanwhile.
Does not cover: a platform that stops the process before the deadline; the last commit is then what
is left, as after any kill.
"""

import logging
import math
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from launch.exit_codes import START_AGAIN
from launch.notice import Notice
from launch.phase import Phase
from storage.errors import StopRequestedError

logger = logging.getLogger(__name__)

RESERVE_SECONDS = 1.0
"""Before the deadline, for the last heartbeat and the end of the process."""

LOOK_SECONDS = 1.0
"""How often, after a notice, it is looked for a deadline that has come nearer."""

LONGEST_SECONDS = 3600.0
"""A deadline further away than this is no platform's; a clock is wrong."""


class Grace:
    """Use it with `with`, around all that may hang: at the deadline the process exits 75.

    `leave` is called before that, for as long as the reserve lasts. `save_seconds` says how long a
    save that begins now would take, 0 before any was measured; `saved_step` the newest step that a
    start would find. The clocks are monotonic and that of the wall; `end` ends the process.
    """

    def __init__(
        self,
        notice: Notice,
        phase: Phase,
        *,
        seconds: float,
        deadline_file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._notice = notice
        self._phase = phase
        self._seconds = seconds
        self._deadline_file = deadline_file
        self._clock = clock
        self._wall_clock = wall_clock
        self._end = end
        self._deadline: float | None = None
        self._told: float | None = None
        self._steps: deque[float] = deque(maxlen=50)
        self._step_began = clock()
        self._wake, self._over = threading.Event(), threading.Event()
        self._at_once = False
        self._settled: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._watch, name="deadline", daemon=True)
        self.save_seconds: Callable[[], float] = lambda: 0.0
        self.saved_step: Callable[[], int] = lambda: phase.step
        self.leave: Callable[[], object] = lambda: None

    def __enter__(self) -> "Grace":
        self._thread.start()
        self._notice.heard = self._wake.set
        if self.requested():
            self._wake.set()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._wake.set()
        self._thread.join()

    def requested(self) -> bool:
        """Whether a notice has come."""
        return self._notice.requested()

    def check(self) -> None:
        """Raise StopRequestedError after a notice; for where there is nothing to save."""
        if self.requested():
            raise StopRequestedError(
                f"asked to stop in phase {self._phase.name!r}, with nothing that is not saved"
            )

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a notice ends the process at once: nobody depends on it, nothing is begun."""
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def left(self) -> float:
        """Seconds until the process must begin to leave; infinite without a notice."""
        if not self.requested():
            return math.inf
        return self._until() - RESERVE_SECONDS - self._clock()

    def gives_up(self, done: int, of: int) -> bool:
        """Whether the rest of a step, and a save after it, do not fit into what is left.

        For a step to ask before each micro-batch, `done` of `of` being over. The rest is the
        unfinished part of a median step, or more where this one is slower.
        """
        if done == 0:
            self._step_began = self._clock()
        if not self.requested():
            return False
        rest = self._step_seconds() * (of - done) / of
        if done:
            rest = max(rest, (self._clock() - self._step_began) / done * (of - done))
        return rest + self.save_seconds() > self.left()

    def step_is_over(self) -> None:
        """The step that was last asked for is made."""
        self._steps.append(self._clock() - self._step_began)

    def no_time(self) -> bool:
        """Whether a save that begins now would not be durable by the deadline."""
        return self.requested() and self.save_seconds() > self.left()

    def settle(self) -> None:
        """Note whether the deadline is met: all finished steps are saved. Before the last beat."""
        if not self.requested() or self._settled:
            return
        said = self.beat()["notice"]
        met = said["left_seconds"] >= 0 and said["saved_step"] >= self._phase.step
        self._settled = {"notice": said | {"met": met}}
        logger.log(
            logging.INFO if met else logging.WARNING,
            "notice: the deadline of %.1f s is %s with %.1f s left; step %d is saved, step %d was "
            "reached",
            said["deadline_seconds"],
            "met" if met else "missed",
            said["left_seconds"],
            said["saved_step"],
            self._phase.step,
        )

    def beat(self) -> dict[str, Any]:
        """For the heartbeat: the notice, if one has come; `met` is None until the end."""
        if self._settled or self._notice.asked_at is None:
            return self._settled
        ago = self._clock() - self._notice.asked_at
        return {
            "notice": {
                "asked": round(self._wall_clock() - ago, 3),
                "deadline_seconds": round(self._until() - self._notice.asked_at, 3),
                "left_seconds": round(self._until() - self._clock(), 3),
                "met": None,
                "saved_step": self.saved_step(),
            }
        }

    def _until(self) -> float:
        """The deadline on the monotonic clock; what is told is compared with the wall's once.

        A second notice may be more urgent than the first: then something else is told.
        """
        told = _told_deadline(self._deadline_file)
        if self._deadline is None or told != self._told:
            self._told = told
            asked_at = self._notice.asked_at
            assert asked_at is not None, "asked after a notice only"
            left = None if told is None else told - self._wall_clock()
            if left is not None and 0 < left <= LONGEST_SECONDS:  # else of an earlier notice
                self._deadline = self._clock() + left
            elif self._deadline is None:
                self._deadline = asked_at + self._seconds
        return self._deadline

    def _step_seconds(self) -> float:
        return statistics.median(self._steps) if self._steps else 0.0

    def _watch(self) -> None:
        """On a thread of its own: leave at the deadline, unless all is over before."""
        self._wake.wait()
        while not self._over.is_set():
            left = 0.0 if self._at_once else self.left()
            if left <= 0:
                self._leave_now()
                return
            self._over.wait(min(left, LOOK_SECONDS))

    def _leave_now(self) -> None:
        logger.warning("leaving in phase %r, as it is: there is no time left", self._phase.name)
        self.settle()
        last = threading.Thread(target=self.leave, name="last beat", daemon=True)
        last.start()
        last.join(max(0.0, RESERVE_SECONDS + self.left()))
        self._end(START_AGAIN)


def deadlines(beats: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """How many deadlines were met and missed, by the last beats of a run's incarnations.

    Missed is also that of a process which was stopped before it could say so.
    """
    notices = [beat["notice"] for beat in beats if isinstance(beat.get("notice"), Mapping)]
    met = sum(notice.get("met") is True for notice in notices)
    return met, len(notices) - met


def _told_deadline(place: Path | None) -> float | None:
    """What the file says, in seconds of the wall clock; None when it says nothing that is one."""
    if place is None:
        return None
    try:
        told = float(place.read_text())
    except (OSError, ValueError):
        return None
    return told if math.isfinite(told) else None
