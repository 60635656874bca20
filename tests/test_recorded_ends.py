"""How starts ended by a run's log, of real incarnations; and that this is what is judged."""

from pathlib import Path

import pytest

from checkpointing.beats import Beats
from checkpointing.incarnation import claim_run
from launch.crash_loop import crash_loop
from launch.exit_codes import last_words
from launch.recorded_ends import recorded_ends
from storage.canonical import canonical_json
from storage.log import Log
from storage.store import Store, open_store
from tests.made_runs import RUN, go_on, make_run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "run"))


def beats_of(store: Store, phase: str, step: int, error: BaseException | None = None) -> None:
    """One more incarnation, whose heartbeats end with this error; or which is killed."""
    owner = claim_run(store, Log(store), body={}, take_over=True)
    beats = Beats(store, owner, lambda: (phase, step))
    beats.last_words = last_words
    beats._beat()
    if error is not None:
        beats._left = True
        beats._last_words = beats.last_words(error)
        beats._beat()


def test_starts_are_counted_over_supervisors_by_the_log(store: Store) -> None:
    store.put("run.json", canonical_json(RUN))
    for _ in range(3):
        beats_of(store, "restore", 0, ZeroDivisionError("in every one"))
    said = crash_loop(*recorded_ends(store))
    assert said is not None and "'restore' at step 0: ZeroDivisionError: in every one" in said


def test_deaths_in_the_same_place_are_counted_by_the_log(store: Store) -> None:
    store.put("run.json", canonical_json(RUN))
    for count in range(4):
        assert crash_loop(*recorded_ends(store)) is None, count
        beats_of(store, "restore", 0)
    assert crash_loop(*recorded_ends(store)) is not None


def test_a_peer_that_was_lost_is_a_death_and_no_error(store: Store) -> None:
    store.put("run.json", canonical_json(RUN))
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    beats_of(store, "reduce", 3, lost)
    ((end,), _) = recorded_ends(store)
    assert (end.error, end.in_order) == ("", False)


def test_a_commit_is_progress_whatever_the_beats_say(store: Store) -> None:
    make_run(store, 5, 10)
    ends, before = recorded_ends(store)
    assert [(end.reached, end.phase) for end in ends] == [(10, "claim")]
    assert before == 0
    for step in (20, 30, 40):
        go_on(store, step)
    assert crash_loop(*recorded_ends(store)) is None


def test_only_the_newest_incarnations_are_read(store: Store) -> None:
    make_run(store, 50)
    for _ in range(12):
        beats_of(store, "restore", 0, ZeroDivisionError("x"))
    ends, before = recorded_ends(store)
    assert (len(ends), before) == (10, 50)
