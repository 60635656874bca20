"""The simulation of a spot trace: by hand, against a second-by-second one, and by properties."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.history import History, Lifespan
from checkpointing.interval import Life, lives, mean_time_to_preemption
from launch import spot_simulation
from launch.spot_simulation import (
    MODES,
    PARTS,
    Costs,
    Mode,
    Outcome,
    Policy,
    Segment,
    segments,
    simulate,
)
from storage.errors import ConfigurationError

SECOND = 1_000_000


def costs(step: float = 1, stall: float = 2, durable: float = 5, restart: float = 10) -> Costs:
    return Costs(
        step_seconds=step, stall_seconds=stall, durable_seconds=durable, restart_seconds=restart
    )


def every(seconds: float, of: Costs | None = None) -> Policy:
    return Policy(name="fixed", costs=of or costs(), every_seconds=seconds)


def runs(*lengths: int, nodes: int = 1) -> list[Segment]:
    """Seconds with the machine, without it, with it, ..."""
    found, at = [], 0
    for number, length in enumerate(lengths):
        found.append(
            Segment(
                begin=at * SECOND,
                end=(at + length) * SECOND,
                nodes=0 if number % 2 else nodes,
            )
        )
        at += length
    return found


def counted(*pairs: tuple[int, int]) -> list[Segment]:
    """(seconds, nodes), one after the other."""
    found, at = [], 0
    for length, nodes in pairs:
        found.append(Segment(begin=at * SECOND, end=(at + length) * SECOND, nodes=nodes))
        at += length
    return found


def in_seconds(outcome: Outcome) -> dict[str, float]:
    """The parts that are not 0."""
    return {name: amount / SECOND for name, amount in outcome.parts.items() if amount}


def test_a_loss_takes_what_is_not_durable() -> None:
    """Restart to 10, steps to 40, a save that stalls to 42, steps to 70, another, steps to 99."""
    outcome = simulate(runs(99, 1, 50), every(30), nodes=1)
    first = {"useful": 30 + 28, "restart": 10, "save": 4, "lost": 27}
    second = {"useful": 38, "restart": 10, "save": 2}
    expected = {name: first[name] + second.get(name, 0) for name in first}
    assert in_seconds(outcome) == expected
    assert (outcome.losses, outcome.restarts, outcome.saves) == (1, 2, 3)
    assert outcome.available == 149 * SECOND


@pytest.mark.parametrize(("killed_at", "useful"), [(44, 0), (45, 30)])
def test_a_save_counts_from_the_moment_it_is_durable(killed_at: int, useful: int) -> None:
    """Begun at 40, durable at 45."""
    outcome = simulate(runs(killed_at, 1, 1), every(30), nodes=1)
    assert outcome.parts["useful"] == useful * SECOND


def test_a_save_waits_for_the_one_in_flight() -> None:
    """Due after 3 s, durable after 5: begun at 13, 18, 23, 28; without the wait at 13, 16, ..."""
    assert simulate(runs(30), every(3), nodes=1).saves == 4


def test_steps_are_whole_and_a_kill_loses_the_one_at_hand() -> None:
    outcome = simulate(runs(47, 1, 1), every(10, costs(step=7, stall=0, durable=0)), nodes=1)
    assert in_seconds(outcome) == {"useful": 28, "restart": 11, "lost": 9}


def test_steps_count_between_saves_where_the_interval_is_in_steps() -> None:
    policy = Policy(name="steps", costs=costs(stall=4, durable=4), every_steps=20)
    outcome = simulate(runs(10 + 20 + 4 + 20 + 3), policy, nodes=1)
    assert (outcome.saves, outcome.parts["save"]) == (2, 7 * SECOND)


def test_a_notice_that_is_long_enough_loses_the_time_that_is_left_and_no_step() -> None:
    """Told at 88, saved at 93, nothing left to do until 100."""
    outcome = simulate(runs(100, 1, 1), every(500), nodes=1, notice_seconds=12)
    assert in_seconds(outcome) == {"useful": 78, "restart": 11, "save": 5, "leaving": 7}
    assert (outcome.notices_met, outcome.notices_missed) == (1, 0)


def test_a_step_that_does_not_fit_into_the_notice_is_abandoned() -> None:
    """Told at 88; the step would end at 94, and the save of it at 99."""
    policy = every(500, costs(step=14, durable=5))
    outcome = simulate(runs(98, 1, 1), policy, nodes=1, notice_seconds=10)
    assert in_seconds(outcome) == {"useful": 70, "restart": 11, "lost": 8, "save": 5, "leaving": 5}


def test_a_notice_too_short_for_a_save_is_missed_and_the_last_save_counts() -> None:
    outcome = simulate(runs(99, 1, 1), every(30), nodes=1, notice_seconds=4)
    assert (outcome.notices_met, outcome.notices_missed) == (0, 1)
    assert outcome.parts["useful"] == 58 * SECOND


def test_a_notice_in_a_restart_is_neither_met_nor_missed() -> None:
    outcome = simulate(runs(9, 1, 1), every(30), nodes=1, notice_seconds=5)
    assert (outcome.notices_met, outcome.notices_missed) == (0, 0)
    assert in_seconds(outcome) == {"restart": 10}


def test_a_smaller_world_is_slower_in_proportion() -> None:
    """One of two nodes: steps take 2 s; available time is half of the wall time."""
    outcome = simulate(counted((110, 1)), every(1000), nodes=2)
    assert outcome.available == 55 * SECOND
    assert in_seconds(outcome) == {"restart": 5, "useful": 50}


def test_a_newcomer_waits_for_the_next_save_and_then_all_restart() -> None:
    """One of two: restart to 10, steps of 2 s. Grown at 20; saved from 40 to 45, restart to 55."""
    outcome = simulate(counted((20, 1), (80, 2)), every(30), nodes=2)
    assert in_seconds(outcome) == {
        "restart": (10 + 2 * 10) / 2,
        "useful": 30 / 2 + 30 + 13,
        "save": 5 / 2 + 2,
        "waiting": 25 / 2,
    }


def test_a_world_that_loses_a_node_restarts_with_the_rest_from_what_is_durable() -> None:
    outcome = simulate(counted((50, 2), (30, 1)), every(30), nodes=2)
    assert in_seconds(outcome) == {"restart": 15, "useful": 30 + 10, "save": 2, "lost": 8}
    assert (outcome.losses, outcome.restarts) == (1, 2)


def test_losing_nodes_that_only_wait_is_no_loss() -> None:
    outcome = simulate(counted((20, 1), (5, 2), (25, 1)), every(1000), nodes=2)
    assert (outcome.losses, outcome.restarts) == (0, 1)


def test_an_elastic_world_told_of_a_loss_goes_on_with_the_rest_at_once() -> None:
    """Told at 38, saved at 43, restart of one to 53."""
    policy = every(1000)
    outcome = simulate(counted((50, 2), (30, 1)), policy, nodes=2, notice_seconds=12)
    assert in_seconds(outcome) == {
        "restart": 10 + 5,
        "useful": 28 + 26 / 2,
        "save": 5,
        "leaving": 7 / 2,
        "lost": 1 / 2,
    }


def test_machines_that_are_about_to_go_are_not_taken_in_again() -> None:
    outcome = simulate(counted((300, 2), (60, 1)), every(20), nodes=2, notice_seconds=200)
    assert outcome.restarts == 2
    assert outcome.parts["waiting"] == 0
    assert outcome.parts["leaving"] > 90 * SECOND


def test_segments_are_told_by_mode() -> None:
    counts = [0, 1, 1, 3, 4, 4, 2, 0]
    assert [(s.begin, s.end, s.nodes) for s in segments(counts, 2.0, "single", 4)] == [
        (0, 2 * SECOND, 0),
        (2 * SECOND, 14 * SECOND, 1),
        (14 * SECOND, 16 * SECOND, 0),
    ]
    assert [s.nodes for s in segments(counts, 2.0, "gang", 3)] == [0, 1, 0]
    assert [s.nodes for s in segments(counts, 2.0, "elastic", 3)] == [0, 1, 3, 2, 0]
    assert segments([], 1.0, "single", 1) == []


policies = st.one_of(
    st.just(Policy(name="auto", costs=costs())),
    st.builds(
        lambda c, seconds: Policy(name="s", costs=c, every_seconds=seconds),
        st.builds(costs, st.floats(0.3, 50), *[st.floats(0, 60)] * 3),
        st.floats(0.5, 1000),
    ),
    st.builds(
        lambda c, steps: Policy(name="n", costs=c, every_steps=steps),
        st.builds(costs, st.floats(0.3, 50), *[st.floats(0, 60)] * 3),
        st.integers(1, 200),
    ),
)


@given(
    st.lists(st.integers(0, 4), max_size=40),
    st.floats(0.5, 300),
    policies,
    st.sampled_from(MODES),
    st.sampled_from([0.0, 3.0, 30.0, 500.0]),
)
def test_the_parts_add_up_to_the_available_time_and_none_is_negative(
    counts: list[int], gap: float, policy: Policy, mode: Mode, notice: float
) -> None:
    nodes = 4 if mode == "elastic" else 1
    stretches = segments(counts, gap, mode, 4)
    outcome = simulate(stretches, policy, nodes=nodes, notice_seconds=notice)
    node_time = sum(s.nodes * (s.end - s.begin) for s in stretches)
    assert outcome.available == node_time // nodes
    assert tuple(outcome.parts) == PARTS
    assert sum(outcome.parts.values()) == outcome.available
    assert min(outcome.parts.values()) >= 0
    assert 0 <= outcome.goodput <= 1


def second_by_second(stretches: Sequence[Segment], of: Costs, interval: int) -> dict[str, int]:
    """The same for a single host, in another way: one second after the other."""
    done = dict.fromkeys(("useful", "lost", "restart", "save"), 0)
    for number, stretch in enumerate(stretches):
        if not stretch.nodes:
            continue
        begin, end = stretch.begin // SECOND, stretch.end // SECOND
        saved = unsaved = in_step = 0
        durable_at, amount, due, stalled = math.inf, 0, math.inf, 0
        for now in range(begin, end):
            if now >= durable_at:
                saved, unsaved, durable_at = saved + amount, unsaved - amount, math.inf
            if now < begin + of.restart_seconds:
                done["restart"] += 1
                continue
            if due == math.inf:
                due = now + interval
            if in_step == 0 and stalled == 0 and now >= due and durable_at == math.inf and unsaved:
                durable_at, amount = now + of.durable_seconds, unsaved
                due, stalled = now + interval, int(of.stall_seconds)
                if durable_at == now:
                    saved, unsaved, durable_at = saved + amount, 0, math.inf
            if stalled:
                stalled -= 1
                done["save"] += 1
                continue
            in_step += 1
            if in_step == of.step_seconds:
                in_step, unsaved = 0, unsaved + int(of.step_seconds)
        if end >= durable_at:
            saved, unsaved = saved + amount, unsaved - amount
        last = number == len(stretches) - 1
        done["useful"] += saved + (unsaved if last else 0)
        done["lost"] += in_step + (0 if last else unsaved)
    return done


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=9),
    st.builds(costs, st.integers(1, 9), st.integers(0, 5), st.integers(1, 20), st.integers(0, 20)),
    st.integers(1, 90),
)
def test_it_agrees_with_a_simulation_second_by_second(
    lengths: list[int], of: Costs, interval: int
) -> None:
    of = costs(
        of.step_seconds,
        of.stall_seconds,
        max(of.stall_seconds, of.durable_seconds),
        of.restart_seconds,
    )
    stretches = runs(*lengths)
    outcome = simulate(stretches, every(interval, of), nodes=1)
    found = {name: outcome.parts[name] // SECOND for name in ("useful", "lost", "restart", "save")}
    assert found == second_by_second(stretches, of, interval)


@given(st.lists(st.integers(0, 40_000), max_size=150), st.integers(0, 9000))
def test_the_mean_between_losses_is_that_of_the_run_s_log(lifetimes: list[int], alive: int) -> None:
    simulated = spot_simulation._Lives()
    spans = []
    for generation, lifetime in enumerate([*lifetimes, alive], start=1):
        simulated.begin(0)
        simulated.sign(round(lifetime * SECOND))
        if generation <= len(lifetimes):
            simulated.end()
        spans.append(Lifespan(generation=generation, claimed_at=0.0, last_sign_at=lifetime))
    past = History(generation=len(spans), lifespans=tuple(spans[-100:]))
    expected = mean_time_to_preemption(*lives(past, now=alive))
    assert simulated.mean_seconds(round(alive * SECOND)) == pytest.approx(expected, rel=1e-6)


def test_saves_follow_the_lives_so_far_and_the_age_of_this_one() -> None:
    """Five lives of two hours, a cost of 0.25 s; the expectation integrates over their ages."""
    policy = Policy(name="auto", costs=costs(1, 0.25, 1, 0))
    short = simulate(runs(*[7200, 60] * 5), policy, nodes=1)
    means = [
        mean_time_to_preemption([Life(7200.0, interrupted=True)] * n, age)
        for n in range(5)
        for age in range(30, 7200, 60)
    ]
    expected = sum(60 / math.sqrt(2 * 0.25 * seconds) for seconds in means)
    assert short.saves == pytest.approx(expected, rel=0.05)


def test_the_interval_that_chooses_itself_beats_ten_minutes_where_losses_are_frequent() -> None:
    stretches = runs(*[1800, 300] * 50, 1800)
    auto = Policy(name="auto", costs=costs(stall=0.3, durable=1.5))
    assert simulate(stretches, auto, nodes=1).goodput > 0.95
    assert simulate(stretches, every(600, auto.costs), nodes=1).goodput < 0.85


def test_the_same_trace_gives_the_same_outcome() -> None:
    stretches = counted((500, 3), (200, 4), (300, 2), (100, 0), (900, 4))
    auto = Policy(name="auto", costs=costs())
    assert simulate(stretches, auto, nodes=4) == simulate(stretches, auto, nodes=4)


@pytest.mark.parametrize(
    "wrong", [{"step": 0}, {"step": math.inf}, {"stall": -1}, {"durable": math.nan}]
)
def test_costs_that_are_none_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=r"seconds of a step must be at least 0\.000001"):
        costs(**wrong)


@pytest.mark.parametrize(
    "interval", [{"every_seconds": 1.0, "every_steps": 1}, {"every_steps": -1}]
)
def test_an_interval_is_in_seconds_or_in_steps(interval: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="a policy has one interval above 0"):
        Policy(name="wrong", costs=costs(), **interval)
