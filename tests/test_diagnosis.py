"""The doctor names what is wrong and what to do, and changes nothing that matters."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpointing.diagnosis import diagnose
from checkpointing.history import history
from checkpointing.verification import record_verified
from storage.canonical import canonical_json
from storage.errors import StoreUnavailableError
from storage.log import Draft, Log
from storage.probe import Finding, examine
from storage.store import LocalStore
from tests.made_runs import contents, go_on, make_run

NOW = 1_000_000.0


def nothing(seconds: float) -> None:
    return None


def found(
    store: LocalStore, sleep: Callable[[float], None] = nothing
) -> tuple[dict[str, Finding], set[str]]:
    """Findings by name, and the names of those that are not well."""
    small = functools.partial(examine, megabytes=1)
    found = diagnose(store, examined=small, wall_clock=lambda: NOW, sleep=sleep)
    findings = {f.name: f for f in found}
    return findings, {name for name, finding in findings.items() if not finding.ok}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def test_an_empty_place_is_examined_as_a_store_alone(store: LocalStore) -> None:
    findings, ill = found(store)
    assert ill == set()
    assert "conditional create" in findings
    assert findings["run"].detail == "none here yet: the place is empty"
    assert "log" not in findings


def test_a_healthy_run_is_well_and_stays_as_it_is(store: LocalStore) -> None:
    owner = make_run(store, 1, 2)
    record_verified(Log(store), history(owner.records).live[0].index)
    before = contents(store)
    findings, ill = found(store)
    assert ill == set()
    assert findings["run.json"].detail == "readable, run made"
    assert findings["log"].detail == "4 records"
    assert findings["checkpoints"].detail == "live at steps 1, 2; verified: 1"
    assert contents(store) == before


def test_a_run_that_was_never_trained_is_well(store: LocalStore) -> None:
    store.put("run.json", b'{"format":1,"run":"x","identity":{}}')
    findings, ill = found(store)
    assert ill == set()
    assert findings["checkpoints"].detail == "none yet"
    assert findings["owner"].detail == "never claimed"


def test_what_is_no_run_is_said_so(store: LocalStore) -> None:
    store.put("notes.txt", b"mine")
    findings, ill = found(store)
    assert ill == {"run.json"}
    assert "holds no run: there is no run.json" in findings["run.json"].detail
    store.put("run.json", b"{")
    assert "is damaged" in found(store)[0]["run.json"].detail


def test_an_unfinished_copy_is_known(store: LocalStore) -> None:
    make_run(store, 1)
    store.delete("run.json")
    findings, ill = found(store)
    assert ill == {"run.json"}
    assert "this is an unfinished copy (give the same" in findings["run.json"].detail


def test_damaged_records_are_numbered_and_voided_ones_are_well(store: LocalStore) -> None:
    make_run(store, 1, 2)
    torn = len(store.list("log/")) + 1
    store.put(f"log/{torn:010d}.json", b'{"torn')
    go_on(store, 3)
    findings, ill = found(store)
    assert ill == set()
    assert findings["log"].detail.endswith("1 torn and voided")
    store.put("log/0000000002.json", b"{}")
    findings, ill = found(store)
    assert ill == {"log"}
    assert "records 2 are damaged or missing" in findings["log"].detail
    assert "put back log/*.json" in findings["log"].detail


@pytest.mark.parametrize("name", ["manifest.json", ".safetensors"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_live_checkpoint_with_a_missing_or_cut_object_is_named(
    name: str, how: str, store: LocalStore
) -> None:
    make_run(store, 1, 2)
    key = next(k for k in store.list("checkpoints/") if "/s00000002-" in k and k.endswith(name))
    if how == "missing":
        store.delete(key)
    else:
        store.put(key, store.get(key)[:-1])
    findings, ill = found(store)
    assert ill == {"step 2"}
    assert key in findings["step 2"].detail
    assert "put it back from a copy" in findings["step 2"].detail


def test_quarantine_is_told_with_the_way_out(store: LocalStore) -> None:
    owner = make_run(store, 1, 2)
    indices = [c.index for c in history(owner.records).live]
    owner.append("QUARANTINE", lambda _: {"checkpoints": indices[:1]})
    findings, ill = found(store)
    assert ill == {"quarantine"}
    assert "steps 1 were read damaged" in findings["quarantine"].detail
    assert "verify RUN --record" in findings["quarantine"].detail
    owner.append("QUARANTINE", lambda _: {"checkpoints": indices})
    findings, ill = found(store)
    assert ill == {"quarantine", "checkpoints"}
    assert "none is live, so nothing can be restored" in findings["checkpoints"].detail


def test_leftovers_are_counted_and_a_save_in_flight_is_none(store: LocalStore) -> None:
    owner = make_run(store, 1, 2, 3)
    store.put("checkpoints/g0001/s00000009-0123456789ab/r000-p00.safetensors", bytes(1500))
    assert found(store)[1] == set(), "the owner may be saving it"
    go_on(store, 4)
    findings, ill = found(store)
    assert ill == {"leftovers"}
    assert findings["leftovers"].detail.startswith(
        "1 objects, 1.5 kB, of 1 saves that never committed and 0 retired checkpoints; the next "
    )
    body = {"checkpoints": [history(owner.records).live[0].index]}
    Log(store).append(lambda _: Draft(kind="RETIRE", generation=0, body=body))
    assert "and 1 retired checkpoints" in found(store)[0]["leftovers"].detail
    store.put("pins/x.json", b'{"checkpoint":%d,"until":null}' % body["checkpoints"][0])
    assert "and 0 retired checkpoints" in found(store)[0]["leftovers"].detail


def test_leases_that_have_ended_are_told(store: LocalStore) -> None:
    make_run(store, 1)
    store.put("pins/a.json", b'{"checkpoint":2,"until":null}')
    store.put("pins/b.json", b'{"checkpoint":2,"until":%f}' % (NOW + 1))
    findings, ill = found(store)
    assert ill == set()
    assert findings["pins"].detail == "1 for ever, 1 of readers"
    store.put("pins/c.json", b'{"checkpoint":2,"until":%f}' % NOW)
    findings, ill = found(store)
    assert ill == {"pins"}
    assert "1 leases of readers have ended" in findings["pins"].detail
    assert "pins/c.json" in store.list("pins/")


OTHER = {"owner": {"host": "far\x1b[2Jaway", "boot_id": "another"}}


def beating(store: LocalStore, count: int, left: bool = False) -> None:
    beat = {"count": count, "phase": "step", "step": 7, "left": left}
    store.put("beats/g0002.json", canonical_json(beat))


def claimed_elsewhere(store: LocalStore) -> None:
    """A second incarnation, of another host, at step 7."""
    make_run(store, 1)
    body = dict(OTHER)
    Log(store).append(lambda _: Draft(kind="CLAIM", generation=2, body=body))
    beating(store, 1)


def test_an_owner_far_away_is_alive_when_it_beats_again(store: LocalStore) -> None:
    claimed_elsewhere(store)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        beating(store, 2)

    findings, ill = found(store, sleep)
    assert ill == set() and waited == [10.0]
    assert findings["owner"].detail == "alive: generation 2 on host far?[2Jaway, phase step, step 7"


def test_an_owner_far_away_is_silent_when_it_does_not(store: LocalStore) -> None:
    claimed_elsewhere(store)
    detail = found(store)[0]["owner"].detail
    assert detail.startswith("silent: generation 2") and detail.endswith("a new start takes over")


def test_an_owner_on_this_machine_is_alive_without_waiting(store: LocalStore) -> None:
    make_run(store, 1)
    waited: list[float] = []
    detail = found(store, waited.append)[0]["owner"].detail
    assert detail.startswith("alive, a process of this machine: generation 1 on host")
    assert waited == []


def test_an_owner_that_has_left_is_gone_without_waiting(store: LocalStore) -> None:
    claimed_elsewhere(store)
    beating(store, 3, left=True)
    waited: list[float] = []
    assert found(store, waited.append)[0]["owner"].detail.startswith("gone: generation 2")
    assert waited == []


def test_a_complete_run_has_no_owner(store: LocalStore) -> None:
    owner = make_run(store, 1)
    owner.append("END", lambda _: {"step": 1, "digest": ""})
    assert found(store)[0]["owner"].detail.startswith("none: the run is complete")


def test_a_store_that_fails_is_a_finding(store: LocalStore) -> None:
    class Failing(LocalStore):
        def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            if key.startswith("log/"):
                raise StoreUnavailableError(f"{key}: connection reset")
            return super().get(key, start, end)

    make_run(store, 1)
    findings, ill = found(Failing(store.root))
    assert ill == {"store"}
    assert "connection reset; try again, and look at the network" in findings["store"].detail
