"""The example of docs/checkpoints.md does what it says, killed or not."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing.alone import Checkpoints
from checkpointing.generators import generators, restore_generators
from storage.errors import ConfigurationError, StoreUnavailableError
from tests.forks import ROOT, Fork
from tests.programs import checkpoints

EXAMPLE = re.findall(r"```python\n(.*?)```", (ROOT / "docs/checkpoints.md").read_text(), re.S)[0]


def run_example(folder: Path, *, killed_at: int = 0, fresh: bool = False) -> int:
    """The example as it stands, in a process of its own; SIGKILL at a step if asked to.

    `fresh` starts it as a reader of the document would, and not as a fork.
    """
    program = EXAMPLE
    if killed_at:
        kill = f"        if step == {killed_at}:\n            run._saver.finish()\n"
        kill += (
            f"            __import__('os').kill(__import__('os').getpid(), {signal.SIGKILL:d})\n"
        )
        head, loop, rest = program.partition("        model(torch.randn")
        program = head + kill + loop + rest
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    folder.mkdir(exist_ok=True)
    if fresh:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, cwd=folder, env=environment, timeout=120).returncode
    with open(folder / "output", "w") as output:
        return Fork(["-c", program], cwd=folder, env=environment, output=output).wait(120)


def test_the_example_is_short() -> None:
    loop = EXAMPLE.partition("with Checkpoints")[2]
    assert len(loop.splitlines()) <= 10


def test_the_example_killed_ends_with_the_bits_of_an_unbroken_run(tmp_path: Path) -> None:
    assert run_example(tmp_path / "unbroken", fresh=True) == 0
    for step in (60, 130, 199):
        assert run_example(tmp_path / "killed", killed_at=step) == -signal.SIGKILL
    assert run_example(tmp_path / "killed") == 0
    unbroken, killed = (checkpoints(tmp_path / n / "runs/mine")[-1] for n in ("unbroken", "killed"))
    assert unbroken.step == killed.step == 200
    assert killed.digest == unbroken.digest


class Count:
    """A part that counts."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "memory": torch.full((3,), float(self.count))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert torch.equal(state["memory"], torch.full((3,), float(state["count"])))
        self.count = state["count"]


def test_parts_and_generators_come_back(tmp_path: Path) -> None:
    before = generators()
    part = Count()
    with Checkpoints(str(tmp_path / "run"), {"count": part}) as run:
        assert run.step == 0
        part.count = 5
        run.save(5)
        expected = torch.rand(3)
    part = Count()
    with Checkpoints(str(tmp_path / "run"), {"count": part}) as run:
        assert (run.step, part.count) == (5, 5)
        assert torch.equal(torch.rand(3), expected)
    restore_generators(before)


def test_a_second_process_is_refused_or_takes_over(tmp_path: Path) -> None:
    place = str(tmp_path / "run")
    with Checkpoints(place, {"count": Count()}) as first:
        first.save(1)
        first._saver.finish()
        with Checkpoints(place, {"count": Count()}, take_over=True) as second:
            assert second.step == 1


def test_other_parts_are_refused(tmp_path: Path) -> None:
    with Checkpoints(str(tmp_path / "run"), {"count": Count()}) as run:
        run.save(1)
    refused = pytest.raises(ConfigurationError, match=r"holds \['count'\], expected \['other'\]")
    with refused, Checkpoints(str(tmp_path / "run"), {"other": Count()}):
        pass


def test_a_last_save_that_fails_is_an_error(tmp_path: Path) -> None:
    place = tmp_path / "run"
    refused = pytest.raises(StoreUnavailableError, match="step 2 could not be saved")
    with refused, Checkpoints(str(place), {"count": Count()}) as run:
        run.save(1)
        run._saver.finish()
        shutil.rmtree(place / "checkpoints")
        (place / "checkpoints").write_text("no folder any more")
        run.save(2)


def test_what_cannot_be_retired_stops_no_loop(tmp_path: Path) -> None:
    """A store that fails after a commit has not failed the commit."""
    place = tmp_path / "run"
    with Checkpoints(str(place), {"count": Count()}, keep_last=2) as run:
        (place / "pins").mkdir()
        (place / "pins" / "loop.json").symlink_to("loop.json")  # cannot be opened: ELOOP
        for step in range(1, 6):
            run.save(step)
            run._saver.finish()
    assert [c.step for c in checkpoints(place)] == [1, 2, 3, 4, 5]


def test_what_parts_keep_is_no_file_of_the_checkpoint(tmp_path: Path) -> None:
    """A deleted file that is mapped takes its space on the disk until the process ends."""
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    parts = {"model": model, "optimizer": optimizer}
    with Checkpoints(str(tmp_path), parts) as run:
        model(torch.ones(8)).sum().backward()
        run.before_update()
        optimizer.step()
        run.save(1)
    with Checkpoints(str(tmp_path), parts):
        assert optimizer.state
        maps = Path("/proc/self/maps").read_text()
        assert not re.search(rf"{tmp_path}\S*safetensors", maps)
