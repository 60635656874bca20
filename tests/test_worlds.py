"""The same bits in 1, 2, 3 and 4 processes, also when their number changes on the way."""

from pathlib import Path
from unittest.mock import patch

import pytest

from tests.made_sources import write_source
from tests.programs import curve, final_digest, rows, train, train_here, train_until_killed

SHAPE = (
    "--max_steps=16",
    "--eval_interval_steps=8",
    "--eval_windows=10",
    "--eval_micro_batch_size=3",
    "--sample_interval_steps=0",
    "--save_interval_steps=3",
    "--log_interval_steps=4",
    "--n_embd=32",
    "--context=32",
    "--global_batch_size=14",
    "--micro_batch_size=2",
    "--virtual_ranks=4",
    "--warmup_steps=4",
    "--dropout=0.1",
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...]) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train_here("--run", run, *data, *SHAPE) == 0
    return run


@pytest.mark.parametrize(
    ("world", "torchrun"), [pytest.param(2, True, marks=pytest.mark.soak), (3, True), (4, False)]
)
def test_any_number_of_processes_gives_the_same_bits(
    world: int, torchrun: bool, alone: Path, tmp_path: Path, data: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    train("--run", run, *data, *SHAPE, world=world, fresh=torchrun)
    assert final_digest(run) == final_digest(alone)
    assert rows(run) == rows(alone)


@pytest.mark.soak
def test_without_the_tree_each_number_of_processes_has_bits_of_its_own(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    """The control: a plain all-reduce."""
    digests = set()
    for world in (1, 2, 3, 4):
        run = tmp_path / f"run{world}"
        train("--run", run, *data, *SHAPE, "--reduction=fast", world=world)
        digests.add(final_digest(run))
    assert len(digests) > 1


@pytest.mark.parametrize("waits", [pytest.param(True, marks=pytest.mark.soak), False])
def test_a_walk_over_1_4_2_1_processes_gives_the_same_bits(
    waits: bool, alone: Path, tmp_path: Path, data: tuple[str, ...]
) -> None:
    """Where saves run beside training, each start goes on from what was committed by then."""
    run = tmp_path / "run"
    arguments = ("--run", run, *data, *SHAPE, *(["--wait_for_saves"] if waits else []))
    reached = [
        train_until_killed(*arguments, phase="reduce", nth=5, world=1).step,
        train_until_killed(*arguments, phase="reduce", nth=5, world=4).step,
        train_until_killed(*arguments, phase="update:after", nth=6, world=2).step,
    ]
    if waits:
        assert reached == [4, 7, 11]
    train(*arguments, world=1)
    assert final_digest(run) == final_digest(alone)
    assert curve(run) == curve(alone)
    assert [step for step, _ in curve(run)] == list(range(1, 17))
    for name in ("loss/numbers", "tokens/letters"):
        assert curve(run, name) == curve(alone, name) != []


def test_a_loss_mask_gives_the_same_bits_in_any_number_of_processes(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    """Of one source a third of the tokens is learnt, of the other all; one run is killed."""
    chat = write_source(
        tmp_path / "chat", train=(3000, 2000), validation=(700,), permille=100, masked=True
    )
    shape = (*data[:1], f"--data=chat={chat}:2", *SHAPE, "--max_steps=8")
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert train_here("--run", alone, *shape) == 0
    train_until_killed("--run", killed, *shape, phase="reduce", nth=5, world=2)
    train("--run", killed, *shape, world=3)
    assert final_digest(killed) == final_digest(alone)
    assert rows(killed) == rows(alone)
    learnt = sum(value for _, value in curve(alone, "tokens/chat"))
    assert 0.3 < learnt / (8 * 7 * 32) < 0.4, "half of the sequences, a third of their tokens"
    everything = tmp_path / "everything"
    with patch("trainer.step.targets_of", lambda rows, learn: rows[:, 1:]):
        assert train_here("--run", everything, *shape) == 0
    assert final_digest(everything) != final_digest(alone)


def test_without_keyed_randomness_the_number_of_processes_shows(
    alone: Path, tmp_path: Path, data: tuple[str, ...]
) -> None:
    digests = set()
    for world in (1, 2):
        run = tmp_path / f"run{world}"
        train("--run", run, *data, *SHAPE, world=world, control="rng_key")
        digests.add(final_digest(run))
    assert len(digests) == 2


def test_more_processes_than_virtual_ranks_are_refused(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(AssertionError, match="2 processes cannot share 1 virtual ranks"):
        train("--run", run, *data, *SHAPE, "--virtual_ranks=1", world=2)
