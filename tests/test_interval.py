"""When to save, by hand and by properties."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.history import History, Lifespan
from checkpointing.interval import (
    MAXIMUM_SECONDS,
    PRIOR_SECONDS,
    Life,
    SaveCost,
    interval_seconds,
    lives,
    mean_time_to_preemption,
)

HOUR = 3600.0
LONG = 1e9
"""An age at which no other incarnation is near."""
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


def mean(past: History, now: float) -> float:
    return mean_time_to_preemption(*lives(past, now))


def test_a_run_that_knows_nothing_takes_the_prior() -> None:
    assert mean(History(), now=0.0) == PRIOR_SECONDS
    assert mean(lived(0.0), now=1000 * HOUR) == PRIOR_SECONDS


def test_the_time_lived_is_shared_among_interruptions() -> None:
    """Prior 3 h, then 1 h and 2 h interrupted, then alive for 6 h: 12 h in 3 interruptions."""
    assert mean(lived(1.0, 2.0, 0.5), now=(3000 + 6) * HOUR) == 4 * HOUR


def test_the_wait_for_a_machine_is_not_lived() -> None:
    over, age = lives(lived(1.0, 0.0), now=2000 * HOUR + 60)
    assert (over, age) == ([Life(HOUR, interrupted=True)], 60.0)


def test_an_incarnation_that_ended_was_not_interrupted() -> None:
    over, age = lives(lived(5.0, 4.0, ended=True), now=9e9)
    assert (over, age) == ([Life(5 * HOUR, False), Life(4 * HOUR, False)], 0.0)
    assert mean_time_to_preemption(over, LONG) == PRIOR_SECONDS + 9 * HOUR + LONG


def test_an_incarnation_whose_successors_claim_is_damaged_was_interrupted() -> None:
    past = History(generation=2, lifespans=lived(1.0).lifespans)
    assert lives(past, now=9e9) == ([Life(HOUR, interrupted=True)], 0.0)


def test_those_that_died_at_this_age_count_beside_the_overall_rate() -> None:
    """Of 10 min, until 30: three lives passed 5, 20 and 20 min there, one was interrupted there.

    Overall: 3 h and 10, 5, 15, 60 and 30 min with 4 interruptions: 75 min each, which counts twice.
    """
    over = [Life(60.0 * m, interrupted=m != 30) for m in (5, 15, 60, 30)]
    near = 5 + 20 + 20
    assert mean_time_to_preemption(over, 600.0) == 60 * (2 * 300 / 4 + near) / (2 + 1)


def test_the_bounds_of_an_age_are_that_age_and_twice_it_and_ten_minutes() -> None:
    def left(*seconds: float, age: float) -> float:
        return mean_time_to_preemption([Life(s, interrupted=True) for s in seconds], age)

    def rate(*seconds: float, age: float) -> float:
        return (PRIOR_SECONDS + age + sum(seconds)) / (1 + len(seconds))

    assert left(99.0, age=100.0) == rate(99.0, age=100.0), "it died before"
    assert left(100.0, age=100.0) == pytest.approx(2 * rate(100.0, age=100.0) / 3)
    assert left(799.0, age=100.0) == pytest.approx((2 * rate(799.0, age=100.0) + 699) / 3)
    assert left(800.0, age=100.0) == pytest.approx((2 * rate(800.0, age=100.0) + 700) / 2)


def test_saves_become_rarer_as_a_machine_outlives_the_others() -> None:
    """Nineteen lives of three minutes and one of ten hours."""
    over = [Life(180.0, interrupted=True)] * 19 + [Life(10 * HOUR, interrupted=True)]
    at = [mean_time_to_preemption(over, age) for age in (0.0, 200.0, HOUR)]
    assert at[0] < at[1] / 4 and at[1] < at[2]


@given(st.lists(st.floats(0, 1e5), max_size=20), st.floats(0, 1e5))
def test_each_interruption_without_life_makes_the_mean_shorter(
    seconds: list[float], age: float
) -> None:
    over = [Life(s, interrupted=True) for s in seconds]
    worse = [*over, Life(0.0, interrupted=True)]
    assert mean_time_to_preemption(worse, age) < mean_time_to_preemption(over, age)


def test_a_clock_set_back_takes_nothing_away() -> None:
    assert mean(lived(0.0), now=0.0) == PRIOR_SECONDS


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
