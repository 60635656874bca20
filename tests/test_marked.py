import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.chaos.marked import described, living, own_number, pending, role, role_of, state
from launch.chaos.trial import Trial


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Trial]:
    with Trial(tmp_path / "trial", (), name="marked") as trial:
        yield trial


def test_processes_are_found_wherever_they_have_got_to(trial: Trial) -> None:
    program = trial.start(["sh", "-c", "(setsid sleep 1000 &) ; exec sleep 2000"])
    while len(program.processes()) < 2:
        assert not program.ended
    program.signal(signal.SIGKILL)
    program.end(-signal.SIGKILL)
    (left,) = program.processes()
    assert living(trial.folder) == [left]
    assert living(trial.folder.parent / "tria") == []
    assert described([left]).startswith(f"process {left} (s")
    trial.__exit__(None, None, None)
    assert living(trial.folder) == []
    assert described([0]) == state(0) == "" and own_number(0) == 0


def test_state_and_own_number_are_those_of_the_process(trial: Trial) -> None:
    program = trial.start(["sleep", "1000"])
    program.signal(signal.SIGSTOP)
    while state(program.pid) != "T":
        assert not program.ended
    assert own_number(program.pid) == program.pid


def test_a_signal_that_a_stopped_process_has_not_taken_is_pending(trial: Trial) -> None:
    program = trial.start(["sleep", "1000"])
    program.signal(signal.SIGSTOP)
    while state(program.pid) != "T":
        assert not program.ended
    assert not pending(program.pid, signal.SIGUSR1)
    program.signal(signal.SIGUSR1)
    assert pending(program.pid, signal.SIGUSR1) and not pending(program.pid, signal.SIGUSR2)
    assert not pending(0, signal.SIGUSR1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-m", "launch.supervise", "--", "x.py"], "supervisor"),
        (["-m", "launch.agent", "7", "--", "x.py"], "agent"),
        (["-m", "torch.distributed.run", "--", "x.py"], "agent"),
        (["-u", "x.py", "--run", "a"], "rank"),
        (["x.py", "--run", "a"], "rank"),
        (["other", "--run", "x.py"], None),
    ],
)
def test_a_process_is_known_by_its_command_line(words: list[str], expected: str | None) -> None:
    assert role(["python", *words]) == expected


def test_a_process_that_is_something_else_has_no_role(trial: Trial) -> None:
    assert role_of(trial.start(["sleep", "1000"]).pid) is None
    assert role_of(0) is None
