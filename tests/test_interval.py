"""When to save, by hand and by properties."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.history import History, Lifespan
from checkpointing.interval import (
    MAXIMUM_SECONDS,
    PRIOR_SECONDS,
    SaveCost,
    interval_seconds,
    mean_time_between_preemptions,
)

HOUR = 3600.0
costs = st.floats(0, 1e4)
means = st.floats(1e-3, 1e9)


def lived(*hours: float, ended: bool = False) -> History:
    """Incarnations of these lifetimes; the last is the owner."""
    spans = tuple(
        Lifespan(
            generation=generation,
            claimed_at=1000.0 * HOUR * generation,
            last_sign_at=1000.0 * HOUR * generation + lifetime * HOUR,
            ended=ended,
        )
        for generation, lifetime in enumerate(hours, start=1)
    )
    return History(generation=len(hours), lifespans=spans)


def test_half_a_second_and_an_hour_make_a_minute() -> None:
    """sqrt(2 * 0.5 s * 3600 s) = 60 s."""
    assert interval_seconds(0.5, 3600.0, minimum_seconds=1.0) == 60.0


def test_near_dalys_formula_where_a_save_is_cheap() -> None:
    """sqrt(2CM) (1 + sqrt(C/2M)/3 + C/18M) - C, for a save of 0.2 s and the prior."""
    cost, mean = 0.2, PRIOR_SECONDS
    x = math.sqrt(cost / (2 * mean))
    daly = 2 * mean * x * (1 + x / 3 + x * x / 9) - cost
    young = interval_seconds(cost, mean, minimum_seconds=0.0)
    assert young - daly == pytest.approx(2 / 3 * cost, rel=0.01)


@given(costs, costs, means, means)
def test_dearer_saves_and_rarer_preemptions_make_it_no_shorter(
    cost: float, dearer: float, mean: float, rarer: float
) -> None:
    (cost, dearer), (mean, rarer) = sorted((cost, dearer)), sorted((mean, rarer))
    base = interval_seconds(cost, mean, minimum_seconds=2.0)
    assert interval_seconds(dearer, mean, minimum_seconds=2.0) >= base
    assert interval_seconds(cost, rarer, minimum_seconds=2.0) >= base


@given(costs, means, st.floats(0, 1e4), st.floats(0, 1e4))
def test_the_bounds_hold_and_the_lower_one_wins(
    cost: float, mean: float, minimum: float, maximum: float
) -> None:
    found = interval_seconds(cost, mean, minimum_seconds=minimum, maximum_seconds=maximum)
    assert minimum <= found <= max(minimum, maximum)
    assert interval_seconds(cost, mean, minimum_seconds=minimum) <= max(minimum, MAXIMUM_SECONDS)


@pytest.mark.parametrize(("cost", "mean"), [(-1.0, 1.0), (1.0, 0.0), (math.nan, 1.0)])
def test_what_is_no_measurement_is_refused(cost: float, mean: float) -> None:
    with pytest.raises(ValueError, match="cost_seconds must be at least 0 and mean_seconds above"):
        interval_seconds(cost, mean, minimum_seconds=1.0)


def test_a_run_that_knows_nothing_takes_the_prior() -> None:
    assert mean_time_between_preemptions(History(), now=0.0) == PRIOR_SECONDS
    assert mean_time_between_preemptions(lived(0.0), now=1000 * HOUR) == PRIOR_SECONDS


def test_the_time_lived_is_shared_among_interruptions() -> None:
    """Prior 3 h, then 1 h and 2 h interrupted, then alive for 6 h: 12 h in 3 interruptions."""
    past = lived(1.0, 2.0, 0.5)
    assert mean_time_between_preemptions(past, now=(3000 + 6) * HOUR) == 4 * HOUR


def test_the_wait_for_a_machine_is_not_lived() -> None:
    assert mean_time_between_preemptions(lived(1.0, 0.0), now=2000 * HOUR) == 2 * HOUR


def test_an_incarnation_that_ended_was_not_interrupted() -> None:
    past = lived(5.0, 4.0, ended=True)
    assert mean_time_between_preemptions(past, now=9e9) == PRIOR_SECONDS + 9 * HOUR


def test_an_incarnation_whose_successors_claim_is_damaged_was_interrupted() -> None:
    past = History(generation=2, lifespans=lived(1.0).lifespans)
    assert mean_time_between_preemptions(past, now=9e9) == 2 * HOUR


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20), st.floats(0, 100))
def test_each_interruption_without_life_makes_the_mean_shorter(
    hours: list[float], age: float
) -> None:
    generation = len(hours) + 1
    before = mean_time_between_preemptions(lived(*hours, 0), now=(1000 * generation + age) * HOUR)
    worse = lived(*hours, 0, 0)
    after = mean_time_between_preemptions(worse, now=1000 * (generation + 1) * HOUR)
    assert after < before


def test_a_clock_set_back_takes_nothing_away() -> None:
    assert mean_time_between_preemptions(lived(0.0), now=0.0) == PRIOR_SECONDS


def test_a_save_costs_what_it_adds_to_the_steps_beside_it() -> None:
    cost = SaveCost()
    assert cost.seconds == 1.0
    for seconds in (0.5, 0.5, 0.6):
        cost.step(seconds, saving=False)
    cost.step(0.75, saving=True)
    cost.step(0.5, saving=True)
    cost.step(0.625, saving=True)
    assert cost.seconds == 1.0, "it is not over"
    cost.step(0.5, saving=False)
    assert cost.seconds == 0.375
    cost.step(0.5, saving=True)
    cost.step(0.5, saving=False)
    assert cost.seconds == 0.0
    assert (cost.saves, cost.total_seconds) == (2, 0.375)
