from pathlib import Path

import pytest

from launch.chaos.trial import Trial, Violation

PROGRAM = """
import threading
from launch.chaos.watched import stop_where_asked
stop_where_asked("save", 0)
stop_where_asked("step", 1)
for step in (4, 5, 6):
    saving = threading.Thread(target=stop_where_asked, args=("save", step), daemon=True)
    saving.start()
    print("at", step, flush=True)
    stop_where_asked("step", step)
"""


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(tmp_path / "trial", (), name="watched")


def test_a_rank_stops_once_at_the_phase_and_step_or_later(trial: Trial) -> None:
    with trial:
        program = trial.start(trial.python("-c", PROGRAM), stop=("step", 3))
        place = program.stopped()
        assert place.step == 4
        assert place.pid == program.pid
        assert "at 5" not in program.output()
        place.go_on()
        program.end(0)
        assert program.output().count("at ") == 3


def test_only_the_thread_is_held_that_is_asked_to(trial: Trial) -> None:
    with trial:
        words = trial.python("-c", f"{PROGRAM}import signal; signal.pause()")
        program = trial.start(words, holds=("save", 5))
        assert program.stopped().step >= 5  # threads overtake each other
        program.says("at 6")


def test_another_rank_does_not_stop(trial: Trial) -> None:
    with trial:
        words = trial.python("-c", PROGRAM)
        program = trial.start(words, stop=("step", 3), environment={"RANK": "1"})
        with pytest.raises(Violation, match="ended before a rank came to where it was to stop"):
            program.stopped()
