"""Where the seconds of this start went, by part, since its process began.

Covers: parts that add up to the age of the process, to the millisecond, whenever they are told; a
clock that is set while the program runs, because ages come from one that nobody sets.
Does not cover: time before the process began, and after its last heartbeat.
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpointing.beats import read_beat
from storage.errors import StoreUnavailableError

if TYPE_CHECKING:
    from checkpointing.history import History
    from storage.store import Store

PARTS = (
    *("start", "compile", "restore", "replay", "data_wait", "save", "evaluate", "step", "other"),
)
"""`step` is the useful one. `compile` is what the first step takes longer than the second."""

_STEPS = ("step", "replay", "compile")

_LOOK_BACK = 10
"""Earlier starts whose heartbeats are looked for; one that lived for a second left one."""

PART_OF = {
    **dict.fromkeys(("rendezvous", "open", "claim", "prepare"), "start"),
    "restore": "restore",
    "step": "step",
    "wait_for_save": "save",
    **dict.fromkeys(("evaluate", "sample"), "evaluate"),
    "edit": "other",
}
"""Part by phase, as far as `:`. Other phases lie within a step, and cost no look at a clock."""


class TimeLedger:
    """Fed by the phases of the program's main thread; told by any.

    `reached` is the highest step that an earlier incarnation had finished: steps up to there are
    replayed. `waited_seconds` gives the wait for data so far, `stalled_seconds` what saves have
    taken from steps so far; both are taken out of the steps.
    """

    def __init__(
        self,
        *,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        wall_clock: Callable[[], float] = time.time,
        age_seconds: Callable[[], float] | None = None,
    ) -> None:
        self.reached = 0
        self.waited_seconds: Callable[[], float] = lambda: 0.0
        self.stalled_seconds: Callable[[], float] = lambda: 0.0
        self._clock_ns = clock_ns
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._ns = dict.fromkeys(PARTS, 0)
        self._taken = {"data_wait": 0, "save": 0}
        self._part = "start"
        self._steps_begun = 0
        self._first_kind = "step"
        self._before_second = 0
        self._mark = clock_ns()
        self._ns["start"] = round((age_seconds or process_age_seconds)() * 1e9)

    def __call__(self, phase: str, step: int) -> None:
        """The main thread enters a phase; `step` counts finished steps."""
        part = PART_OF.get(phase.partition(":")[0])
        if part is None:
            return
        with self._lock:
            self._account()
            self._part = self._begin_step(step) if part == "step" else part

    def told(self) -> dict[str, Any]:
        """For the heartbeat: unix seconds, and the seconds of each part. They add up.

        `began` is told by the wall clock as it is now, so that one that was wrong when the machine
        started is not believed.
        """
        with self._lock:
            self._account()
            parts = {name: ns // 1_000_000 for name, ns in self._ns.items()}
            age = sum(self._ns.values()) // 1_000_000
            parts["other"] += age - sum(parts.values())
            now = round(self._wall_clock() * 1000)
            return {
                "began": (now - age) / 1000,
                "now": now / 1000,
                "reached": self.reached,
                "parts": {name: milliseconds / 1000 for name, milliseconds in parts.items()},
            }

    def _begin_step(self, step: int) -> str:
        """The part that a step after `step` finished ones belongs to.

        The first counts as compilation until the second is over, which shows what a step takes.
        """
        kind = "replay" if step < self.reached else "step"
        self._steps_begun += 1
        if self._steps_begun == 1:
            self._first_kind = kind
            return "compile"
        if self._steps_begun == 2:
            self._before_second = self._ns[kind]
        if self._steps_begun == 3:
            second = "replay" if step - 1 < self.reached else "step"
            typical = self._ns[second] - self._before_second
            back = max(0, min(typical, self._ns["compile"]))
            self._ns["compile"] -= back
            self._ns[self._first_kind] += back
        return kind

    def _account(self) -> None:
        """Charge the time since the last look to the present part."""
        now = self._clock_ns()
        self._ns[self._part] += now - self._mark
        self._mark = now
        self._take_out("data_wait", self.waited_seconds())
        self._take_out("save", self.stalled_seconds())

    def _take_out(self, part: str, seconds: float) -> None:
        """Move what was measured elsewhere out of the steps, as far as these have it."""
        wanted = round(seconds * 1e9) - self._taken[part]
        for kind in sorted(_STEPS, key=lambda kind: kind != self._part):
            amount = max(0, min(wanted, self._ns[kind]))
            self._ns[kind] -= amount
            self._ns[part] += amount
            self._taken[part] += amount
            wanted -= amount


def reached_before(store: "Store", past: "History", generation: int) -> int:
    """The highest step that an incarnation before `generation` is known to have finished.

    From the COMMITs, and the newest heartbeat that can be read. Best effort: 0 where nothing is.
    """
    reached = max((c.step for c in past.checkpoints), default=0)
    for earlier in range(generation - 1, max(0, generation - 1 - _LOOK_BACK), -1):
        try:
            beat = read_beat(store, earlier)
        except StoreUnavailableError:
            break
        ledger = beat.get("time")
        told = ledger.get("reached") if isinstance(ledger, dict) else None
        steps = [x for x in (beat.get("step"), told) if isinstance(x, int)]
        reached = max([reached, *steps])
        if isinstance(told, int):
            break
    return reached


def process_age_seconds() -> float:
    """Seconds since this process began (proc(5), field 22); 0 on a host without /proc."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, AttributeError):
        return 0.0
