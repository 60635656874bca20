"""A notice makes the program save and leave; a second one makes it leave at once."""

import re
import signal
from pathlib import Path

import pytest

from launch.notice import Notice
from tests.programs import Program, checkpoints, curve, final_digest, train, train_here

SHAPE = (
    "--max_steps=12",
    "--eval_interval_steps=0",
    "--sample_interval_steps=0",
    "--save_interval_steps=0",
    "--n_embd=32",
    "--context=32",
    "--global_batch_size=8",
    "--warmup_steps=4",
    "--dropout=0.1",
)


@pytest.mark.parametrize(
    "notice",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.soak),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.soak),
    ],
)
def test_a_notice_saves_the_step_and_exits_75(
    notice: signal.Signals, tmp_path: Path, data: tuple[str, ...]
) -> None:
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    stops = [("micro_batch", 6)]
    with Program("--run", run, *data, *SHAPE, stops=stops, fresh=True) as program:
        place = program.stopped()
        place.send(notice, signal.SIGCONT)
        assert program.end() == 75, program.output()
    assert [c.step for c in checkpoints(run)] == [place.step + 1]
    train("--run", run, *data, *SHAPE)
    assert train_here("--run", unbroken, *data, *SHAPE) == 0
    assert final_digest(run) == final_digest(unbroken)
    assert curve(run) == curve(unbroken)


def test_a_notice_to_one_of_two_processes_stops_both_at_the_same_step(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    """Of torchrun, whose exit code depends on those of its processes."""
    run, stops = tmp_path / "run", [("micro_batch", 3)]
    with Program("--run", run, *data, *SHAPE, stops=stops, world=2, fresh=True) as program:
        place = program.stopped()
        place.send(signal.SIGTERM, signal.SIGCONT)
        assert program.end() != 0, "a preempted run must not look finished"
    assert [c.step for c in checkpoints(run)] == [place.step + 1]


def test_a_second_notice_ends_the_program_at_once(tmp_path: Path, data: tuple[str, ...]) -> None:
    run = tmp_path / "run"
    stops = [("micro_batch", 3), ("update:before", 1)]
    with Program("--run", run, *data, *SHAPE, stops=stops) as program:
        program.stopped().send(signal.SIGTERM, signal.SIGCONT)
        program.stopped().send(signal.SIGTERM, signal.SIGCONT)
        assert program.end() == 75
    assert checkpoints(run) == []


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Notice() as notice:
        assert not notice.requested()
        signal.raise_signal(signal.SIGTERM)
        assert notice.requested()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("phase", ["open", "claim", "prepare:unit"])
def test_a_notice_before_training_ends_the_program_without_a_step(
    phase: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with Program("--run", run, *SHAPE, stops=[(phase, 1)]) as program:
        program.stopped().send(signal.SIGTERM, signal.SIGCONT)
        assert program.end() == 75
        # Python runs the handler a few instructions after the signal: perhaps in the next phase.
        assert re.search(r"asked to stop in phase '.*', before training began", program.output())
        assert "Traceback" not in program.output()
    assert checkpoints(run) == []
