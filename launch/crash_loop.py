"""Judges whether a run is stuck: starts in a row that ended by themselves and got no further.

A start counts when it reached no new highest step and either recorded an error of its own, or died
in the same phase at the same step as the one before. It adds up over supervisors and machines, by
what the run's log says (`recorded_ends.py`); a supervisor knows its own starts better, and alone
knows those that never claimed the run.

Preemptions never add up: a start that left in order says nothing of the next.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How one start ended. Generation 0 never claimed the run; `error` is its own, or empty."""

    generation: int
    phase: str
    step: int
    reached: int
    error: str = ""
    in_order: bool = False


def crash_loop(ends: Sequence[Ended], reached_before: int) -> str | None:
    """What to tell when the newest of these starts, oldest first, are a crash loop."""
    highest, count = reached_before, 0
    previous: Ended | None = None
    for end in ends:
        progress = end.reached > highest
        highest = max(highest, end.reached)
        if end.in_order and not progress:
            continue
        again = previous is not None and (end.phase, end.step) == (previous.phase, previous.step)
        count = count + 1 if not progress and (end.error or again) else 0
        previous = end
    if previous is None or count < MOST:
        return None
    return (
        f"crash loop: {count} starts in a row ended without a new step, the last in phase "
        f"{previous.phase!r} at step {previous.step}: "
        f"{previous.error or 'it died without an error of its own'}. No restart helps: find the "
        "cause, then start again"
    )


def together(recorded: Sequence[Ended], seen: Sequence[Ended]) -> list[Ended]:
    """Recorded starts with those that this supervisor saw in their places, oldest first.

    A start that never claimed lies right before the next one seen that did.
    """
    known = {end.generation for end in seen}
    placed = [(float(e.generation), e) for e in recorded if e.generation not in known]
    mine: list[tuple[float, Ended]] = []
    upcoming = math.inf
    for end in reversed(seen):
        upcoming = end.generation or upcoming
        mine.append((end.generation or upcoming - 0.5, end))
    return [end for _, end in sorted([*placed, *mine[::-1]], key=lambda pair: pair[0])]
