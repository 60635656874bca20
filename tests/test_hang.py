"""How long a rank may be without news. Clocks are lists of seconds; nothing waits."""

import pytest

from launch.hang import FLOOR_SECONDS, STORE_FLOOR_SECONDS, AwakeClock, HangWatch

START = 1800.0


class Seconds:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


@pytest.fixture
def watch(clock: Seconds) -> HangWatch:
    return HangWatch(START, clock)


def steps(watch: HangWatch, clock: Seconds, count: int, seconds: float, rank: int = 0) -> None:
    """Steps as a rank tells of them, from the beginning of a start; the last is not done."""
    for step in range(count):
        watch.heard(rank, "step", step)
        watch.heard(rank, "micro_batch", step)
        clock.now += seconds
    watch.heard(rank, "step", count)
    watch.heard(rank, "micro_batch", count)


@pytest.mark.parametrize(("seconds", "limit"), [(0.1, 60.0), (5.9, 60.0), (30.0, 300.0)])
def test_a_step_may_take_ten_times_the_median_and_at_least_a_minute(
    seconds: float, limit: float, watch: HangWatch, clock: Seconds
) -> None:
    steps(watch, clock, 5, seconds)
    clock.now += limit
    assert watch.hang() is None
    clock.now += 0.1
    hang = watch.hang()
    assert hang is not None and hang.limit == pytest.approx(limit)
    assert str(hang).startswith("rank 0 hangs in phase 'micro_batch' at step 5: no news for ")


def test_one_slow_step_does_not_move_the_limit(watch: HangWatch, clock: Seconds) -> None:
    steps(watch, clock, 20, 10.0)
    clock.now += 90.0  # slow, and not too slow
    assert watch.hang() is None
    watch.heard(0, "step", 21)
    watch.heard(0, "micro_batch", 21)
    clock.now += 101.0
    assert watch.hang() is not None


def test_news_from_within_a_step_do_not_extend_it(watch: HangWatch, clock: Seconds) -> None:
    steps(watch, clock, 5, 1.0)
    for _ in range(61):
        clock.now += 1.0
        watch.heard(0, "reduce", 5)
    assert watch.hang() is not None


def test_before_the_first_step_is_done_each_phase_has_the_fixed_limit(
    watch: HangWatch, clock: Seconds
) -> None:
    clock.now += START
    assert watch.hang() is None, "torchrun meets the other hosts"
    for phase in (
        "start",
        "rendezvous",
        "open",
        "claim",
        "claim:wait",
        "restore",
        "step",
        "micro_batch",
    ):
        watch.heard(0, phase, 40)
        clock.now += START
        assert watch.hang() is None, phase
    clock.now += 1.0
    assert watch.hang() is not None, "the first step may compile, and not for ever"


def test_no_word_from_any_rank_is_torchrun_hanging(watch: HangWatch, clock: Seconds) -> None:
    clock.now += START + 1
    hang = watch.hang()
    assert hang is not None and str(hang).startswith("torchrun hangs")


@pytest.mark.parametrize(
    ("phase", "floor"),
    [
        ("evaluate", FLOOR_SECONDS["evaluate"]),
        ("sample", FLOOR_SECONDS["sample"]),
        ("wait_for_save", STORE_FLOOR_SECONDS),
        ("edit", STORE_FLOOR_SECONDS),
        ("edit:recorded", STORE_FLOOR_SECONDS),
    ],
)
def test_what_lies_between_steps_has_limits_of_its_own(
    phase: str, floor: float, watch: HangWatch, clock: Seconds
) -> None:
    steps(watch, clock, 3, 0.1)
    watch.heard(0, phase, 4)
    clock.now += START
    assert watch.hang() is None, "nothing is known of it yet"
    watch.heard(0, "step", 4)
    clock.now += 0.1
    watch.heard(0, phase, 5)
    clock.now += max(floor, 10 * START)
    assert watch.hang() is None
    clock.now += 1.0
    assert watch.hang() is not None


def test_waiting_for_data_has_the_patience_of_a_store(watch: HangWatch, clock: Seconds) -> None:
    steps(watch, clock, 5, 0.1)
    watch.heard(0, "step", 6)
    clock.now += STORE_FLOOR_SECONDS
    assert watch.hang() is None
    clock.now += 1.0
    assert watch.hang() is not None


def test_the_rank_that_is_longest_beyond_its_limit_is_named(
    watch: HangWatch, clock: Seconds
) -> None:
    steps(watch, clock, 5, 0.1, rank=1)
    clock.now += 1.0
    steps(watch, clock, 5, 0.1, rank=0)
    clock.now += 100.0
    hang = watch.hang()
    assert hang is not None and hang.rank == 1


def test_a_rank_that_has_ended_hangs_no_more(watch: HangWatch, clock: Seconds) -> None:
    steps(watch, clock, 5, 0.1)
    watch.ended(0)
    clock.now += 10 * START
    assert watch.hang() is None


def test_a_supervisor_that_stood_still_does_not_blame_its_ranks(clock: Seconds) -> None:
    awake = AwakeClock(clock)
    watch = HangWatch(START, awake)
    clock.now += 36_000.0  # SIGSTOP, a suspended machine
    assert watch.hang() is None
    for _ in range(int(START)):
        clock.now += 1.0
        found = watch.hang()
    assert found is not None, "what it saw itself counts"


def test_a_clock_that_goes_back_is_no_time(clock: Seconds) -> None:
    awake = AwakeClock(clock)
    clock.now = -100.0
    assert awake() == 0.0
    clock.now = -99.0
    assert awake() == 1.0
