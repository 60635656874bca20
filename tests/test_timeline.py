"""The timeline against the mixtures of its segments, step by step."""

import itertools

import pytest

from data_service.plan import Plan, PlanSource, Segment
from data_service.shares import NEVER
from data_service.timeline import Timeline

BATCH = 6


def segment(from_step: int, **weights: int) -> Segment:
    """Constant weights by name; data_service.plan sorts the names."""
    return Segment(
        from_step=from_step,
        sources=tuple(
            PlanSource(name=name, url="", fingerprint=name * 3, weights=((0, weight),))
            for name, weight in weights.items()
        ),
    )


PLAN = Plan(
    segments=(
        segment(0, a=3, b=1),
        segment(13, b=5, c=1),
        segment(40, a=1, b=9, c=0),
        segment(90, a=1, b=1),
    )
)


def positions_of(timeline: Timeline, steps: range) -> dict[str, list[tuple[int, int]]]:
    """Per source, the step and the position of each sample."""
    found: dict[str, list[tuple[int, int]]] = {"a": [], "b": [], "c": []}
    for step in steps:
        taken = list(timeline.taken(step, step + 1))
        assert sorted(s for one in taken for s in one.samples.tolist()) == list(range(BATCH))
        for source, _, positions in taken:
            found[source] += [(step, position) for position in positions.tolist()]
    return found


def test_a_sources_samples_are_numbered_over_its_whole_life() -> None:
    timeline = Timeline(PLAN, BATCH)
    found = positions_of(timeline, range(130))
    for samples in found.values():
        assert [position for _, position in samples] == list(range(len(samples)))
    assert not any(13 <= step < 40 for step, _ in found["a"])
    for step in range(131):
        before = {name: sum(s < step for s, _ in samples) for name, samples in found.items()}
        assert timeline.counts(step) == before


def test_blocks_of_steps_cover_each_segment_without_overlap() -> None:
    timeline = Timeline(PLAN, BATCH)
    blocks = sorted({timeline.steps_together(step, 8) for step in range(120)})
    assert blocks[0][0] == 0
    for (_, end), (first, following) in itertools.pairwise(blocks):
        assert end == first
        assert following - first <= 8
    assert {13, 40, 90} <= {first for first, _ in blocks}
    together = list(timeline.taken(16, 21))
    alone = positions_of(timeline, range(16, 21))
    for source, _, positions in together:
        assert positions.tolist() == [position for _, position in alone[source]]


def test_the_step_of_a_sample_is_never_late_and_hardly_early() -> None:
    timeline = Timeline(PLAN, BATCH)
    for source, samples in positions_of(timeline, range(130)).items():
        for step, position in samples:
            assert 0 <= step - timeline.step_of(source, position) <= 1


def test_the_step_of_a_rare_source_is_found_too() -> None:
    """Its shares alone would tell it up to 150 steps too early."""
    plan = Plan(segments=(segment(0, a=900, b=1, c=99),))
    timeline = Timeline(plan, BATCH)
    rare = positions_of(timeline, range(1500))["b"]
    assert len(rare) > 5
    for step, position in rare:
        assert 0 <= step - timeline.step_of("b", position) <= 1


def test_a_source_that_is_gone_or_weighs_nothing_is_taken_never() -> None:
    timeline = Timeline(PLAN, BATCH)
    assert timeline.step_of("c", timeline.counts(10**6)["c"]) == NEVER
    still = Timeline(Plan(segments=PLAN.segments[:3]), BATCH)
    assert still.step_of("c", still.counts(10**6)["c"] + 1) == NEVER


def test_there_is_no_step_below_0() -> None:
    timeline = Timeline(PLAN, BATCH)
    with pytest.raises(IndexError, match="there is no step -1"):
        timeline.steps_together(-1, 8)
    with pytest.raises(IndexError, match="there is no step -7"):
        timeline.taken(-7, 0).__next__()
