"""torchrun's ends as exit codes; and that it dies with its supervisor."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch.distributed as dist
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import (
    RendezvousConnectionError,
    RendezvousTimeoutError,
)

import launch.agent
from launch.exit_codes import COMPLETE, INTERNAL, PERMANENT, START_AGAIN
from tests.minding import ROOT


def raises(error: BaseException) -> Callable[[list[str]], None]:
    def torchrun(arguments: list[str]) -> None:
        raise error

    return torchrun


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Who the agent would die with: this process shall live on."""
    parents: list[int] = []
    monkeypatch.setattr(launch.agent, "die_with_parent", parents.append)
    return parents


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (
            ChildFailedError("train", {0: ProcessFailure(0, 4712, 75, "none")}),
            launch.agent.RANKS_FAILED,
        ),
        (SystemExit(2), PERMANENT),
        (SystemExit(0), COMPLETE),
        (RendezvousTimeoutError("nobody came"), START_AGAIN),
        (RendezvousConnectionError("refused"), launch.agent.NOT_REACHED),
        (dist.DistNetworkError("refused"), launch.agent.NOT_REACHED),
        (SignalException("stopped", signal.SIGTERM), START_AGAIN),
        (ValueError("nproc_per_node"), INTERNAL),
    ],
)
def test_what_torchrun_raises_says_whether_a_restart_helps(
    error: BaseException, code: int, parent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed.run, "main", raises(error))
    assert launch.agent.main(["4711", "--standalone", "x.py"]) == code
    assert parent == [4711]


def test_a_wrong_argument_of_torchruns_is_permanent() -> None:
    command = [sys.executable, "-m", "launch.agent", str(os.getpid()), "--no-such-flag=1", "x.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == PERMANENT
    assert "usage: " in done.stderr and "Traceback" not in done.stderr


def test_without_its_supervisor_it_dies_before_it_begins() -> None:
    command = [sys.executable, "-m", "launch.agent", "1", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")
