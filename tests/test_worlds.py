"""The same bits in 1, 2, 3 and 4 processes, also when their number changes on the way."""

from pathlib import Path

import pytest

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


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_processes_gives_the_same_bits(
    world: int, alone: Path, tmp_path: Path, data: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    train("--run", run, *data, *SHAPE, world=world)
    assert final_digest(run) == final_digest(alone)
    assert rows(run) == rows(alone)


@pytest.mark.parametrize("waits", [True, False])
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
