"""Visits every state of the model."""

from collections import Counter, deque
from dataclasses import dataclass
from typing import NamedTuple

from tests.protocol_invariants import broken_by, broken_in, fresh_start
from tests.protocol_model import Rules, Scenario, State
from tests.protocol_moves import Protocol

Reached = dict[State, tuple[State, str, str] | None]


class Trace(NamedTuple):
    """How a state was reached: (process, rule) from the start on, and the names that it breaks."""

    steps: tuple[tuple[str, str], ...]
    breaks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Explored:
    """What an exploration met. `violation` is one of the shortest; None when all states hold."""

    states: int
    transitions: int
    rules: Counter[str]
    violation: Trace | None
    reached: Reached

    def trace(self, state: State) -> tuple[tuple[str, str], ...]:
        """The shortest way to a state."""
        return _way(self.reached, state)


def explore(
    scenario: Scenario, rules: Rules | None = None, *, wanted: str | None = None
) -> Explored:
    """Visit every reachable state, breadth first; stop at the first that breaks an invariant.

    `wanted` names the only invariant to stop for.
    """
    protocol = Protocol(scenario, rules)
    reached: Reached = {scenario.start: None}
    waiting = deque([scenario.start])
    taken: Counter[str] = Counter()
    restartable: set[tuple[object, ...]] = set()
    violation: Trace | None = None
    while waiting and violation is None:
        state = waiting.popleft()
        for step in protocol.steps(state):
            taken[step.rule] += 1
            breaks = list(broken_by(protocol, state, step))
            if step.after not in reached:
                reached[step.after] = (state, step.process, step.rule)
                waiting.append(step.after)
                breaks += broken_in(protocol, step.after)
                place = (step.after.log, step.after.things)
                if not breaks and place not in restartable:
                    restartable.add(place)
                    if not fresh_start(protocol, step.after):
                        breaks = ["a fresh start claims and restores"]
            if breaks and (wanted is None or wanted in breaks):
                way = (*_way(reached, state), (step.process, step.rule))
                violation = Trace(way, tuple(dict.fromkeys(breaks)))
                break
    return Explored(
        states=len(reached),
        transitions=taken.total(),
        rules=taken,
        violation=violation,
        reached=reached,
    )


def _way(reached: Reached, state: State) -> tuple[tuple[str, str], ...]:
    steps = []
    while (came := reached[state]) is not None:
        state, process, rule = came
        steps.append((process, rule))
    return tuple(reversed(steps))
