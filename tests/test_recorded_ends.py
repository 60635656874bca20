"""How starts ended by a run's log, of real incarnations; and that this is what is judged."""

from pathlib import Path

import pytest

from checkpointing.beats import Beats, told_error
from checkpointing.incarnation import claim_run
from launch.crash_loop import crash_loop
from launch.exit_codes import last_words
from launch.recorded_ends import recorded_ends
from launch.status import status
from storage.canonical import canonical_json
from storage.errors import StopRequestedError
from storage.log import Log
from storage.store import Store, open_store
from tests.made_runs import RUN, go_on, make_run
from tests.programs import Program


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


@pytest.mark.parametrize("beaten", [False, True])
def test_the_error_of_another_rank_is_the_error_of_its_start(store: Store, beaten: bool) -> None:
    """Rank 0 knows only that it lost a peer, or was killed before it could say so."""
    store.put("run.json", canonical_json(RUN))
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    for generation in (1, 2, 3):
        beats_of(store, "reduce", generation, lost if beaten else None)
        with pytest.raises(ZeroDivisionError), told_error(store, generation, 1, last_words):
            raise ZeroDivisionError("on rank 1")
    ends, _ = recorded_ends(store)
    assert [end.error for end in ends] == ["ZeroDivisionError: on rank 1"] * 3
    assert not any(end.in_order for end in ends)


def test_what_another_rank_has_lost_or_was_told_is_no_error_of_its_start(store: Store) -> None:
    store.put("run.json", canonical_json(RUN))
    beats_of(store, "reduce", 1, RuntimeError("Connection reset by peer"))
    for error in (RuntimeError("Connection reset by peer"), StopRequestedError("a notice")):
        with pytest.raises(type(error)), told_error(store, 1, 1, last_words):
            raise error
    assert [end.error for end in recorded_ends(store)[0]] == [""]


def test_a_rank_with_an_error_of_its_own_is_named_by_the_run(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    run, shape = tmp_path / "run", ("--max_steps=8", "--n_embd=32", "--context=32")
    arguments = ("--run", run, *data, *shape, "--global_batch_size=8", "--eval_interval_steps=0")
    with Program(*arguments, world=2, control="failing_rank") as program:
        assert program.end() != 0
    store = open_store(str(run))
    assert [end.error for end in recorded_ends(store)[0]] == [
        "ZeroDivisionError: in the data of step 3"
    ]
    told = status(store, sleep=lambda seconds: None)["error"]
    assert told == "ZeroDivisionError: in the data of step 3 (exit code 70)"


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
