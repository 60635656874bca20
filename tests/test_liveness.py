"""Whether anybody trains a run, judged without claiming it."""

from pathlib import Path
from typing import Any

import pytest

from checkpointing.history import History, history
from checkpointing.liveness import judge
from storage.canonical import canonical_json
from storage.log import Draft, Log
from storage.store import LocalStore
from tests.made_runs import make_run


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def past(store: LocalStore) -> History:
    return history(Log(store).refresh())


def beat(store: LocalStore, generation: int, count: int, **more: Any) -> None:
    told = {"count": count, "phase": "step", "step": 7, "left": False, **more}
    store.put(f"beats/g{generation:04d}.json", canonical_json(told))


def elsewhere(store: LocalStore) -> None:
    """A second incarnation, on another host."""
    make_run(store, 1)
    body = {"owner": {"host": "far", "boot_id": "another", "pid": 3}}
    Log(store).append(lambda _: Draft(kind="CLAIM", generation=2, body=body))
    beat(store, 2, 1)


def refuse(seconds: float) -> None:
    raise AssertionError("nothing is to be waited for")


def test_a_run_that_nobody_claimed() -> None:
    assert judge(LocalStore(Path("nowhere")), History(), refuse).state == "never claimed"


def test_a_process_of_this_machine_is_known_without_waiting(store: LocalStore) -> None:
    make_run(store, 1)
    found = judge(store, past(store), refuse)
    assert (found.state, found.here, found.generation) == ("alive", True, 1)


def test_one_that_said_so_has_left(store: LocalStore) -> None:
    elsewhere(store)
    beat(store, 2, 5, left=True)
    found = judge(store, past(store), refuse)
    assert (found.state, found.host, found.here) == ("gone", "far", False)


def test_one_far_away_is_alive_when_a_heartbeat_comes_and_silent_when_none_does(
    store: LocalStore,
) -> None:
    elsewhere(store)
    waited: list[float] = []
    assert judge(store, past(store), waited.append).state == "silent"
    assert waited == [10.0]
    found = judge(store, past(store), lambda _: beat(store, 2, 2, step=8))
    assert (found.state, found.beat["step"]) == ("alive", 8)


def test_a_complete_run_is_complete_until_it_is_claimed_again(store: LocalStore) -> None:
    owner = make_run(store, 1)
    owner.append("END", lambda _: {"step": 1, "digest": ""})
    assert judge(store, past(store), refuse).state == "complete"
    body = {"owner": {"host": "far", "boot_id": "another"}}
    Log(store).append(lambda _: Draft(kind="CLAIM", generation=2, body=body))
    assert judge(store, past(store), lambda _: beat(store, 2, 2)).state == "alive"


def test_one_that_leaves_while_we_look_is_gone(store: LocalStore) -> None:
    elsewhere(store)
    found = judge(store, past(store), lambda _: beat(store, 2, 2, left=True))
    assert found.state == "gone"
