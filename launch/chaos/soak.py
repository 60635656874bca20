"""Many random faults in one run, all drawn before it begins: the same seed draws the same ones.

A blow is one or more faults at one place. In a blow the faults come at once, so that they meet.
"""

import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launch.chaos.marked import Role
from launch.chaos.scenarios import Scenario
from launch.chaos.trial import SHAPE, Place, Program, Trial, Violation
from launch.exit_codes import COMPLETE, START_AGAIN

Fault = Literal[
    "SIGTERM",
    "SIGINT",
    "second SIGTERM",
    "kill rank",
    "kill agent",
    "kill supervisor",
    "stop rank",
    "stop agent",
]

_KINDS: dict[Fault, int] = {
    "SIGTERM": 4,
    "SIGINT": 2,
    "kill rank": 6,
    "kill agent": 4,
    "kill supervisor": 4,
    "stop rank": 6,
    "stop agent": 4,
}
"""How often each is drawn, in proportion. A second SIGTERM follows a first."""

_ENDS_SUPERVISOR = {"SIGTERM", "SIGINT", "second SIGTERM", "kill supervisor"}
_STOPS: dict[Fault, Role] = {"stop rank": "rank", "stop agent": "agent"}
_KILLS: dict[Fault, Role] = {
    "kill rank": "rank",
    "kill agent": "agent",
    "kill supervisor": "supervisor",
}

_IN_A_START = ("import", "rendezvous", "open", "claim", "restore")
_IN_TRAINING = (
    *("step", "micro_batch", "micro_batch", "micro_batch", "reduce"),
    *("update:before", "update:after", "evaluate"),
    *("save:begin", "save:object", "save:uploaded", "save:manifest", "save:committed"),
)
_WORLDS = (*(1,) * 9, *(2,) * 5, 3, 4)

LONGEST_STOP_SECONDS = 0.5
MARGIN_STEPS = 40
"""Behind the last blow: an evaluation or a save may come so much later than it was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Blow:
    """Faults at one place: a phase of rank 0, at a step or later. `world` is that of its start."""

    world: int
    phase: str
    step: int
    faults: tuple[Fault, ...]
    stop_seconds: float

    @property
    def ends_start(self) -> bool:
        """Whether the ranks are started again after it."""
        return any(fault not in _STOPS for fault in self.faults)

    @property
    def ends_supervisor(self) -> bool:
        """Whether that must be done by another supervisor."""
        return any(fault in _ENDS_SUPERVISOR for fault in self.faults)

    def __str__(self) -> str:
        ranks = f"{self.world} rank{'s' * (self.world > 1)}"
        return f"{' + '.join(self.faults)} in {self.phase!r} from step {self.step} on, {ranks}"


def drawn(seed: int, count: int) -> list[Blow]:
    """Blows with `count` faults together."""
    draw = random.Random(f"{seed}/soak")
    blows: list[Blow] = []
    world, step, dealt = draw.choice(_WORLDS), 0, 0
    starting, in_starts = True, 0
    while dealt < count:
        faults = _faults(draw, count - dealt)
        # Two deaths in a start at most, between progress: more could be a crash loop.
        early = starting and in_starts < 2 and draw.random() < 0.25
        in_starts = in_starts + 1 if early else 0
        if not early:
            step += draw.randint(1, 3)
        blow = Blow(
            world=world,
            phase=draw.choice(_IN_A_START if early else _IN_TRAINING),
            step=0 if early else step,
            faults=faults,
            stop_seconds=round(draw.uniform(0.0, LONGEST_STOP_SECONDS), 2),
        )
        blows.append(blow)
        dealt += len(faults)
        starting = blow.ends_start
        if blow.ends_supervisor:
            world = draw.choice(_WORLDS)
    return blows


def shape(blows: Sequence[Blow]) -> tuple[str, ...]:
    """The training flags of a run that is long enough for them."""
    steps = max(blow.step for blow in blows) + MARGIN_STEPS
    return (*SHAPE, f"--max_steps={steps}")


def soak(blows: Sequence[Blow]) -> Scenario:
    """The scenario that deals them."""
    faults = sum(len(blow.faults) for blow in blows)
    return Scenario(
        name="soak",
        about=f"{faults} faults in {len(blows)} places of one run",
        act=lambda trial: _deal(trial, blows),
    )


def _deal(trial: Trial, blows: Sequence[Blow]) -> None:
    program: Program | None = None
    for number, blow in enumerate(blows):
        if program is None:
            program = trial.start(trial.supervisor(blow.world), stop=(blow.phase, blow.step))
        place = program.stopped_or_ended()
        if place is None:
            raise Violation(f"{program.folder.name} ended before blow {number + 1}: {blow}")
        trial.fault(str(blow))
        if not blow.ends_supervisor and number + 1 < len(blows):  # asked for before it goes on
            program.stop(blows[number + 1].phase, blows[number + 1].step)
        _strike(program, place, blow)
        if blow.ends_supervisor:
            program.end(START_AGAIN, -signal.SIGKILL)
            program = None
    if program is None:
        trial.complete()
    else:
        program.end(COMPLETE)


def _strike(program: Program, place: Place, blow: Blow) -> None:
    """What is stopped goes on before anything is killed, unless both are in one blow."""
    stopped: list[int] = []
    for fault in blow.faults:
        if fault in _STOPS:
            stopped += _send(program, _STOPS[fault], signal.SIGSTOP)
            time.sleep(blow.stop_seconds)
        elif fault in _KILLS:
            _send(program, _KILLS[fault], signal.SIGKILL)
        else:
            program.signal(signal.SIGINT if fault == "SIGINT" else signal.SIGTERM)
    for pid in stopped:
        Place(pid, place.step).go_on()
    place.go_on()


def _send(program: Program, role: Role, number: signal.Signals) -> list[int]:
    """To the first process that is one, if there is still any; whom it was sent to."""
    found = program.processes(role)[:1]
    for pid in found:
        Place(pid, 0).signal(number)
    return found


def _faults(draw: random.Random, most: int) -> tuple[Fault, ...]:
    """One, or a burst of two or three."""
    size = min(most, draw.choice((1, 1, 2, 2, 3)))
    faults: list[Fault] = list(draw.choices(list(_KINDS), list(_KINDS.values()), k=size))
    if faults[0] == "SIGTERM" and size > 1 and draw.random() < 0.5:
        faults[1] = "second SIGTERM"
    return tuple(faults)
