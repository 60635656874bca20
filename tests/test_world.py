import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from launch.world import fingerprint, joined_world
from tests.programs import ROOT

VALUES = [
    {"rank": 0, "text": "short", "number": 0.1, "none": None},
    ["é\u2028😀" * 400, {"deep": [[], {}, True, -(2**53)]}, 1e-300],
]
"""What each of two ranks tells the other; of unlike kinds and lengths."""

MEMBER = """
import json, sys
from launch.world import joined_world
values = json.loads(sys.argv[1])
with joined_world() as world:
    told = {
        "place": [world.rank, world.size, world.job],
        "gathered": world.gather(values[world.rank]),
        "broadcast": world.broadcast(values[world.rank]),
        "empty": world.gather(None),
        "again": world.gather(world.rank),
    }
    print(json.dumps(told))
"""


def told_by_two() -> list[dict[str, object]]:
    """What the two processes of a world print, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", MEMBER, json.dumps(VALUES)]
    members = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "job-7"}
        environment = {**os.environ, **shared, **place}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        members.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)  # type: ignore
        )
    told = []
    for member in members:
        out, errors = member.communicate(timeout=120)
        assert member.returncode == 0, errors
        told.append(json.loads(out))
    return told


def test_two_processes_tell_each_other_json_of_any_length() -> None:
    told = told_by_two()
    assert [one.pop("place") for one in told] == [[0, 2, "job-7"], [1, 2, "job-7"]]
    expected = {
        "gathered": VALUES,
        "broadcast": VALUES[0],
        "empty": [None, None],
        "again": [0, 1],
    }
    assert told == [expected, expected]


def test_without_torchrun_it_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with joined_world() as world:
        assert (world.rank, world.size, world.job) == (0, 1, "none")
        assert world.gather({"a": 1}) == [{"a": 1}]
        assert world.broadcast("x") == "x"
        assert not torch.distributed.is_initialized()


def test_torchrun_with_one_process_needs_no_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("TORCHELASTIC_RUN_ID", "job-3")):
        monkeypatch.setenv(name, value)
    with joined_world() as world:
        assert (world.size, world.job) == (1, "job-3")
        assert not torch.distributed.is_initialized()


def test_a_workspace_that_the_user_chose_for_cublas_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with joined_world():
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with joined_world():
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_fingerprint_names_the_kind_of_device_and_the_version_of_torch() -> None:
    found = fingerprint(torch.device("cpu"))
    assert found == {
        "device": f"cpu {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
    }
    assert json.loads(json.dumps(found)) == found
