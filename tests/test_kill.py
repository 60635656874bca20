"""One run, killed at every named phase by a real SIGKILL, ends with the bits of an unbroken one."""

import random
import signal
from pathlib import Path

import pytest

from tests.programs import (
    Program,
    curve,
    final_digest,
    rows,
    train,
    train_here,
    train_until_killed,
)

SHAPE = (
    "--max_steps=40",
    "--eval_interval_steps=6",
    "--eval_windows=8",
    "--sample_interval_steps=8",
    "--sample_tokens=8",
    "--save_interval_steps=3",
    "--keep_last=2",
    "--log_interval_steps=2",
    "--dropout=0.1",
    "--warmup_steps=5",
)

KILLS = (
    ("rendezvous", 1, 2),
    ("open", 1, 1),
    ("claim", 1, 1),
    ("prepare:ledger", 1, 1),
    ("prepare:unit", 2, 1),
    ("prepare:shard", 1, 1),
    ("prepare:unit-done", 1, 1),
    ("prepare:index", 1, 1),
    ("prepare:done", 1, 1),
    ("restore", 1, 1),
    ("step", 1, 1),
    ("micro_batch", 3, 1),
    ("reduce", 2, 2),
    ("update:before", 3, 1),
    ("update:after", 3, 1),
    ("save:begin", 1, 1),
    ("save:object", 1, 1),
    ("save:uploaded", 1, 1),
    ("save:manifest", 1, 1),
    ("save:committed", 1, 1),
    ("evaluate", 1, 1),
    ("retire:chosen", 1, 1),
    ("save:committed", 2, 2),
    ("sample", 1, 1),
    ("retire:chosen", 2, 1),
    ("retire:recorded", 1, 1),
    ("retire:deleted", 1, 1),
    ("reduce", 5, 1),
    ("update:after", 4, 1),
    ("save:manifest", 2, 1),
    ("step", 2, 1),
    ("wait_for_save", 1, 1),
)
"""(phase, the how manieth time in its incarnation, world), in the order of the kills."""

FRESH = {("open", 1, 1), ("save:committed", 2, 2)}
"""Kills of what a user starts: an interpreter, and torchrun. Others are kills of forks."""


def test_a_run_killed_at_every_phase_ends_with_the_bits_of_an_unbroken_run(tmp_path: Path) -> None:
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    entered: set[str] = set()
    assert train_here("--run", unbroken, *SHAPE, listener=lambda p, _: entered.add(p)) == 0
    assert entered == {phase for phase, _, _ in KILLS}, "a phase is not covered"

    assert set(KILLS) >= FRESH
    for kill in KILLS:
        phase, nth, world = kill
        arguments = ("--run", killed, *SHAPE)
        train_until_killed(*arguments, phase=phase, nth=nth, world=world, fresh=kill in FRESH)
    train("--run", killed, *SHAPE)

    assert len(KILLS) >= 25
    assert final_digest(killed) == final_digest(unbroken)
    losses = curve(killed)
    assert [step for step, _ in losses] == list(range(1, 41))
    assert losses == curve(unbroken)
    assert curve(killed, "validation_loss") == curve(unbroken, "validation_loss")
    assert rows(killed) == rows(unbroken)


@pytest.mark.soak
def test_killed_with_8_bit_adam(tmp_path: Path) -> None:
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    shape = (*SHAPE, "--optimizer=adamw8bit")
    train("--run", unbroken, *shape)
    for phase, nth, world in KILLS:
        train_until_killed("--run", killed, *shape, phase=phase, nth=nth, world=world)
    train("--run", killed, *shape)
    assert final_digest(killed) == final_digest(unbroken)
    assert curve(killed) == curve(unbroken)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_instants(seed: int, tmp_path: Path) -> None:
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    shape = (*SHAPE, "--max_steps=150")
    train("--run", unbroken, *shape)
    instants = random.Random(seed)
    kills = 0
    while kills < 20:
        with Program("--run", killed, *shape, fresh=True) as program:
            if program.ended_within(instants.uniform(0.1, 7.0)):
                break
            program.send(signal.SIGKILL)
            assert program.end() == -signal.SIGKILL
            kills += 1
    train("--run", killed, *shape)
    assert kills >= 5
    assert final_digest(killed) == final_digest(unbroken)
    assert curve(killed) == curve(unbroken)
    assert rows(killed) == rows(unbroken)
