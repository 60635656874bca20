"""torchrun's ends as exit codes; and that it dies with its supervisor."""

import os
import signal
import socket
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
        (RendezvousConnectionError("no answer"), launch.agent.NOT_REACHED),
        (dist.DistNetworkError("closed"), START_AGAIN),
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


def test_it_ends_where_a_connection_is_taken_and_nobody_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun itself waits there for ever: torch's own time-out does not count for this."""
    monkeypatch.setattr(launch.agent, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(launch.agent, "ASK_SECONDS", 0.0)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert launch.agent.answers(f"127.0.0.1:{store.port}", 60.0)
    ends: list[int] = []
    ranks = [[1], []]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(launch.agent, "descendants", lambda: ranks.pop(0) if ranks else [])
        launch.agent.mind_place(place, ends.append)
        assert ends == [launch.agent.NOT_REACHED] and not ranks
    assert f"{place}, where the hosts meet, takes connections" in capsys.readouterr().err
    assert not launch.agent.answers(place, 0.1), "refused"


def test_a_wrong_argument_of_torchruns_is_permanent() -> None:
    command = [sys.executable, "-m", "launch.agent", str(os.getpid()), "--no-such-flag=1", "x.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == PERMANENT
    assert "usage: " in done.stderr and "Traceback" not in done.stderr


def test_without_its_supervisor_it_dies_before_it_begins() -> None:
    command = [sys.executable, "-m", "launch.agent", "1", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")
