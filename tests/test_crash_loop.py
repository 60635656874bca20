"""When starts in a row are a crash loop."""

from dataclasses import replace

from launch.crash_loop import Ended, crash_loop, together

DIED = Ended(generation=0, phase="reduce", step=7, reached=7)
FAILED = replace(DIED, error="ZeroDivisionError: x")
PREEMPTED = replace(DIED, in_order=True)


def judged(*ends: Ended, before: int = 7) -> str | None:
    return crash_loop(ends, before)


def test_three_errors_in_a_row_without_a_new_step_are_a_crash_loop() -> None:
    assert judged(FAILED, FAILED) is None
    said = judged(FAILED, replace(FAILED, phase="restore", step=2), FAILED)
    assert said is not None
    assert "3 starts in a row" in said and "'reduce' at step 7: ZeroDivisionError: x" in said


def test_a_death_counts_when_it_is_where_the_one_before_was() -> None:
    assert judged(DIED, DIED, DIED) is None, "the first has none before it"
    said = judged(DIED, DIED, DIED, DIED)
    assert said is not None and "it died without an error of its own" in said
    elsewhere = [replace(DIED, step=step) for step in (7, 6, 5, 7, 6, 5)]
    assert judged(*elsewhere) is None


def test_progress_begins_the_count_anew() -> None:
    onwards = [replace(FAILED, step=step, reached=step) for step in range(8, 40)]
    assert judged(*onwards) is None
    assert judged(FAILED, FAILED, replace(FAILED, reached=8), FAILED, FAILED) is None
    assert judged(replace(FAILED, reached=8), FAILED, FAILED, FAILED) is not None


def test_five_hundred_preemptions_are_fine() -> None:
    assert judged(*[replace(PREEMPTED, reached=8 + n) for n in range(500)]) is None
    assert judged(*[PREEMPTED] * 500) is None, "even without progress: none of them failed"
    killed = [replace(DIED, step=n, reached=n) for n in range(8, 508)]
    assert judged(*killed) is None


def test_a_preemption_between_errors_hides_nothing() -> None:
    assert judged(FAILED, PREEMPTED, FAILED, PREEMPTED, FAILED) is not None
    assert judged(FAILED, replace(PREEMPTED, reached=9), FAILED, FAILED) is None


def test_nothing_is_no_crash_loop() -> None:
    assert judged() is None
    assert judged(PREEMPTED) is None


def test_what_a_supervisor_saw_takes_the_place_of_what_the_log_says() -> None:
    recorded = [replace(DIED, generation=g) for g in (3, 4, 6, 7)]
    unclaimed = replace(FAILED, generation=0)
    mine = [unclaimed, replace(FAILED, generation=4), unclaimed, replace(FAILED, generation=7)]
    merged = together(recorded, mine)
    assert [end.generation for end in merged] == [3, 0, 4, 6, 0, 7]
    assert [bool(end.error) for end in merged] == [False, True, True, False, True, True]
    assert [end.generation for end in together(recorded, [unclaimed])] == [3, 4, 6, 7, 0]
    assert together([], [unclaimed]) == [unclaimed]
