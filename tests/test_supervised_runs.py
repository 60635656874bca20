"""The supervisor over real torchrun and real training: killed, noticed, and the same bits."""

import os
import select
import signal
from pathlib import Path

import pytest

from checkpointing.beats import read_beat
from storage.store import open_store
from tests.programs import TIMEOUT_SECONDS, Program, checkpoints, curve, final_digest, train_here
from tests.test_notice import SHAPE


def test_a_killed_rank_is_started_again_and_a_notice_is_saved_with_the_same_bits(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    shape = (*SHAPE, "--save_interval_steps=1")
    with Program(
        *("--run", run, *data, *shape), stops=[("micro_batch", 4)], world=2, supervised=True
    ) as program:
        program.stopped().send(signal.SIGKILL)
        place = program.stopped()  # of the next start
        program.send(signal.SIGTERM)
        place.send(signal.SIGCONT)
        assert program.end() == 75, program.output()
        shown = program.output()
    assert "another process of the world is gone" in shown
    assert "supervise: SIGTERM: the ranks have " in shown
    assert [c.generation for c in checkpoints(run)][-1] == 2
    beat = read_beat(open_store(str(run)), 2)
    assert beat["left"] and "error" not in beat
    assert train_here("--run", run, *data, *shape) == 0
    assert train_here("--run", unbroken, *data, *shape) == 0
    assert final_digest(run) == final_digest(unbroken)
    assert curve(run) == curve(unbroken)


def test_ranks_die_with_a_plain_torchrun_as_well(tmp_path: Path, data: tuple[str, ...]) -> None:
    run = tmp_path / "run"
    with Program("--run", run, *data, *SHAPE, stops=[("open", 1)], world=2) as program:
        pidfd = os.pidfd_open(program.stopped().pid)
        program.send(signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(TIMEOUT_SECONDS * 1000), "it goes on without anybody"
        os.close(pidfd)


@pytest.mark.soak
@pytest.mark.parametrize(
    "phase", ["open", "claim", "restore", "reduce", "update:after", "save:begin"]
)
def test_a_notice_in_any_phase_is_75_and_loses_nothing(
    phase: str, tmp_path: Path, data: tuple[str, ...]
) -> None:
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    shape = (*SHAPE, "--save_interval_steps=1")
    stops = [(phase, 1)]
    with Program("--run", run, *data, *shape, stops=stops, world=2, supervised=True) as program:
        place = program.stopped()
        program.send(signal.SIGTERM)
        place.send(signal.SIGCONT)
        assert program.end() == 75, program.output()
    assert train_here("--run", run, *data, *shape) == 0
    assert train_here("--run", unbroken, *data, *shape) == 0
    assert final_digest(run) == final_digest(unbroken)
    assert curve(run) == curve(unbroken)
