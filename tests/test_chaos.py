import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest

from launch.chaos import __main__ as command
from launch.chaos.__main__ import main
from launch.chaos.marked import living
from launch.chaos.scenarios import Scenario
from launch.chaos.watched import VARIABLE
from tests.forks import ROOT
from tests.programs import final_digest

STOPS_TRAINING = f"import os\nif {VARIABLE!r} in os.environ: os._exit(3)\n"
"""Of the programs of trials: each ends before it begins."""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scenario", "sigkil"], "no scenario 'sigkil'; --list shows them: sigterm-import, "),
        (["--repeat", "0"], "--repeat must be at least 1, got 0"),
        (["--faults", "-1"], "--faults must be at least 0, got -1"),
        (["--faults", "5", "--repeat", "2"], "give it without --scenario and --repeat"),
        (["--out", "gs://bucket/chaos"], "--out must be a folder of this host, got 'gs://"),
        (["--out", "/proc/nothing"], "--out /proc/nothing: No such file or directory"),
    ],
)
def test_what_cannot_be_done_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 78
    assert said in capsys.readouterr().err


def test_a_folder_that_holds_something_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chaos.json").write_text("[]")
    assert main(["--out", str(tmp_path)]) == 78
    assert f"--out {tmp_path} is not empty; give a new folder" in capsys.readouterr().err


def test_the_scenarios_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert "sigterm-import" in shown and "crash-loop" in shown and "mounts" in shown


def test_every_scenario_is_in_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    documented = re.findall(r"^\| `([a-z0-9-]+)` \|", (ROOT / "docs/chaos.md").read_text(), re.M)
    assert set(listed) <= set(documented)


def test_a_killed_rank_is_survived(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One scenario as a user plays it: real processes, from the command to its report."""
    out = tmp_path / "out"
    words = [
        "--scenario",
        "sigkill-rank",
        "--scenario",
        "sigkill-rank",
        "--keep",
    ]  # once all the same
    assert main([*words, "--seed", "3", "--out", str(out)]) == 0
    (result,) = json.loads((out / "chaos.json").read_text())
    assert (result["scenario"], result["outcome"], result["seed"]) == ("sigkill-rank", "passed", 3)
    assert result["violations"] == [] and result["faults"][0].startswith("SIGKILL of rank 0 of 2")
    assert final_digest(Path(result["folder"], "run")) == final_digest(out / "unbroken" / "run")
    assert "1 played, 0 failed, 0 skipped; seed 3; " in capsys.readouterr().out


def test_an_installation_that_does_not_train_at_all_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(STOPS_TRAINING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "out"
    assert main(["--scenario", "sigint", "--scenario", "crash-loop", "--out", str(out)]) == 1
    (result,) = json.loads((out / "chaos.json").read_text())
    assert (result["scenario"], result["outcome"]) == ("unbroken", "failed")
    assert result["violations"] == ["without any fault: program-0 ended with 3, expected 0"]
    assert Path(result["folder"], "program-0", "output.txt").exists()
    assert "1 played, 1 failed, 0 skipped" in capsys.readouterr().out


def test_a_folder_that_takes_nothing_is_told_in_a_line(tmp_path: Path) -> None:
    limited = ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", sys.executable, "-m", "launch.chaos"]
    words = [*limited, "--scenario", "sigint", "--out", str(tmp_path / "out")]
    done = subprocess.run(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 78
    (line,) = done.stderr.splitlines()
    assert "must take the runs, some 10 MB, and a report: " in line


def test_that_nobody_reads_the_results_is_no_violation(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "launch.chaos", "--scenario", "sigint", "--out", "out"]
    (tmp_path / "sitecustomize.py").write_text(STOPS_TRAINING)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(words, cwd=tmp_path, env=environment, stdout=writer)
    os.close(writer)
    assert done.returncode == 141


def test_a_temporary_folder_that_is_not_there_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    assert main(["--scenario", "sigint"]) == 78
    assert capsys.readouterr().err.endswith("name a folder as --out\n")


@pytest.mark.soak
@pytest.mark.parametrize("notice", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_command_itself_leaves_nothing_behind(notice: signal.Signals, tmp_path: Path) -> None:
    """Whoever does not wait for the end of that interrupts it once more, for nothing."""
    out = tmp_path / "out"
    words = [sys.executable, "-m", "launch.chaos", "--scenario", "sigstop-rank", "--out", str(out)]
    heard = partial(signal.signal, notice, signal.SIG_DFL)  # a shell's `pytest &` ignores SIGINT
    command = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    while len(living(out / "sigstop-rank-0")) < 3:
        assert command.poll() is None
        time.sleep(0.1)
    command.send_signal(notice)
    while not ignores(command.pid, notice):
        assert command.poll() is None
    command.send_signal(notice)
    assert command.communicate()[1].endswith("error: interrupted\n")
    assert command.returncode == 130
    assert living(out) == []


def ignores(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(re.findall(r"^SigIgn:\s*(\w+)$", status, re.MULTILINE)[0], 16)
    return bool(mask >> (number - 1) & 1)


def test_nothing_played_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = Scenario(name="a", about="b", act=lambda trial: None, needs=frozenset({"root"}))
    monkeypatch.setattr(command, "_chosen", lambda arguments: [alone])
    monkeypatch.setattr("launch.chaos.scenarios.os.geteuid", lambda: 1000)
    assert main(["--out", str(tmp_path / "out")]) == 1
    assert "0 played, 0 failed, 1 skipped" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "out" / "chaos.json").read_text())
    assert (result["outcome"], result["why_skipped"]) == ("skipped", "it needs root")
