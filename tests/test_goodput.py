"""`python -m launch.goodput RUN`: where the wall time went, as people and scripts read it."""

import json
import sys
from pathlib import Path

import pytest

from launch.goodput import SAID, main
from launch.time_ledger import PARTS
from storage.canonical import canonical_json
from storage.log import Log
from storage.store import LocalStore
from tests.made_runs import make_run


@pytest.fixture
def run(tmp_path: Path) -> str:
    """One incarnation with 8 useful seconds of 12, and one that only the log knows."""
    store = LocalStore(tmp_path / "run")
    make_run(store, 2)
    first = Log(store).refresh()[-1].written_at
    parts = {**dict.fromkeys(PARTS, 0.0), "start": 3.0, "compile": 1.0, "step": 8.0}
    beat = {"step": 4, "time": {"now": first + 1, "reached": 0, "parts": parts}}
    store.put("beats/g0001.json", canonical_json({**beat, "notice": {"met": True}}))
    return str(tmp_path / "run")


def test_the_table_names_every_part_and_the_goodput(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([run]) == 0
    shown = capsys.readouterr().out
    for name in SAID:
        assert f"\n{name} " in f"\n{shown}"
    assert "goodput 0.6667 of the wall time" in shown
    assert "notices: 1 met, 0 missed" in shown
    assert "a restart not measured yet" in shown


def test_json_adds_up(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    total = sum(round(1000 * seconds) for seconds in found["parts"].values())
    assert total == round(1000 * found["wall_seconds"]) == 12_000
    assert found["goodput"] == pytest.approx(8 / 12)
    assert found["measured"]["step_seconds"] == 2.0
    assert [life["generation"] for life in found["lives"]] == [1]


def test_a_run_that_was_never_claimed_has_run_for_no_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LocalStore(tmp_path).put(
        "run.json", canonical_json({"format": 1, "run": "made", "identity": {}})
    )
    assert main([str(tmp_path)]) == 0
    assert "nothing has run here yet" in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 78
    assert "holds no run" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "python -m launch.goodput runs/default" in capsys.readouterr().out
    assert main(["replay", "--help"]) == 0
    assert "--processes --compress 100" in capsys.readouterr().out


def test_without_arguments_it_reads_those_of_the_process(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["goodput", run])
    assert main() == 0
    assert "goodput 0.6667" in capsys.readouterr().out
