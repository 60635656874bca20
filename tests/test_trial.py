import os
import signal
from pathlib import Path

import pytest

from launch.chaos import trial as module
from launch.chaos.trial import Place, Trial, Violation


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(tmp_path / "trial", ("--data=a=b",), name="7/some/0")


def test_what_is_left_behind_is_named(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ORPHAN_SECONDS", 0.0)
    with trial:
        program = trial.start(["sh", "-c", "(setsid sleep 1000 &)"])
        program.end(0)
        with pytest.raises(Violation, match=r"program-0 is over, and left behind process \d+ \("):
            program.gone()


def test_another_exit_code_is_a_violation(trial: Trial) -> None:
    with trial:
        with pytest.raises(Violation, match="program-0 ended with 3, expected 0 or 75"):
            trial.start(["sh", "-c", "exit 3"]).end(0, 75)
        killed = trial.start(["sleep", "1000"])
        killed.signal(signal.SIGKILL)
        assert killed.end() == -signal.SIGKILL and killed.ended


def test_what_is_never_said_is_a_violation(trial: Trial) -> None:
    with trial:
        program = trial.start(["sh", "-c", "echo one"])
        program.says("one")
        with pytest.raises(Violation, match="it never said 'two' before it ended"):
            program.says("two")


def test_what_does_not_end_is_a_violation(trial: Trial) -> None:
    with trial, pytest.raises(Violation, match="program-0 did not end in 0 s"):
        trial.start(["sleep", "1000"]).end(seconds=0.0)


def test_the_same_name_draws_the_same(trial: Trial, tmp_path: Path) -> None:
    again, other = (Trial(tmp_path / n, (), name=f"7/some/{n}") for n in ("0", "1"))
    draws = [t.random.random() for t in (trial, again, other)]
    assert draws[0] == draws[1] != draws[2]


def test_command_lines_have_the_run_its_sources_and_the_marks(trial: Trial) -> None:
    words = trial.supervisor(3, own=("--start_limit_seconds=9",), flags=("--take_over",))
    before, behind = words[: words.index("--")], words[words.index("--") + 1 :]
    assert before[1:3] == ["-m", "launch.supervise"] and before[-1] == "--start_limit_seconds=9"
    assert behind[:3] == ["--standalone", "--nproc_per_node=3", "--"]
    assert behind[3].endswith("watched.py") and "--data=a=b" in behind
    assert behind[behind.index("--run") + 1] == trial.run and behind[-1] == "--take_over"
    assert trial.alone("--take_over")[1:] == behind[3:]


def test_programs_run_elsewhere_by_what_enters_there(trial: Trial) -> None:
    class Elsewhere:
        def entering(self, *command: str) -> list[str]:
            return ["env", "WHERE=elsewhere", *command]

    with trial:
        program = trial.start(
            ["sh", "-c", "echo $WHERE $MORE"], on=Elsewhere(), environment={"MORE": "so"}
        )
        program.says("elsewhere so")


def test_a_program_has_no_devices_and_no_place_in_another_world(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "PET_NNODES"):
        monkeypatch.setenv(name, "another")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    with trial:
        program = trial.start(["env"], environment={"PYTHONPATH": "/first"})
        program.end(0)
        said = program.output().splitlines()
    assert f"PYTHONPATH=/first:{module.ROOT}:/somewhere" in said
    assert "CUDA_VISIBLE_DEVICES=" in said
    assert not [line for line in said if line.endswith("=another")]


def test_temporary_files_of_programs_that_were_killed_are_removed(trial: Trial) -> None:
    with trial:
        program = trial.start(["sh", "-c", "mktemp -d; kill -9 $$"])
        program.end(-signal.SIGKILL)
        left = Path(program.output().strip())
        assert left.is_dir()
    assert not left.exists()


def test_who_is_told_of_a_notice_by_its_supervisor_is_waited_for(trial: Trial) -> None:
    """What stands for a supervisor passes SIGTERM on to the process that it is given."""
    minds = "trap 'kill -USR1 $1; exit 75' TERM; echo minding; while :; do sleep 0.01; done"
    with trial:
        rank = trial.start(["sleep", "1000"])
        rank.signal(signal.SIGSTOP)
        supervisor = trial.start(["sh", "-c", minds, "sh", str(rank.pid)])
        place = Place(rank.pid, 4)
        supervisor.says("minding")
        supervisor.processes = lambda role=None: [supervisor.pid]  # type: ignore[method-assign]
        supervisor.notice(place)
        place.go_on()
        assert rank.end(seconds=60) == -signal.SIGUSR1


def test_a_checkpoint_that_is_missing_is_a_violation(trial: Trial) -> None:
    trial.expect_saved(0)
    with pytest.raises(Violation, match="the newest checkpoint is of step 0, expected step 7"):
        trial.expect_saved(7)
    assert not Path(trial.run).exists()


def test_its_own_environment_is_not_marked() -> None:
    assert module.VARIABLE not in os.environ
