"""What is told of runs without reading a checkpoint."""

import uuid
from pathlib import Path

import pytest

from checkpointing.history import history
from checkpointing.overview import description, runs_below
from checkpointing.pins import pin_for_ever
from storage.errors import ConfigurationError
from storage.log import Log
from storage.store import Store, open_store
from tests.made_runs import make_run


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def made(url: str, *steps: int) -> Store:
    store = open_store(url)
    make_run(store, *steps)
    return store


def test_runs_are_found_at_any_depth_in_any_store(place: str) -> None:
    made(f"{place}/a", 1, 2)
    made(f"{place}/deep/er/b")
    open_store(place).put("not-a-run.json", b"{}")
    found = runs_below(f"{place}/")
    assert [run["url"] for run in found] == [f"{place}/a", f"{place}/deep/er/b"]
    assert [(run["step"], run["live"], run["complete"]) for run in found] == [
        (2, 2, False),
        (None, 0, False),
    ]
    assert [run["url"] for run in runs_below(f"{place}/a")] == [f"{place}/a"]


def test_a_run_that_cannot_be_read_has_an_error_and_the_rest_is_listed(place: str) -> None:
    made(f"{place}/a", 1)
    open_store(f"{place}/b").put("run.json", b"{")
    good, bad = runs_below(place)
    assert good["step"] == 1
    assert set(bad) == {"url", "error"} and "run.json is damaged" in bad["error"]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no folder .*typo; give the place"):
        runs_below(str(tmp_path / "typo"))


def test_what_is_pinned_for_ever_is_told_and_a_reader_is_not(place: str) -> None:
    store = made(f"{place}/a", 1, 2)
    first, second = history(Log(store).refresh()).checkpoints
    pin_for_ever(store, Log(store), lambda past: first, reason="good")
    lease = b'{"checkpoint":%d,"until":9e12}' % second.index
    store.put("pins/lease.json", lease)
    told = description(f"{place}/a")
    assert [c["pinned"] for c in told["checkpoints"]] == [True, False]
    assert told["pins"] == [{"step": 1, "index": first.index, "reason": "good"}]
    assert [c["digest"] for c in told["checkpoints"]] == [first.digest, second.digest]


def test_damaged_records_are_told(place: str) -> None:
    store = made(f"{place}/a", 1, 2)
    index = history(Log(store).refresh()).checkpoints[0].index
    store.put(f"log/{index:010d}.json", b"{}")
    told = description(f"{place}/a")
    assert told["damaged_records"] == [index]
    assert [c["step"] for c in told["checkpoints"]] == [2]
