"""The example of docs/data.md does what it says, killed or not."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.forks import ROOT, Fork

DOCUMENT = (ROOT / "docs/data.md").read_text()
SECTION = DOCUMENT.partition("\n## In your own training loop\n")[2].partition("\n## ")[0]
(PREPARE,) = re.findall(r"```sh\n(.*?)```", SECTION, re.S)
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", SECTION, re.S)
IN_LOOP = "        optimizer.zero_grad()\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the two commands were run, on inputs of the names that they say."""
    folder = tmp_path_factory.mktemp("alone")
    for name, words in (("books", "once upon a time there was"), ("notes", "buy milk and bread")):
        (folder / name).mkdir()
        for number in range(60):
            text = " ".join(f"{words} {number * k}." for k in range(80))
            (folder / name / f"{number}.txt").write_text(text)
    for line in PREPARE.splitlines():
        command = [*line.replace("python", sys.executable, 1).split()]
        subprocess.run(command, cwd=folder, env=environment(folder), timeout=120, check=True)
    return folder / "data"


def environment(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)}


def run_example(
    data: Path, folder: Path, *, killed_at: int = 0, change: str = "", fresh: bool = False
) -> int:
    """The example as it stands, in a process of its own; SIGKILL after a step's update if asked.

    `fresh` starts it as a reader of the document would, and not as a fork.
    """
    if not folder.exists():
        shutil.copytree(data, folder / "data")
    program = EXAMPLE
    if killed_at:
        assert IN_LOOP in program
        kill = f"os.kill(os.getpid(), {signal.SIGKILL:d})"
        program = program.replace(IN_LOOP, f"{IN_LOOP}        if step == {killed_at}: {kill}\n")
    if change:
        before, _, after = change.partition(" -> ")
        assert before in program
        program = program.replace(before, after)
    if fresh:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, cwd=folder, env=environment(folder), timeout=120).returncode
    with open(folder / "output", "w") as output:
        return Fork(["-c", program], cwd=folder, env=environment(folder), output=output).wait(120)


def saved(folder: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = torch.load(folder / "loop.pt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def unbroken(data: Path) -> dict[str, dict[str, object]]:
    assert run_example(data, data.parent / "unbroken", fresh=True) == 0
    return saved(data.parent / "unbroken")


@pytest.fixture
def killed(data: Path, tmp_path: Path) -> Path:
    """Where the example was killed at step 27, and step 20 was saved."""
    assert run_example(data, tmp_path / "killed", killed_at=27) == -signal.SIGKILL
    return tmp_path / "killed"


def test_the_example_killed_ends_with_the_bits_of_an_unbroken_one(
    data: Path, unbroken: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    for step in (5, 44):
        assert run_example(data, tmp_path / "run", killed_at=step) == -signal.SIGKILL
    assert run_example(data, tmp_path / "run") == 0
    found = saved(tmp_path / "run")
    assert found["cursor"] == unbroken["cursor"] and found["cursor"]["step"] == 60
    for name, weights in unbroken["model"].items():
        assert torch.equal(weights, found["model"][name]), name  # type: ignore[arg-type]


def test_without_the_cursor_the_bits_are_others(
    data: Path, unbroken: dict[str, dict[str, object]], killed: Path
) -> None:
    """The negative control: resumed weights, and data from another place."""
    change = 'step = batches.check_cursor(saved["cursor"]) -> step = saved["cursor"]["step"] - 1'
    assert run_example(data, killed, change=change) == 0
    one, other = unbroken["model"], saved(killed)["model"]
    assert not all(torch.equal(one[name], other[name]) for name in one)  # type: ignore[arg-type]


def test_a_cursor_of_another_mixture_is_refused(data: Path, killed: Path) -> None:
    change = '"books": 700_000 -> "books": 600_000'
    assert run_example(data, killed, change=change) == 1
