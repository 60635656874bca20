"""What is exactly once is found so, and what is not is found out, by each of the checks alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_service.batches import Batches
from data_service.exactly_once import source_verdicts
from data_service.order import Anatomy, Places, SourceOrder
from data_service.plan import Plan
from data_service.recorded import RecordedPlan
from data_service.run_data import batches_of
from data_service.source import Source
from tests.made_sources import made_source, plan_of, segment_of

SHAPE = {"from_step": 0, "seed": 3, "context": 8, "global_batch_size": 6, "lanes": 4}
ALL, NONE = 10**6, 0
"""Limits of what is looked at one by one."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        "code": made_source(
            folder, "code", train=(400, 33, 250, 9, 3, 120, 77), validation=(400,), start=5
        ),
        "web": made_source(folder, "web", train=(901, 700, 44), validation=(400,), start=90),
    }


def recorded_of(plan: Plan, **changes: Any) -> RecordedPlan:
    return RecordedPlan(plan=plan, **{**SHAPE, **changes})


def wrong(
    recorded: RecordedPlan, sources: dict[str, Source], steps: int, limit: int
) -> dict[str, str]:
    own = list(sources.values())
    found = source_verdicts(
        recorded, batches_of(recorded, sources), own, steps, exhaustive_samples=limit
    )
    return {verdict.source: verdict.wrong for verdict in found}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lanes=st.integers(1, 40),
    context=st.integers(1, 30),
    batch=st.integers(1, 9),
    steps=st.integers(1, 120),
    edit=st.integers(1, 130),
    skip=st.integers(0, 20),
    limit=st.sampled_from([ALL, NONE]),
)
def test_any_shape_is_right(
    lanes: int,
    context: int,
    batch: int,
    steps: int,
    edit: int,
    skip: int,
    limit: int,
    sources: dict[str, Source],
) -> None:
    own = list(sources.values())
    ramp = [[(0, 900_000), (60, 200_000)], [(0, 100_000), (60, 800_000)]]
    later = replace(segment_of(own[::-1], from_step=edit), skip_steps=skip)
    recorded = recorded_of(
        plan_of(own, ramp).appended(later), lanes=lanes, context=context, global_batch_size=batch
    )
    batches = batches_of(recorded, sources)
    found = source_verdicts(recorded, batches, own, steps, exhaustive_samples=limit)
    assert [verdict.wrong for verdict in found] == ["", ""]
    assert sum(verdict.samples for verdict in found) == steps * batch
    assert sum(verdict.skipped for verdict in found) == (skip * batch if edit < steps else 0)
    consumed = [sample for step in range(steps) for sample in batches.sample_ids(step)]
    assert len(set(consumed)) == len(consumed)
    for verdict in found:
        assert verdict.samples == sum(sample[0] == verdict.source for sample in consumed)


def repeated(found: Places) -> Places:
    return found._replace(windows=np.where(found.windows == 1, 0, found.windows))


def moved(found: Places) -> Places:
    return found._replace(windows=found.windows + 1)


@pytest.mark.parametrize("limit", [ALL, NONE])
@pytest.mark.parametrize("change", [repeated, moved])
def test_places_that_repeat_or_do_not_exist_are_found(
    change: Callable[[Places], Places], limit: int, sources: dict[str, Source]
) -> None:
    honest = SourceOrder.places
    with patch.object(SourceOrder, "places", lambda self, at: change(honest(self, at))):
        found = wrong(recorded_of(plan_of(list(sources.values()))), sources, 90, limit)
    assert all(reason.startswith("epoch ") for reason in found.values()), found


def gap(made: Anatomy) -> Anatomy:
    return made._replace(arc_starts=made.arc_starts + (made.arc_starts > 0))


def twice(made: Anatomy) -> Anatomy:
    shards = made.shards.copy()
    shards[-1] = shards[0]
    return made._replace(shards=shards)


def shifted(made: Anatomy) -> Anatomy:
    return made._replace(starts=np.minimum(made.starts + 1, made.starts[-1]))


def staggered(made: Anatomy) -> Anatomy:
    return made._replace(staggers=made.staggers + 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (gap, "the lanes' arcs do not cover the line once"),
        (twice, "the line does not have every shard once"),
        (shifted, "the shards do not lie one after another on the line"),
        (staggered, "is not read once"),
    ],
)
def test_each_part_of_the_arithmetic_is_checked(
    change: Callable[[Anatomy], Anatomy], reason: str, sources: dict[str, Source]
) -> None:
    honest = SourceOrder.anatomy
    with patch.object(SourceOrder, "anatomy", lambda self, epoch: change(honest(self, epoch))):
        found = wrong(recorded_of(plan_of(list(sources.values()))), sources, 90, NONE)
    assert reason in found["code"]


def test_batches_of_another_seed_are_found(sources: dict[str, Source]) -> None:
    own = list(sources.values())
    recorded = recorded_of(plan_of(own))
    other = batches_of(replace(recorded, seed=4), sources)
    found = source_verdicts(recorded, other, own, 5)
    assert all("consumes" in verdict.wrong for verdict in found)


def test_one_wrong_sequence_at_the_edge_of_a_segment_is_found(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    own = list(sources.values())
    recorded = recorded_of(plan_of(own).appended(segment_of(own, from_step=5000)))
    honest = Batches.sample_ids

    def late(self: Batches, step: int) -> Any:
        ids = honest(self, step)
        return [*ids[1:], ids[0]] if step == 4999 else ids

    with patch.object(Batches, "sample_ids", late):
        found = wrong(recorded, sources, 9000, NONE)
    assert any("step 4999 consumes" in reason for reason in found.values())


def test_before_the_first_step_there_is_nothing_wrong(sources: dict[str, Source]) -> None:
    assert set(wrong(recorded_of(plan_of(list(sources.values()))), sources, 0, ALL).values()) == {
        ""
    }
