"""Where a run's wall time went: parts that add up, whatever the clocks did."""

from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from launch.accounting import Life, account, life_of, measured, read_lives
from launch.time_ledger import PARTS
from storage.canonical import canonical_json
from storage.log import Log
from storage.store import LocalStore
from tests.made_runs import go_on, make_run

AT = 1_700_000_000_000


def ledger(now: int, reached: int = 0, **parts: float) -> dict[str, Any]:
    """The times of a heartbeat; `now` in milliseconds, parts in seconds."""
    told = {**dict.fromkeys(PARTS, 0.0), **parts}
    return {
        "now": now / 1000,
        "began": now / 1000 - sum(told.values()),
        "reached": reached,
        "parts": told,
    }


def life(generation: int, began: int, **parts: int) -> Life:
    """A life that told its times, in milliseconds."""
    told = {**dict.fromkeys(PARTS, 0), **parts}
    ended = began + sum(told.values())
    return Life(generation=generation, began=began, ended=ended, parts=told, told=True)


amounts = st.fixed_dictionaries({name: st.integers(0, 10**9) for name in PARTS})
anything = st.builds(
    lambda began, parts: life(1, began, **parts), st.integers(0, 4 * 10**12), amounts
)


@given(st.lists(anything, max_size=8))
def test_the_parts_add_up_and_none_is_negative_whatever_the_clocks_did(lives: list[Life]) -> None:
    """Clocks that jump, go backwards, differ between hosts; lives that overlap."""
    found = account(lives)
    assert sum(found.parts.values()) == found.wall
    assert min(found.parts.values()) >= 0
    assert found.parts["step"] == sum(one.parts["step"] for one in lives)
    assert found.goodput is None or 0 <= found.goodput <= 1
    assert found.goodput_alive is None or found.goodput_alive >= (found.goodput or 0)


@given(st.lists(st.tuples(st.integers(0, 10**9), amounts), min_size=1, max_size=8))
def test_with_clocks_that_agree_the_wall_is_from_the_first_start_to_the_last_sign(
    told: list[tuple[int, dict[str, int]]],
) -> None:
    lives: list[Life] = []
    for gap, parts in told:
        lives.append(life(len(lives), (lives[-1].ended if lives else AT) + gap, **parts))
    found = account(lives)
    assert found.wall == lives[-1].ended - lives[0].began
    assert found.parts["gap"] == sum(gap for gap, _ in told[1:])


@given(amounts, amounts, st.integers(0, 10**9))
def test_a_start_that_waited_for_the_end_of_the_one_before_is_counted_from_there(
    first: dict[str, int], second: dict[str, int], overlap: int
) -> None:
    one = life(1, AT, **first)
    overlap = min(overlap, second["start"])
    two = life(2, one.ended - overlap, **second)
    assert account([one, two]).wall == two.ended - one.began
    assert account([one, two]).parts["start"] == first["start"] + second["start"] - overlap


def test_a_clock_that_goes_back_by_an_hour_takes_nothing_but_a_start() -> None:
    one = life(1, AT, start=2000, step=60_000)
    two = life(2, AT - 3_600_000, start=3000, step=50_000)
    assert account([one, two]).parts | {"gap": 0} == account([one, two]).parts
    assert account([one, two]).wall == 62_000 + 50_000


def test_an_hour_without_a_machine_is_the_gap() -> None:
    found = account([life(1, AT, step=1000), life(2, AT + 3_601_000, step=1000)])
    assert found.parts["gap"] == 3_600_000
    assert found.goodput == 2000 / 3_602_000
    assert found.goodput_alive == 1.0


def test_nothing_is_told_of_nothing() -> None:
    found = account([])
    assert (found.wall, found.goodput, found.goodput_alive) == (0, None, None)


def test_an_incarnation_without_a_heartbeat_is_as_long_as_its_records() -> None:
    found = life_of(3, (AT, AT + 5000), {})
    assert found is not None
    assert (found.began, found.ended, found.told) == (AT, AT + 5000, False)
    assert found.parts["other"] == 5000
    assert life_of(3, None, {}) is None


def test_records_after_the_last_heartbeat_prolong_it_as_other() -> None:
    beat = {"step": 9, "time": ledger(AT + 9000, reached=4, start=4.0, step=5.0)}
    found = life_of(2, (AT + 3000, AT + 11_000), beat)
    assert found is not None
    assert (found.began, found.ended) == (AT, AT + 11_000)
    assert (found.parts["step"], found.parts["other"], found.new_steps) == (5000, 2000, 5)


def test_times_that_are_no_numbers_are_none() -> None:
    good = ledger(AT, step=1.0)
    for bad in (
        *(None, [], "x", {}, {"now": 1.0, "parts": []}),
        {**good, "now": "x"},
        {**good, "now": float("nan")},
        {**good, "now": float("inf")},
        {**good, "parts": {**good["parts"], "step": -1.0}},
        {**good, "parts": {**good["parts"], "step": True}},
        {**good, "parts": {"step": 1.0}},
    ):
        found = life_of(1, (AT, AT + 1), {"time": bad})
        assert found is not None and not found.told
    assert life_of(1, None, {"time": good}) is not None


def test_lives_are_read_from_the_whole_log_and_all_heartbeats(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    make_run(store, 2)
    go_on(store, 5)
    go_on(store)
    records = Log(store, whole=True).refresh()
    ended = round(records[-2].written_at * 1000)
    store.put("beats/g0002.json", canonical_json({"step": 6, "time": ledger(ended, 2, step=3.0)}))
    store.put("beats/g0007.json", b"{")
    store.put("beats/other", b"{")
    first, second, third = read_lives(store, records)
    assert [first.told, second.told, third.told] == [False, True, False]
    assert (second.generation, second.new_steps, second.parts["step"]) == (2, 4, 3000)
    found = account([first, second, third])
    assert found.untold == 2 and found.incarnations == 3


def test_notices_are_met_or_missed_and_one_that_nobody_settled_is_missed() -> None:
    notices = ({"met": True}, {"met": True}, {"met": False}, {"met": None}, 3, None)
    lives = [
        Life(
            generation=n,
            began=AT,
            ended=AT,
            parts=dict.fromkeys(PARTS, 0),
            beat={"notice": notice},
        )
        for n, notice in enumerate(notices)
    ]
    found = account(lives)
    assert (found.notices_met, found.notices_missed) == (2, 2)


def told_life(
    generation: int,
    parts: dict[str, float],
    *,
    step: int,
    reached: int,
    saves: dict[str, Any] | None = None,
) -> Life:
    beat: dict[str, Any] = {"step": step, "time": ledger(AT, reached, **parts)}
    found = life_of(generation, None, beat | ({"saves": saves} if saves else {}))
    assert found is not None
    return found


def test_costs_are_those_that_the_heartbeats_tell() -> None:
    first = told_life(
        1,
        {"start": 60.0, "compile": 5.0, "step": 50.0},
        step=100,
        reached=0,
        saves={"count": 4, "stalled_seconds": 1.0, "durable_seconds": 2.0},
    )
    second = told_life(
        2,
        {"start": 6.0, "restore": 1.0, "compile": 1.0, "replay": 5.0, "step": 30.0},
        step=160,
        reached=100,
        saves={"count": 1, "stalled_seconds": 0.5, "durable_seconds": 4.0},
    )
    found = measured([first, second])
    assert found.step_seconds == 0.5
    assert found.stall_seconds == 0.3
    assert found.durable_seconds == 3.0
    assert found.restart_seconds == 8.0


def test_what_was_not_measured_is_none() -> None:
    found = measured([told_life(1, {"start": 1.0}, step=0, reached=0)])
    assert (found.step_seconds, found.stall_seconds) == (None, None)
    assert (found.durable_seconds, found.restart_seconds) == (None, None)
