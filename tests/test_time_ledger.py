"""Where the seconds of a start went: fed by phases, told at any time."""

from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from checkpointing.beats import read_beat
from checkpointing.history import History, history
from launch.time_ledger import PARTS, TimeLedger, process_age_seconds, reached_before
from storage.canonical import canonical_json
from storage.errors import StoreUnavailableError
from storage.log import Log
from storage.store import LocalStore
from tests.made_runs import make_run
from tests.programs import train_here

PHASES = (
    *("open", "claim", "claim:wait", "prepare:shard", "restore", "step", "micro_batch"),
    *("reduce", "update:before", "evaluate", "sample", "wait_for_save", "edit:recorded"),
)


class Clock:
    """Counts how often it is looked at; time passes when the test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.looks = 0

    def __call__(self) -> int:
        self.looks += 1
        return round(self.seconds * 1e9)


def ledger(clock: Clock, *, age: float = 0.0, wall: float = 1e9) -> TimeLedger:
    return TimeLedger(
        clock_ns=clock, wall_clock=lambda: wall + clock.seconds, age_seconds=lambda: age
    )


def parts(of: TimeLedger) -> dict[str, float]:
    """The parts that are not 0."""
    return {name: seconds for name, seconds in of.told()["parts"].items() if seconds}


def live(of: TimeLedger, clock: Clock, *phases: tuple[str, int, float]) -> None:
    """Enter phases, each with the finished steps, and stay for so many seconds."""
    for phase, step, seconds in phases:
        of(phase, step)
        clock.seconds += seconds


def milliseconds(told: dict[str, Any]) -> tuple[int, int]:
    """The age of the process, and the sum of the parts."""
    age = round(told["now"] * 1000) - round(told["began"] * 1000)
    return age, sum(round(seconds * 1000) for seconds in told["parts"].values())


def test_each_phase_is_charged_to_its_part() -> None:
    clock = Clock()
    one = ledger(clock, age=2.5)
    live(
        one,
        clock,
        ("open", 0, 1.0),
        ("claim:wait", 0, 10.0),
        ("prepare:shard", 0, 4.0),
        ("restore", 0, 3.0),
        *(("step", step, 1.0) for step in range(5)),
        ("evaluate", 5, 2.0),
        ("sample", 5, 0.5),
        ("wait_for_save", 5, 0.25),
        ("edit:recorded", 5, 0.125),
    )
    expected = {"start": 17.5, "restore": 3.0, "step": 5.0, "evaluate": 2.5, "save": 0.25}
    assert parts(one) == {**expected, "other": 0.125}


def test_what_the_first_step_takes_longer_than_the_second_is_compilation() -> None:
    clock = Clock()
    one = ledger(clock)
    live(one, clock, ("step", 0, 9.0))
    assert parts(one) == {"compile": 9.0}
    live(one, clock, ("step", 1, 2.0), ("step", 2, 2.0))
    assert parts(one) == {"compile": 7.0, "step": 6.0}


def test_a_first_step_that_is_no_slower_is_no_compilation() -> None:
    clock = Clock()
    one = ledger(clock)
    live(one, clock, ("step", 0, 1.0), ("step", 1, 3.0), ("step", 2, 0.0))
    assert parts(one) == {"step": 4.0}


def test_steps_that_were_reached_before_are_replayed() -> None:
    clock = Clock()
    one = ledger(clock)
    one.reached = 12
    live(one, clock, *(("step", step, 1.0) for step in range(10, 15)))
    assert parts(one) == {"replay": 2.0, "step": 3.0}


def test_waits_for_data_and_stalls_by_saves_are_taken_out_of_steps() -> None:
    clock = Clock()
    one = ledger(clock)
    live(one, clock, *(("step", step, 1.0) for step in range(4)))
    one.waited_seconds, one.stalled_seconds = lambda: 0.5, lambda: 0.25
    assert parts(one) == {"step": 3.25, "data_wait": 0.5, "save": 0.25}
    assert parts(one) == {"step": 3.25, "data_wait": 0.5, "save": 0.25}


def test_a_wait_longer_than_the_steps_so_far_is_charged_when_there_are_more() -> None:
    clock = Clock()
    one = ledger(clock)
    one.waited_seconds = lambda: 2.0
    live(one, clock, ("step", 0, 0.5))
    assert parts(one) == {"data_wait": 0.5}
    live(one, clock, ("step", 1, 3.0))
    assert parts(one)["data_wait"] == 2.0


def test_nothing_within_a_step_looks_at_the_clock() -> None:
    clock = Clock()
    one = ledger(clock)
    one("step", 0)
    looks = clock.looks
    for phase in ("micro_batch", "reduce", "update:before", "update:after"):
        one(phase, 0)
    assert clock.looks == looks


def test_a_wall_clock_that_is_put_right_is_believed_as_it_is_now() -> None:
    clock = Clock()
    walls = iter([5.0, 1e9])
    one = TimeLedger(clock_ns=clock, wall_clock=lambda: next(walls), age_seconds=lambda: 1.0)
    assert one.told()["began"] == 4.0
    clock.seconds = 2.0
    assert (one.told() | {"parts": None}) == {
        "began": 1e9 - 3.0,
        "now": 1e9,
        "reached": 0,
        "parts": None,
    }


@given(
    st.lists(
        st.tuples(st.sampled_from(PHASES), st.floats(0, 1e6), st.floats(0, 1e4), st.floats(0, 1e4)),
        max_size=30,
    ),
    st.floats(0, 1e5),
    st.floats(-1e9, 4e9),
    st.integers(0, 10),
)
def test_the_parts_add_up_and_none_is_negative(
    phases: list[tuple[str, float, float, float]], age: float, wall: float, reached: int
) -> None:
    clock = Clock()
    one = ledger(clock, age=age, wall=wall)
    one.reached = reached
    waited = stalled = 0.0
    for step, (phase, seconds, wait, stall) in enumerate(phases):
        live(one, clock, (phase, step, seconds))
        waited, stalled = waited + wait, stalled + stall
        one.waited_seconds, one.stalled_seconds = lambda w=waited: w, lambda s=stalled: s
        told = one.told()
        assert tuple(told["parts"]) == PARTS
        assert min(told["parts"].values()) >= 0
        age_told, total = milliseconds(told)
        assert age_told == total
    assert abs(sum(one.told()["parts"].values()) - age - clock.seconds) < 0.01


def test_the_highest_step_before_is_found_in_commits_and_the_newest_heartbeat(
    tmp_path: Path,
) -> None:
    store = LocalStore(tmp_path)
    make_run(store, 4)
    past = history(Log(store).refresh())
    assert reached_before(store, past, 2) == 4
    store.put("beats/g0001.json", canonical_json({"step": 7}))
    assert reached_before(store, past, 2) == 7
    assert reached_before(store, past, 5) == 7  # generations 2 to 4 left no heartbeat
    store.put("beats/g0002.json", canonical_json({"step": 5, "time": {"reached": 9}}))
    assert reached_before(store, past, 3) == 9
    store.put("beats/g0003.json", canonical_json({"step": "x", "time": [1]}))
    assert reached_before(store, past, 4) == 9


def test_a_store_that_fails_leaves_what_the_log_says(tmp_path: Path) -> None:
    class Failing(LocalStore):
        def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            raise StoreUnavailableError("network")

    assert reached_before(Failing(tmp_path), History(), 3) == 0


def test_this_process_has_an_age() -> None:
    assert 0 < process_age_seconds() < 7 * 86400


def test_heartbeats_of_the_real_program_hold_a_ledger_that_adds_up(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    assert train_here("--run", run, *data, "--max_steps=4", "--sample_interval_steps=0") == 0
    beat = read_beat(LocalStore(run), 1)
    age, total = milliseconds(beat["time"])
    assert age == total
    assert {part for part, seconds in beat["time"]["parts"].items() if seconds} >= {
        *("start", "step", "evaluate", "save"),
    }
    assert beat["time"]["reached"] == 0
    assert beat["left"] is True and beat["step"] == 4
    assert set(beat["saves"]) == {"count", "seconds", "stalled_seconds", "durable_seconds"}
    assert beat["saves"]["durable_seconds"] > 0
