from pathlib import Path

import pytest

from launch.chaos.trial import Trial, Violation
from launch.chaos.watched import VARIABLE

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


def test_what_a_rank_that_was_killed_has_not_done_is_asked_of_the_next(trial: Trial) -> None:
    wait = (
        "import os, pathlib, time\n"
        f"stop = pathlib.Path(os.environ[{VARIABLE!r}], 'stop')\n"
        "while not stop.exists(): time.sleep(0.01)\n"
    )
    with trial:
        program = trial.start(trial.python("-c", wait + PROGRAM))
        (program.folder / "stopped-999999999-4").write_text("step 3 stop")
        place = program.stopped()
        assert (place.pid, place.step) == (program.pid, 4)
        place.go_on()
        program.end(0)
