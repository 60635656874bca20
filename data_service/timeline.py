"""How many samples each source of a plan has given by each step, over all its segments.

It follows from the plan and the global batch size alone: no source need be open. A source's samples
are numbered over its whole life; what a segment takes of it begins where the segments before ended.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_service.mixture import Mixture
from data_service.plan import Plan, Segment
from data_service.shares import NEVER, Integers


class Taken(NamedTuple):
    """What consecutive samples take of one source."""

    source: str
    samples: Integers
    """Which of the samples are its, counted from the first asked for."""
    positions: Integers
    """Which of the source's own samples they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _SegmentState:
    """A segment, and what went before it."""

    segment: Segment
    mixture: Mixture
    before: dict[str, int]


class Timeline:
    """The samples of a plan, step by step. Safe to use from several threads."""

    def __init__(self, plan: Plan, global_batch_size: int) -> None:
        self._batch = global_batch_size
        self._from_steps = [segment.from_step for segment in plan.segments]
        self._states: list[_SegmentState] = []
        self._skips: dict[str, list[tuple[int, int]]] = {name: [] for name in plan.sources}
        before = dict.fromkeys(plan.sources, 0)
        for segment in plan.segments:
            if self._states:
                at = self._counts_in(self._states[-1], segment.from_step)
                before = self._counts_in(self._states[-1], segment.from_step + segment.skip_steps)
                for name, count in before.items():
                    if at[name] < count:
                        self._skips[name].append((at[name], count))
            mixture = segment.mixture(global_batch_size)
            self._states.append(_SegmentState(segment=segment, mixture=mixture, before=before))
        # Per source, how much of it is taken before each segment.
        self._befores = {name: [s.before[name] for s in self._states] for name in plan.sources}

    def counts(self, step: int) -> dict[str, int]:
        """How many samples of each source the steps before `step` consume, sorted by name."""
        _check(step)
        return self._counts_in(self._states[self._number(max(0, step - 1))], step)

    def steps_together(self, step: int, at_most: int) -> tuple[int, int]:
        """The block of at most so many steps, [first, end) in one segment, that `step` lies in."""
        number = self._number(step)
        start = self._from_steps[number]
        first = start + (step - start) // at_most * at_most
        following = self._from_steps[number + 1 : number + 2]
        return first, min([first + at_most, *following])

    def taken(self, first: int, end: int) -> Iterator[Taken]:
        """What steps [first, end) of one segment take, source by source."""
        state = self._states[self._number(first)]
        lo, hi = ((step - state.segment.from_step) * self._batch for step in (first, end))
        which, ordinals = state.mixture.sources_of(lo, hi)
        for index, source in enumerate(state.segment.sources):
            samples = np.flatnonzero(which == index)
            yield Taken(source.name, samples, state.before[source.name] + ordinals[samples])

    def step_of(self, source: str, position: int) -> int:
        """The step that takes a source's `position`-th sample, or the one before it; or NEVER.

        The shares alone tell it for a source with a sample in every step. Where a share ends, its
        last sample may be told long before it is taken.
        """
        number = bisect_right(self._befores[source], position) - 1
        state = self._states[number]
        names = [planned.name for planned in state.segment.sources]
        if source not in names:
            return NEVER
        window = state.mixture.window_of(names.index(source), position - state.before[source])
        if window[0] == NEVER:
            return NEVER
        # What the next segment skips is passed where it begins.
        ends = self._from_steps[number + 1 : number + 2]
        first, last = (
            min([state.segment.from_step + sample // self._batch, *ends]) for sample in window
        )
        while last - first > 1 and (ends or window[1] < NEVER):
            middle = (first + last) // 2
            if self._counts_in(state, middle + 1)[source] > position:
                last = middle
            else:
                first = middle + 1
        return first

    def not_skipped(self, source: str, position: int) -> int:
        """The first of a source's positions from this one on that no edit skips."""
        for first, end in self._skips[source]:
            if first <= position < end:
                position = end
        return position

    def _number(self, step: int) -> int:
        """Which segment a step is in."""
        _check(step)
        return bisect_right(self._from_steps, step) - 1

    def _counts_in(self, state: _SegmentState, step: int) -> dict[str, int]:
        given = state.mixture.counts_at((step - state.segment.from_step) * self._batch)
        counts = dict(state.before)
        for source, count in zip(state.segment.sources, given, strict=True):
            counts[source.name] += count
        return counts


def _check(step: int) -> None:
    if step < 0:
        raise IndexError(f"there is no step {step}: steps are counted from 0")
