"""The program from its first line to its exit code. What it trains is in test_resume.py."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkpointing.history import history
from launch.train import main
from storage.log import Log
from storage.store import open_store
from tests.programs import ROOT, train_here

SHAPE = (
    "--max_steps=2",
    "--eval_interval_steps=1",
    "--eval_windows=10",
    "--sample_interval_steps=2",
    "--sample_tokens=2",
    "--save_interval_steps=1",
    "--wait_for_saves",
    "--n_embd=32",
    "--context=32",
    "--global_batch_size=8",
    "--warmup_steps=1",
)


def program(*arguments: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """`launch/train.py` executed as a file, from another folder."""
    command = [sys.executable, ROOT / "launch" / "train.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_it_runs_as_a_file_from_any_folder(tmp_path: Path) -> None:
    """Python puts `launch/` in front of the path then, where `build.py` and others lie."""
    (tmp_path / "storage").mkdir()
    done = program("--help", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Exit codes" in done.stdout


def test_the_process_ends_with_the_exit_code(tmp_path: Path, data: tuple[str, ...]) -> None:
    done = program("--run=runs/a", *data, *SHAPE, folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "complete: 2 steps, digest" in done.stderr
    assert (tmp_path / "runs/a/run.json").exists(), "a run is relative to the folder"
    done = program("--run=runs/a", *data, *SHAPE, "--seed=4", folder=tmp_path)
    assert done.returncode == 78
    assert done.stderr.startswith("error: seed decides bits"), "one line, and nothing else"


def test_signals_are_handled_before_torch_is_imported() -> None:
    code = "import sys, launch.train; assert 'torch' not in sys.modules, 'seconds without a notice'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_notice_after_the_claim_ends_it_before_a_step_is_begun(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    phases: list[str] = []

    def listener(phase: str, step: int) -> None:
        phases.append(phase)
        if phase == "restore":
            signal.raise_signal(signal.SIGTERM)

    assert train_here("--run", tmp_path / "run", *data, *SHAPE, listener=listener) == 75
    assert "restore" in phases and "step" not in phases


def test_a_rank_whose_supervisor_is_gone_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANGEFLOW_SUPERVISOR", str(tmp_path / "gone"))
    assert train_here("--run", tmp_path / "run") == 75
    assert "the supervisor of this rank is gone" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_phases_come_in_order(tmp_path: Path, data: tuple[str, ...]) -> None:
    """These names are the contract of heartbeats, and of the tests that kill at them."""
    heard: list[tuple[str, int]] = []
    run = tmp_path / "run"
    arguments = ("--run", run, *data, *SHAPE, "--virtual_ranks=1", "--micro_batch_size=8")
    code = train_here(*arguments, listener=lambda phase, step: heard.append((phase, step)))
    assert code == 0
    once = list(dict.fromkeys(heard))
    save = ["begin", "object", "uploaded", "manifest", "committed"]
    before = ("rendezvous", "open", "claim", "restore")
    steps = [(name, 0) for name in (*before, "step", "micro_batch")]
    assert once[: len(steps)] == steps
    assert [name for name, step in once if step == 1 and name.startswith("save")] == [
        f"save:{part}" for part in save
    ]
    second = [name for name, step in once if step == 2]
    assert second.index("sample") < second.index("save:begin"), "a save comes last in its step"
    assert [step for _, step in heard] == sorted(step for _, step in heard)


def test_a_second_start_goes_on_where_the_first_ended(
    tmp_path: Path, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--run", tmp_path / "run", *data, *SHAPE)
    assert train_here(*arguments) == 0
    begun: list[int] = []

    def listener(phase: str, step: int) -> None:
        if phase == "step":
            begun.append(step)

    assert train_here(*arguments, "--max_steps=4", listener=listener) == 0
    assert begun == [2, 3]
    assert "going on from step 2, saved by generation 1" in capsys.readouterr().err
    past = history(Log(open_store(str(tmp_path / "run"))).refresh())
    assert [claim.generation for claim in past.lifespans] == [1, 2]
    assert past.checkpoints[2].parent == past.checkpoints[1].index


def test_a_notice_in_the_last_step_leaves_a_complete_run(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    def listener(phase: str, step: int) -> None:
        if (phase, step) == ("micro_batch", 1):
            signal.raise_signal(signal.SIGTERM)

    one_micro_batch = ("--virtual_ranks=1", "--micro_batch_size=8", "--grace_seconds=600")
    arguments = ("--run", tmp_path / "run", *data, *SHAPE, *one_micro_batch)
    assert train_here(*arguments, listener=listener) == 0


def test_a_defect_exits_70_with_its_traceback(
    tmp_path: Path, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    def listener(phase: str, step: int) -> None:
        if phase == "update:before":
            raise ZeroDivisionError("in the listener")

    before = signal.getsignal(signal.SIGTERM)
    assert train_here("--run", tmp_path / "run", *data, *SHAPE, listener=listener) == 70
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "ZeroDivisionError: in the listener" in shown
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_arguments_the_command_line_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset=huge"])
    assert main() == 78
    assert capsys.readouterr().err.startswith("error: no preset 'huge'")
