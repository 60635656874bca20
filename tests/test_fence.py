"""A stale process that wakes up is fenced, and changes nothing of the run."""

import signal
from pathlib import Path

import pytest

from tests.programs import Program, checkpoints, curve, final_digest, train_here

SHAPE = (
    "--max_steps=14",
    "--eval_interval_steps=0",
    "--sample_interval_steps=0",
    "--save_interval_steps=2",
    "--wait_for_saves",
    "--log_interval_steps=1",
    "--keep_last=2",
    "--n_embd=32",
    "--context=32",
    "--global_batch_size=8",
    "--warmup_steps=4",
)


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run, but for heartbeats: a stale one may write its own."""
    files = [path for path in run.rglob("*") if path.is_file() and path.parent.name != "beats"]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.mark.parametrize("phase", ["step", "save:uploaded", "save:manifest", "retire:recorded"])
def test_a_stale_incarnation_exits_fenced_and_changes_nothing(
    phase: str, tmp_path: Path, data: tuple[str, ...]
) -> None:
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    assert train_here("--run", unbroken, *data, *SHAPE) == 0
    with Program("--run", run, *data, *SHAPE, stops=[(phase, 3)]) as stale:
        place = stale.stopped()
        begun_with = len(checkpoints(run))
        assert train_here("--run", run, *data, *SHAPE, "--take_over") == 0
        assert checkpoints(run)[-1].generation == 2
        assert begun_with <= 3
        before = contents(run)
        place.send(signal.SIGCONT)
        assert stale.end() == 76
        assert "FENCED" in stale.output()
    assert contents(run) == before
    assert final_digest(run) == final_digest(unbroken)
    assert curve(run) == curve(unbroken)


def test_without_the_fence_a_stale_incarnation_changes_the_run(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    arguments = ("--run", run, *data, *SHAPE)
    with Program(*arguments, stops=[("save:manifest", 3)], control="fence") as stale:
        place = stale.stopped()
        assert train_here(*arguments, "--take_over") == 0
        before = contents(run)
        place.send(signal.SIGCONT)
        stale.end()
    assert contents(run) != before
