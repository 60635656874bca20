"""Every part of a checkpoint is needed: with any one left out, a resumed run ends elsewhere."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Interrupted
from tests.controls import broken
from tests.programs import curve, final_digest, rows, train_here

Interrupt = Callable[[str, int], Callable[[str, int], None]]

SHAPE = (
    "--max_steps=12",
    "--eval_interval_steps=6",
    "--eval_windows=10",
    "--sample_interval_steps=6",
    "--sample_tokens=4",
    "--save_interval_steps=4",
    "--log_interval_steps=3",
    "--n_embd=32",
    "--context=32",
    "--global_batch_size=8",
    "--micro_batch_size=2",
    "--warmup_steps=4",
    "--dropout=0.1",
)


def interrupted_run(run: Path, interrupt: Interrupt, *arguments: str) -> None:
    """Left in the middle of step 7, resumed from step 4."""
    with pytest.raises(Interrupted):
        train_here("--run", run, *arguments, listener=interrupt("update:before", 7))
    assert train_here("--run", run, *arguments) == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_resumed_run_is_bit_equal(
    precision: str, optimizer: str, tmp_path: Path, data: tuple[str, ...], interrupt: Interrupt
) -> None:
    arguments = (*data, *SHAPE, f"--precision={precision}", f"--optimizer={optimizer}")
    assert train_here("--run", tmp_path / "unbroken", *arguments) == 0
    interrupted_run(tmp_path / "resumed", interrupt, *arguments)
    assert final_digest(tmp_path / "resumed") == final_digest(tmp_path / "unbroken")
    assert curve(tmp_path / "resumed") == curve(tmp_path / "unbroken")
    assert rows(tmp_path / "resumed") == rows(tmp_path / "unbroken")


@pytest.mark.parametrize("control", ["cursor", "scaler", "moments", "learning_rate"])
def test_leaving_out_a_part_of_the_state_shows(
    control: str, tmp_path: Path, data: tuple[str, ...], interrupt: Interrupt
) -> None:
    arguments = (*data, *SHAPE, "--precision=fp16")
    assert train_here("--run", tmp_path / "unbroken", *arguments) == 0
    with broken(control):
        interrupted_run(tmp_path / "resumed", interrupt, *arguments)
    assert final_digest(tmp_path / "resumed") != final_digest(tmp_path / "unbroken")


def test_runtime_fields_do_not_change_bits(tmp_path: Path, data: tuple[str, ...]) -> None:
    digests = set()
    other = (
        "--save_interval_steps=5",
        "--eval_interval_steps=0",
        "--sample_interval_steps=0",
        "--log_interval_steps=1",
        "--keep_last=7",
    )
    for number, changes in enumerate(((), other)):
        run = tmp_path / str(number)
        assert train_here("--run", run, *data, *SHAPE, *changes) == 0
        digests.add(final_digest(run))
    assert len(digests) == 1


def test_a_complete_run_says_so_and_more_steps_continue_it(
    tmp_path: Path, data: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    arguments = ("--run", run, *data, *SHAPE)
    assert train_here(*arguments) == 0
    log = sorted((run / "log").iterdir())
    assert train_here(*arguments) == 0
    assert sorted((run / "log").iterdir()) == log
    assert train_here(*arguments, "--max_steps=14") == 0
    assert [step for step, _ in curve(run)] == list(range(1, 15))


def test_a_run_that_is_moved_goes_on_with_the_same_bits(
    tmp_path: Path, data: tuple[str, ...], interrupt: Interrupt
) -> None:
    arguments = (*data, *SHAPE)
    assert train_here("--run", tmp_path / "unbroken", *arguments) == 0
    with pytest.raises(Interrupted):
        train_here("--run", tmp_path / "here", *arguments, listener=interrupt("step", 7))
    (tmp_path / "here").rename(tmp_path / "there")
    assert train_here("--run", tmp_path / "there", *arguments) == 0
    assert final_digest(tmp_path / "there") == final_digest(tmp_path / "unbroken")


def test_a_run_that_goes_on_holds_no_file_of_the_checkpoint(
    tmp_path: Path, data: tuple[str, ...], interrupt: Interrupt
) -> None:
    """A deleted file that is mapped takes its space on the disk until the process ends."""
    with pytest.raises(Interrupted):
        train_here("--run", tmp_path, *data, *SHAPE, listener=interrupt("update:before", 7))
    held: set[str] = set()

    def look(phase: str, step: int) -> None:
        if phase == "update:after":
            maps = Path("/proc/self/maps").read_text()
            held.update(re.findall(rf"{tmp_path}\S*safetensors", maps))

    assert train_here("--run", tmp_path, *data, *SHAPE, listener=look) == 0
    assert held == set()
