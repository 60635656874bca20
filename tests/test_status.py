"""Where a run stands, and what to do next."""

import json
from pathlib import Path
from typing import Any

import pytest

from checkpointing.asks import ask
from launch import status as status_module
from launch.status import main, status
from launch.time_ledger import PARTS
from storage.canonical import canonical_json
from storage.log import Draft, Log
from storage.store import LocalStore
from tests.made_runs import RUN, make_run

NOW = 4e9  # after the records of the log, which have the time of the test
SCHEDULE = {"schedule": {"schedule.max_steps": 100}}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def beat(store: LocalStore, generation: int = 1, **more: Any) -> None:
    """A heartbeat at step 20, five seconds ago, after 40 useful seconds of 50."""
    parts = {**dict.fromkeys(PARTS, 0.0), "start": 9.0, "save": 1.0, "step": 40.0}
    time = {"now": NOW - 5, "reached": 0, "parts": parts}
    told = {"phase": "micro_batch", "step": 20, "left": False, "loss": 2.5, "time": time, **more}
    store.put(f"beats/g{generation:04d}.json", canonical_json(told))


def told(store: LocalStore) -> dict[str, Any]:
    return status(store, sleep=lambda seconds: None, wall_clock=lambda: NOW)


def elsewhere(store: LocalStore) -> None:
    body = {"owner": {"host": "far", "boot_id": "another", "pid": 3}, **SCHEDULE}
    Log(store).append(lambda _: Draft(kind="CLAIM", generation=2, body=body))


def test_a_run_that_trains_is_told_with_step_loss_and_checkpoint(store: LocalStore) -> None:
    make_run(store, 12, 16, claim=SCHEDULE)
    beat(store)
    found = told(store)
    assert (found["state"], found["generation"], found["phase"]) == ("alive", 1, "micro_batch")
    assert (found["step"], found["max_steps"], found["loss"]) == (20, 100, 2.5)
    assert (found["checkpoint"]["step"], found["checkpoint"]["age_steps"]) == (16, 4)
    assert found["beat_age_seconds"] == 5
    assert found["requests"] == []
    assert found["advice"] == "nothing: it trains"


def test_what_is_left_is_told_at_the_pace_of_the_run_without_the_gaps(store: LocalStore) -> None:
    make_run(store, claim=SCHEDULE)
    beat(store, time={"now": NOW, "reached": 0, "parts": {**dict.fromkeys(PARTS, 0.0), "step": 50}})
    assert told(store)["eta_seconds"] == pytest.approx(80 * 50 / 20)
    beat(store, time=None)
    assert told(store)["eta_seconds"] is None


def test_goodput_is_that_of_all_incarnations(store: LocalStore) -> None:
    make_run(store)
    beat(store, time={"now": 1.0, "reached": 0, "parts": {**dict.fromkeys(PARTS, 1.0)}})
    assert told(store)["incarnations"] == 1
    assert told(store)["goodput"] is not None


def test_one_that_left_goes_on_from_its_checkpoint(store: LocalStore) -> None:
    make_run(store, 16)
    beat(store, left=True)
    found = told(store)
    assert found["state"] == "gone"
    assert found["advice"].endswith("it goes on from step 16, and does 4 steps again")


def test_one_that_is_silent_is_to_be_started_again(store: LocalStore) -> None:
    make_run(store, 20)
    elsewhere(store)
    beat(store, 2)
    found = told(store)
    assert (found["state"], found["host"], found["pid"]) == ("silent", "far", 3)
    assert found["advice"] == "start the same command again: it goes on from step 20"


def test_an_error_comes_before_a_new_start(store: LocalStore) -> None:
    make_run(store)
    beat(store, left=True, error={"code": 78, "line": "no space"})
    assert told(store)["error"] == "no space (exit code 78)"
    advice = told(store)["advice"]
    assert advice.startswith(
        "see to the error; then start the same command again: nothing is saved"
    )


def test_requests_that_wait_are_shown_and_what_is_none_is_not(store: LocalStore) -> None:
    make_run(store)
    beat(store)
    ask(store, "save")
    store.put("requests/x.json", b"{")
    found = told(store)
    assert [request["kind"] for request in found["requests"]] == ["save"]
    assert "answers what is asked" in found["advice"]


def test_a_complete_run_is_to_be_used(store: LocalStore) -> None:
    owner = make_run(store, 20)
    owner.append("END", lambda _: {"step": 20, "digest": ""})
    assert "checkpointing.export" in told(store)["advice"]


def test_a_run_that_was_never_claimed_is_to_be_started(store: LocalStore) -> None:
    store.put("run.json", canonical_json(RUN))
    found = told(store)
    assert (found["state"], found["step"], found["host"]) == ("never claimed", 0, None)
    assert found["advice"].startswith("start it: torchrun")


def test_a_command_that_is_advised_can_be_pasted_with_any_name_of_a_run(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "my run")
    store.put("run.json", canonical_json(RUN))
    assert told(store)["advice"].endswith(f"--run '{tmp_path}/my run'")


def test_a_damaged_log_is_for_the_doctor(store: LocalStore) -> None:
    make_run(store, 2, 4)
    store.put("log/0000000002.json", b"{}")
    assert "runs doctor" in told(store)["advice"]


def test_heartbeats_that_make_no_sense_are_left_out(store: LocalStore) -> None:
    make_run(store, claim={"schedule": 3})
    beat(store, step="x", loss=True, time={"now": "y"}, phase=None)
    found = told(store)
    assert (found["step"], found["loss"], found["beat_age_seconds"]) == (0, None, None)
    assert (found["max_steps"], found["eta_seconds"]) == (None, None)


def test_the_command_prints_a_table_or_json(
    store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(store, 16, claim=SCHEDULE)
    beat(store, phase="\x1b[2Jstep")
    assert main([str(store.root)]) == 0
    shown = capsys.readouterr().out
    assert "20 of 100" in shown and "step 16, 4 steps ago" in shown and "0.8000" in shown
    assert "\x1b" not in shown
    assert main([str(store.root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 20


def test_the_table_of_a_run_without_anything(
    store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    store.put("run.json", canonical_json(RUN))
    assert main([str(store.root)]) == 0
    assert "never claimed" in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 78
    assert "holds no run" in capsys.readouterr().err
    assert status_module._duration(3725) == "1:02:05"


@pytest.mark.parametrize("number", ["NaN", "1e999", "9" * 400])
def test_heartbeats_with_numbers_that_are_none_are_left_out(
    store: LocalStore, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(store)
    parts = json.dumps(dict.fromkeys(PARTS, 0))
    beat = '{"loss": %s, "time": {"now": %s, "reached": 0, "parts": %s}}'
    store.put("beats/g0001.json", (beat % (number, number, parts)).encode())
    assert main([str(store.root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["loss"], found["beat_age_seconds"]) == (None, None)
