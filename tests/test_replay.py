"""Replaying spot traces against what a run measured: the command, and what it reads."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch import replay as replay_module
from launch.goodput import main
from launch.replay import Trace, parse_policy, read_trace, summarised
from launch.spot_simulation import Costs
from launch.time_ledger import PARTS
from storage.canonical import canonical_json
from storage.errors import ConfigurationError
from storage.store import LocalStore
from tests.made_runs import make_run

COSTS = Costs(step_seconds=1, stall_seconds=0.5, durable_seconds=2, restart_seconds=10)
ALL = ("--step_seconds=1", "--stall_seconds=0.5", "--durable_seconds=2", "--restart_seconds=10")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"metadata": {"gap_seconds": 60}, "data": [1] * 30 + [0] + [1] * 9}))
    return path


@pytest.fixture
def four(tmp_path: Path) -> Path:
    path = tmp_path / "four.json"
    data = [4] * 20 + [2] * 5 + [4] * 20
    path.write_text(json.dumps({"metadata": {"gap_seconds": 60.0}, "data": data}))
    return path


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_a_trace_is_read(trace: Path) -> None:
    read = read_trace(trace)
    assert read == Trace(name="one", gap_seconds=60, counts=(1,) * 30 + (0,) + (1,) * 9)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "is no trace"),
        ("[]", r"is no trace: expected \{\"metadata\".*found something else"),
        ("{}", "found no 'metadata'"),
        ('{"metadata": {"gap_seconds": 0}, "data": [1]}', "gap_seconds is 0, expected a number"),
        ('{"metadata": {"gap_seconds": NaN}, "data": [1]}', "gap_seconds is nan"),
        ('{"metadata": {"gap_seconds": true}, "data": [1]}', "gap_seconds is True"),
        ('{"metadata": {"gap_seconds": 1e300}, "data": [1, 0, 1]}', "gap_seconds is 1e"),
        ('{"metadata": {"gap_seconds": 1e-9}, "data": [1, 0, 1]}', "gap_seconds is 1e-09"),
        ('{"metadata": {"gap_seconds": 1}, "data": [0, 0]}', "it never has a machine"),
        ('{"metadata": {"gap_seconds": 1}, "data": []}', "`data` is empty"),
        ('{"metadata": {"gap_seconds": 1}, "data": [1, -1]}', "`data` holds -1"),
        ('{"metadata": {"gap_seconds": 1}, "data": [1, true]}', "`data` holds True"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, content: str, why: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=why):
        read_trace(path)


def test_a_replay_needs_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "runs/none", *ALL, "--trace"]) == 78
    assert "--trace names no file" in capsys.readouterr().err


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.json: No such file"):
        read_trace(tmp_path / "none.json")


def test_policies_are_told_by_name() -> None:
    assert parse_policy("auto", COSTS, 4.0).costs == COSTS
    assert parse_policy("60s", COSTS, 4.0).every_seconds == 60
    blocking = parse_policy("100steps:blocking", COSTS, 4.0)
    assert (blocking.every_steps, blocking.costs.stall_seconds) == (100, 4.0)
    assert blocking.costs.durable_seconds == 4.0


@pytest.mark.parametrize("text", ["", "10", "10m", "auto:", "-5s", "1.2.3s", "0s", "0.5steps"])
def test_what_is_no_policy_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--policy"):
        parse_policy(text, COSTS, 4.0)


def test_a_trace_of_one_machine_is_replayed_for_a_single_host(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", "no-run", "--trace", str(trace), *ALL, "--json"]) == 0
    found = told(capsys)
    assert found["costs"]["restart_seconds"] == 10
    assert [(r["mode"], r["policy"]) for r in found["results"]] == [
        ("single", "auto"),
        ("single", "600s"),
        ("single", "100steps:blocking"),
    ]
    for result in found["results"]:
        assert sum(result["parts"].values()) == pytest.approx(result["available_seconds"])
        assert result["available_seconds"] == 39 * 60
        assert result["losses"] == 1
    goodput = {r["policy"]: r["goodput"] for r in found["results"]}
    assert goodput["auto"] > max(goodput["600s"], goodput["100steps:blocking"])


def test_several_machines_are_replayed_in_all_modes(
    four: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["replay", "no-run", "--trace", str(four), *ALL, "--policy", "60s", "--json"]
    assert main(arguments) == 0
    found = {r["mode"]: r for r in told(capsys)["results"]}
    assert list(found) == ["single", "gang", "elastic"]
    assert found["single"]["losses"] == 0
    assert found["gang"]["available_seconds"] == 40 * 60
    assert found["elastic"]["available_seconds"] == 40 * 60 + 5 * 60 / 2
    assert main([*arguments, "--mode", "gang", "--nodes", "2"]) == 0
    (result,) = told(capsys)["results"]
    assert (result["mode"], result["losses"]) == ("gang", 0)


def test_the_table_shows_each_trace_and_the_means(
    trace: Path, four: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", "no-run", "--trace", str(trace), str(four), *ALL]) == 0
    shown = capsys.readouterr().out
    assert "100steps:blocking" in shown and "elastic" in shown and "worst" in shown


def test_notices_are_counted(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["replay", "no-run", "--trace", str(trace), *ALL, "--policy", "600s", "--json"]
    assert main([*arguments, "--notice_seconds=30"]) == 0
    (result,) = told(capsys)["results"]
    assert (result["notices_met"], result["notices_missed"]) == (1, 0)


def test_costs_are_those_of_the_run(
    tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = LocalStore(tmp_path / "run")
    make_run(store)
    parts = {**dict.fromkeys(PARTS, 0.0), "start": 3.0, "compile": 1.0, "step": 8.0}
    beat = {"step": 4, "time": {"now": 1e9, "began": 0, "reached": 0, "parts": parts}}
    saves = {"count": 2, "stalled_seconds": 0.5, "durable_seconds": 1.5}
    store.put("beats/g0001.json", canonical_json({**beat, "saves": saves}))
    run = str(tmp_path / "run")
    assert main(["replay", run, "--trace", str(trace), "--json"]) == 78
    assert "has not measured restart_seconds yet" in capsys.readouterr().err
    assert main(["replay", run, "--trace", str(trace), "--restart_seconds=6", "--json"]) == 0
    assert told(capsys)["costs"] == {
        "step_seconds": 2.0,
        "stall_seconds": 0.25,
        "durable_seconds": 1.5,
        "restart_seconds": 6.0,
    }


def test_arguments_for_training_go_with_processes_only(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", "r", "--trace", str(trace), *ALL, "--", "--max_steps=3"]) == 78
    assert "--max_steps=3: arguments after -- go with --processes" in capsys.readouterr().err


def test_nodes_are_at_least_one(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "r", "--trace", str(trace), *ALL, "--nodes=0"]) == 78
    assert "--nodes must be at least 1, got 0" in capsys.readouterr().err


def test_a_gang_that_never_runs_has_no_goodput(
    four: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["replay", "runs/none", "--trace", str(four), *ALL, "--nodes=5"]
    assert main([*words, "--mode=gang"]) == 78
    assert "has at most 4 machines at a time" in capsys.readouterr().err
    assert main([*words, "--mode=elastic"]) == 0


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1"])
def test_a_notice_comes_so_many_seconds_before(
    trace: Path, seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["replay", "runs/none", "--trace", str(trace), *ALL, f"--notice_seconds={seconds}"]
    assert main(words) == 78
    assert "--notice_seconds must be a number from 0" in capsys.readouterr().err


def test_processes_take_one_trace_and_what_training_is_given(
    trace: Path,
    four: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[Any] = []

    def instead(url: str, training: list[str], stretches: list[Any], compress: float) -> Any:
        given.append((url, training, len(stretches), compress))
        return {"url": url, "starts": 2, "kills": 1, "complete": True}

    monkeypatch.setattr(replay_module, "replay_with_processes", instead)
    arguments = ["replay", "r", "--processes", "--compress=9", "--trace", str(trace)]
    assert main([*arguments, "--", "--max_steps", "7"]) == 0
    assert given == [("r", ["--max_steps", "7"], 3, 9.0)]
    assert "2 starts, 1 kills; complete" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    assert told(capsys)["kills"] == 1
    assert main([*arguments, str(four)]) == 78
    assert "--processes replays one trace at a time, got 2" in capsys.readouterr().err


def test_a_summary_is_by_mode_and_policy() -> None:
    results = [{"mode": "single", "policy": "auto", "goodput": value} for value in (0.5, 1.0, 0.75)]
    assert summarised(results) == [
        {"mode": "single", "policy": "auto", "traces": 3, "mean": 0.75, "worst": 0.5}
    ]
