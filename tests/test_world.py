import json
import os
import tempfile

import pytest
import torch

from launch.world import _of_one_host, fingerprint, joined_world
from storage import errors
from storage.errors import ConfigurationError, FencedError
from tests.ranks import Ranks

VALUES = [
    {"rank": 0, "text": "short", "number": 0.1, "none": None},
    ["é\u2028😀" * 400, {"deep": [[], {}, True, -(2**53)]}, 1e-300],
]
"""What each of two ranks tells the other; of unlike kinds and lengths."""

MEMBER = """
import json, sys
import torch
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
    place = torch.full((5,), world.rank + 7, dtype=torch.uint8)
    world.another().share(place[1:3], source=1)
    told["shared"] = place.tolist()
    print(json.dumps(told))
"""

SPEAKER = """
import json
from launch.world import joined_world
from storage import errors
from storage.errors import RangeFlowError

kinds = [name for name, kind in vars(errors).items() if isinstance(kind, type)]
done = []
def fails(kind):
    done.append(kind)
    raise getattr(errors, kind)(f"what rank 0 found: {kind} é")
def returns(value):
    done.append("returned")
    return value
with joined_world() as world:
    told = {"values": [], "errors": []}
    for value in (None, {"a": [1, 0.1, None]}, 7, "", False):
        told["values"].append(world.on_rank_0(lambda value=value: returns(value)))
    for kind in kinds:
        try:
            world.on_rank_0(lambda kind=kind: fails(kind))
        except RangeFlowError as error:
            told["errors"].append([type(error).__name__, str(error), error.exit_code])
    told["after"] = world.on_rank_0(lambda: returns("still together"))
    told["done"] = len(done)
    print(json.dumps(told))
"""


HOSTS = """
import json
from launch.world import joined_world
with joined_world() as world:
    host = world.of_host()
    told = {
        "place": [world.place, list(world.host_ranks), world.one_host, host.rank, host.size],
        "on_host": host.gather(world.rank),
        "all": world.another().gather(world.rank),
    }
    print(json.dumps(told))
"""


def told_by_two(
    program: str, *arguments: str, local_ranks: tuple[int, int] = (0, 1)
) -> list[dict[str, object]]:
    """What the two processes of a world that run a program print, by rank."""
    said = []
    environment = {**os.environ, "RANGEFLOW_RENDEZVOUS": "3"}
    with tempfile.TemporaryFile("w+") as one, tempfile.TemporaryFile("w+") as other:
        ranks = Ranks(
            ["-c", program, *arguments],
            [one, other],
            job="job-7",
            local_ranks=local_ranks,
            environment=environment,
        )
        code = ranks.wait(120)
        for output in (one, other):
            output.seek(0)
            said.append(output.read())
    assert code == 0, said
    return [json.loads(text.splitlines()[-1]) for text in said]


def test_two_processes_tell_each_other_json_of_any_length() -> None:
    told = told_by_two(MEMBER, json.dumps(VALUES))
    assert [one.pop("place") for one in told] == [[0, 2, "job-7"], [1, 2, "job-7"]]
    assert [one.pop("shared") for one in told] == [[7, 8, 8, 7, 7], [8, 8, 8, 8, 8]]
    expected = {
        "gathered": VALUES,
        "broadcast": VALUES[0],
        "empty": [None, None],
        "again": [0, 1],
    }
    assert told == [expected, expected]


def test_processes_that_are_each_first_on_their_host_are_on_two_hosts() -> None:
    told = told_by_two(HOSTS, local_ranks=(0, 0))
    assert [one["place"] for one in told] == [[3, [0], False, 0, 1], [3, [1], False, 0, 1]]
    assert [one["on_host"] for one in told] == [[0], [1]]
    told = told_by_two(HOSTS)
    assert [one["place"] for one in told] == [[3, [0, 1], True, n, 2] for n in range(2)]
    assert [one["on_host"] for one in told] == [[0, 1], [0, 1]]
    assert [one["all"] for one in told] == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("local_ranks", "expected"),
    [
        ([0], [[0]]),
        ([0, 1, 2], [[0, 1, 2]]),
        ([0, 0, 1, 0, 1, 2], [[0], [1, 2], [3, 4, 5]]),
        ([0, 0, 0], [[0], [1], [2]]),
    ],
)
def test_a_local_rank_of_0_begins_a_host(local_ranks: list[int], expected: list[list[int]]) -> None:
    found = [list(_of_one_host(rank, local_ranks)) for rank in range(len(local_ranks))]
    assert found == [ranks for ranks in expected for _ in ranks]


def test_what_rank_0_returns_or_raises_is_the_same_on_every_rank() -> None:
    """Each error with its own class, message and exit code; afterwards they still talk."""
    told = told_by_two(SPEAKER)
    kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    expected = {
        "values": [None, {"a": [1, 0.1, None]}, 7, "", False],
        "errors": [
            [name, f"what rank 0 found: {name} é", kind.exit_code] for name, kind in kinds.items()
        ],
        "after": "still together",
    }
    assert [one.pop("done") for one in told] == [6 + len(kinds), 0], "only rank 0 does the work"
    assert told == [expected, expected]


def test_alone_what_rank_0_raises_keeps_its_cause_and_a_defect_is_no_error_of_ours() -> None:
    def fails(error: Exception) -> None:
        raise error from OSError("the cause")

    with joined_world() as world:
        assert world.on_rank_0(lambda: {"a": 1}) == {"a": 1}
        with pytest.raises(FencedError, match=r"^found$") as raised:
            world.on_rank_0(lambda: fails(FencedError("found")))
        assert isinstance(raised.value.__cause__, OSError)
        with pytest.raises(ZeroDivisionError):
            world.on_rank_0(lambda: fails(ZeroDivisionError()))


def test_without_torchrun_it_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with joined_world() as world:
        assert (world.rank, world.size, world.job) == (0, 1, "none")
        assert world.gather({"a": 1}) == [{"a": 1}]
        assert world.broadcast("x") == "x"
        assert not torch.distributed.is_initialized()
    monkeypatch.setenv("RANGEFLOW_JOB", "as the user named it")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "as torchrun's hosts find one another")
    with joined_world() as world:
        assert world.job == "as the user named it"


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


def test_more_processes_than_gpus_are_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigurationError, match="this host has 1 GPUs, and at least 2 processes"):
        joined_world().__enter__()
