"""The checkpoint protocol: explored by a model, and the model held against the code.

Covers: every order and every kill of the scenarios in `protocol_scenarios`, one mutant for each
rule, logs that the real code wrote, random logs, and real calls driven along traces of the model.
Does not cover: time (that 30 s are enough for a writer to end), stores that lie, damaged objects.
"""

import errno
import gc
import hashlib
import json
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointing.history import History, history
from checkpointing.incarnation import Incarnation, claim_run
from checkpointing.pins import pinned
from checkpointing.retention import RetentionConfig, retire, sweep, victims
from storage.errors import FencedError, StoreUnavailableError
from storage.log import Draft, Log, Record
from storage.store import LocalStore
from tests.protocol_model import Entry, Key, Meaning, Rules, State, Step, meaning
from tests.protocol_moves import Protocol
from tests.protocol_scenarios import SCENARIOS
from tests.protocol_search import Explored, explore

# What the model shows.

STATES = {
    "claims": 32_000,
    "two writers": 12_000,
    "late requests": 13_000,
    "restores": 23_000,
    "reader": 54_000,
    "operator": 85_000,
    "operator twice": 40_000,
    "operator and reader": 53_000,
    "sweep": 62_000,
    "sweep and reader": 43_000,
    "sweep, operator and reader": 41_000,
    "torn records": 150_000,
}
"""At least so many states were met when this was written: fewer means that rules died."""

LEAST_TAKEN = {
    "killed": 10_000,
    "is fenced": 1_000,
    "loses the response": 1_000,
    "loses the request": 1_000,
    "waits for a response in vain": 100,
    "a delayed request arrives": 100,
    "finds the slot taken": 1_000,
    "finds its own record": 1_000,
    "decides anew": 1_000,
    "gives up": 1_000,
    "restores": 1_000,
    "finds a checkpoint damaged": 10,
    "finds it retired meanwhile": 100,
    "unpins": 1_000,
    "appends CLAIM": 1_000,
    "appends COMMIT": 1_000,
    "appends RETIRE": 1_000,
    "appends VERIFIED": 1_000,
    "appends QUARANTINE": 100,
    "deletes a retired object": 1_000,
    "sweeps an object": 1_000,
    "voids a torn record": 1_000,
    "finds a torn record completed": 100,
    "finds its record void": 100,
}


@cache
def explored(name: str) -> Explored:
    """What was met, without the states themselves: together they fill the memory."""
    gc.disable()  # nothing here is cyclic, and looking for it takes half of the time
    try:
        return replace(explore(SCENARIOS[name]), reached={})
    finally:
        gc.enable()


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_invariant_holds_in_every_state(name: str) -> None:
    found = explored(name)
    print(f"{name}: {found.states} states, {found.transitions} transitions")
    assert found.violation is None
    assert found.states >= STATES[name]


def test_no_rule_of_the_model_is_dead() -> None:
    taken: Counter[str] = Counter()
    for name in SCENARIOS:
        taken += explored(name).rules
    assert {rule: taken[rule] for rule, least in LEAST_TAKEN.items() if taken[rule] < least} == {}
    assert "decides to quarantine" not in taken, "others had retired it"


def policy_of(keep_last: int) -> RetentionConfig:
    """A policy of the model's, which may keep a single checkpoint; users' keep two."""
    policy = RetentionConfig()
    object.__setattr__(policy, "keep_last", keep_last)
    return policy


KEEP_1 = policy_of(1)

WHOLE = "a live checkpoint is whole"
PINNED = "a pinned reader finds its objects"
NEWEST = "the newest checkpoint is never retired, nor its parent"
VOID = "an acknowledged record is never void"
FENCED = "a fenced record never counts and is never acknowledged"

MUTANTS = [
    ("assumes_written", "two writers", "what is acknowledged is in the log", 2),
    ("assumes_lost", "two writers", "an attempt is committed once", 9),
    ("appends_again", "late requests", "an attempt is committed once", 11),
    ("no_nonce", "claims", "a generation has one owner", 5),
    ("no_retire_record", "reader", WHOLE, 9),
    ("step_named_keys", "two writers", "nothing is overwritten", 8),
    ("step_named_keys", "two writers", WHOLE, 11),
    ("fence_before_write", "two writers", FENCED, 9),
    ("fence_before_write", "reader", "an acknowledged COMMIT counts", 7),
    ("no_pin", "reader", PINNED, 15),
    ("no_second_look", "reader", PINNED, 13),
    ("pins_before_retire", "reader", PINNED, 15),
    ("sweeps_all_not_live", "sweep and reader", PINNED, 21),
    ("sweeps_all_not_live", "sweep and reader", "the sweep leaves what is in quarantine", 6),
    ("sweeps_any_generation", "sweep", WHOLE, 12),
    ("sweeps_quarantined", "sweep and reader", "the sweep leaves what is in quarantine", 6),
    ("no_sweep_pins", "sweep and reader", PINNED, 19),
    ("retires_newest", "two writers", NEWEST, 10),
    ("retires_parent", "two writers", NEWEST, 17),
    ("operator_fences", "operator", "only a later CLAIM fences", 3),
    ("verified_unretires", "operator", WHOLE, 12),
    ("acknowledges_without_look", "torn records", VOID, 6),
    ("acknowledges_beside_torn", "torn records", VOID, 7),
    ("voids_what_was_torn", "torn records", VOID, 7),
    ("keeps_decision_after_wait", "torn records", FENCED, 10),
]
"""A wrong rule, where it shows, the invariant it breaks, and the steps of the shortest trace."""


@pytest.mark.parametrize(("mutant", "scenario", "invariant", "steps"), MUTANTS)
def test_each_wrong_rule_breaks_an_invariant(
    mutant: str, scenario: str, invariant: str, steps: int
) -> None:
    found = explore(SCENARIOS[scenario], Rules(**{mutant: True}), wanted=invariant)
    assert found.violation is not None, f"{mutant} breaks nothing in {found.states} states"
    print(*found.violation.steps, found.violation.breaks, sep="\n")
    assert invariant in found.violation.breaks
    assert len(found.violation.steps) == steps


def test_every_flag_of_the_rules_has_its_mutant() -> None:
    assert set(Rules.__slots__) == {mutant for mutant, *_ in MUTANTS}


# What the code wrote, read by the model.


class NotAtomic(LocalStore):
    """A folder that says that a crash can leave a torn object (Google Drive)."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.creates_atomically = False


@pytest.fixture(params=[LocalStore, NotAtomic])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> LocalStore:
    place: LocalStore = request.param(tmp_path / "run")
    return place


def calm_log(store: LocalStore) -> Log:
    return Log(store, sleep=lambda seconds: None)


def claimed(store: LocalStore) -> Incarnation:
    return claim_run(store, calm_log(store), body={}, take_over=True)


def read_log(store: LocalStore) -> tuple[Entry, ...]:
    """The records in the store, as the model writes them; read without `storage.log`."""
    numbers = [int(key[4:14]) for key in store.list("log/")]
    return tuple(_read_slot(store, slot) for slot in range(1, max(numbers, default=0) + 1))


def _read_slot(store: LocalStore, slot: int) -> Entry:
    torn = Entry("TORN", 0, "", "", whole=False)
    try:
        content = json.loads((store.root / f"log/{slot:010d}.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return torn
    sha256 = content.pop("sha256")
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    if hashlib.sha256(text.encode()).hexdigest() != sha256:
        return torn
    return entry_of(content)


def entry_of(content: dict[str, Any]) -> Entry:
    """A record's JSON as the model knows it."""
    body = content["body"]
    key = None
    if content["kind"] == "COMMIT":
        folder = body["manifest_key"].rpartition("/")[0]
        key = Key(content["generation"], body["step"], folder)
    return Entry(
        content["kind"],
        content["generation"],
        content["nonce"],
        "",
        key,
        parent=body.get("parent") or 0,
        targets=tuple(body.get("checkpoints", ())),
        voids=tuple(content["voids"]),
    )


def judged(past: Meaning) -> tuple[int, list[tuple[int, int, int, bool, bool, bool]]]:
    """What model and code must agree on."""
    rows = [
        (c.slot, c.generation, c.parent, c.retired, c.quarantined, c.verified) for c in past.commits
    ]
    return past.generation, rows


def judged_by_code(past: History) -> tuple[int, list[tuple[int, int, int, bool, bool, bool]]]:
    rows = [
        (c.index, c.generation, c.parent or 0, c.retired, c.quarantined, c.verified)
        for c in past.checkpoints
    ]
    return past.generation, rows


def assert_agree(store: LocalStore) -> Meaning:
    """That model and code read one log alike; returns what it means."""
    log = Log(store)
    past = history(log.refresh())
    entries = read_log(store)
    modelled = meaning(entries)
    assert judged_by_code(past) == judged(modelled)
    assert [c.index for c in past.live] == [c.slot for c in modelled.live]
    assert not modelled.void & {record.index for record in log.records}
    torn = {slot for slot, entry in enumerate(entries, start=1) if not entry.whole}
    assert torn == set(log.damaged)
    return modelled


def upload(store: LocalStore, generation: int, step: int, nonce: str) -> str:
    """The objects of one attempt; returns the manifest's key."""
    folder = f"checkpoints/g{generation:04d}/s{step:08d}-{nonce:0>12}"
    store.put(f"{folder}/data.safetensors", nonce.encode())
    store.put(f"{folder}/manifest.json", nonce.encode())
    return f"{folder}/manifest.json"


def commit_body(step: int, manifest_key: str, parent: int | None = None) -> dict[str, Any]:
    return {
        "step": step,
        "digest": "d",
        "manifest_key": manifest_key,
        "manifest_sha256": "s",
        "parent": parent,
        "healthy": True,
        "validation_loss": None,
    }


def commit(store: LocalStore, writer: Incarnation, step: int, parent: int | None = None) -> int:
    body = commit_body(step, upload(store, writer.generation, step, f"{step}"), parent)
    record = writer.append("COMMIT", lambda _: body)
    assert record is not None
    return record.index


def operate(store: LocalStore, kind: str, slot: int) -> None:
    body = {"checkpoints": [slot]}
    calm_log(store).append(lambda _: Draft(kind=kind, generation=0, body=body))


def tear(store: LocalStore, slot: int) -> bytes:
    """Leave half of a record; returns the whole of it."""
    path = store.root / f"log/{slot:010d}.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return whole


def complete(store: LocalStore, slot: int, whole: bytes) -> None:
    (store.root / f"log/{slot:010d}.json").write_bytes(whole)


def test_the_model_reads_a_run_with_takeovers_marks_and_sweeps_as_the_code_does(
    store: LocalStore,
) -> None:
    first = claimed(store)
    slots = [commit(store, first, step) for step in (1, 2, 3)]
    assert_agree(store)
    operate(store, "QUARANTINE", slots[0])
    operate(store, "RETIRE", slots[0])
    upload(store, 1, 9, "abad1dea")
    second = claimed(store)
    with pytest.raises(FencedError):
        commit(store, first, 4)
    sweep(store, second)
    fourth = commit(store, second, 4, parent=slots[2])
    commit(store, second, 5, parent=slots[2])
    retire(store, second, KEEP_1)
    operate(store, "VERIFIED", slots[1])
    past = assert_agree(store)
    assert past.generation == 2
    assert {c.slot for c in past.commits if c.retired} == {slots[0], slots[1], fourth}
    kept = {key.split("/")[2][:9] for key in store.list("checkpoints/")}
    assert kept == {"s00000001", "s00000003", "s00000005"}, "quarantined, parent, newest"


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("torn_kind", ["CLAIM", "COMMIT", "RETIRE"])
def test_the_model_reads_a_torn_record_and_its_successor_as_the_code_does(
    torn_kind: str, late: bool, tmp_path: Path
) -> None:
    store = NotAtomic(tmp_path)
    first = claimed(store)
    commit(store, first, 1)
    if torn_kind == "CLAIM":
        claimed(store)
    elif torn_kind == "COMMIT":
        commit(store, first, 2)
    else:
        operate(store, "RETIRE", 2)
    whole = tear(store, 3)
    before = assert_agree(store)
    assert before.generation == 1 and [c.slot for c in before.live] == [2]
    third = claimed(store)
    if late:
        complete(store, 3, whole)
    past = assert_agree(store)
    assert third.generation == past.generation == 2
    assert 3 in past.void and [c.slot for c in past.live] == [2]
    commit(store, third, 3)
    assert [c.slot for c in assert_agree(store).live] == [2, 5]


KINDS = st.sampled_from(["CLAIM", "COMMIT", "RETIRE", "QUARANTINE", "VERIFIED", "PLAN", "END"])


@given(
    st.lists(
        st.tuples(KINDS, st.integers(0, 4), st.lists(st.integers(1, 12), max_size=3)), max_size=14
    )
)
@settings(max_examples=400, deadline=None)
def test_any_sequence_of_records_means_the_same_to_model_and_code(
    drafts: list[tuple[str, int, list[int]]],
) -> None:
    """Also sequences that no writer could append: both folds have to leave out the same."""
    records, entries = [], []
    for slot, (kind, generation, targets) in enumerate(drafts, start=1):
        body: dict[str, Any] = {"checkpoints": targets}
        generation = max(generation, 1) if kind in ("CLAIM", "COMMIT") else generation
        if kind == "COMMIT":
            body = commit_body(slot, f"checkpoints/{slot}/manifest.json", parent=targets[:1] or 0)
            body["parent"] = targets[0] if targets else None
        record = Record(
            index=slot,
            kind=kind,
            generation=generation,
            highest_generation=0,
            nonce=str(slot),
            previous="",
            voids=(),
            written_at=0.0,
            body=body,
        )
        records.append(record)
        content = {"kind": kind, "generation": generation, "nonce": "", "voids": (), "body": body}
        entries.append(entry_of(content))
    assert judged_by_code(history(records)) == judged(meaning(tuple(entries)))


# What the model forbids, the code refuses.


def test_a_stale_incarnation_appends_nothing_of_any_kind(store: LocalStore) -> None:
    stale = claimed(store)
    for step in (1, 2, 3):
        commit(store, stale, step)
    claimed(store)
    before = read_log(store)
    for kind in ("COMMIT", "RETIRE", "QUARANTINE", "VERIFIED", "PLAN", "END"):
        with pytest.raises(FencedError):
            stale.append(kind, lambda _: {"checkpoints": [2]})
    with pytest.raises(FencedError):
        retire(store, stale, KEEP_1)
    with pytest.raises(FencedError):
        sweep(store, stale)
    assert read_log(store) == before
    assert len(store.list("checkpoints/")) == 6


def test_an_operators_record_fences_nobody(store: LocalStore) -> None:
    writer = claimed(store)
    slot = commit(store, writer, 1)
    for kind in ("QUARANTINE", "VERIFIED", "RETIRE"):
        operate(store, kind, slot)
        writer.check()
    commit(store, writer, 2)
    assert not assert_agree(store).commits[0].live, "VERIFIED does not unretire"


@given(
    live=st.lists(st.tuples(st.booleans(), st.none() | st.integers(1, 9)), min_size=1, max_size=7),
    parent=st.none() | st.integers(1, 7),
    keep_last=st.integers(1, 4),
    pins=st.sets(st.integers(1, 7)),
)
@settings(deadline=None)
def test_retention_chooses_nothing_that_the_model_keeps(
    live: list[tuple[bool, int | None]], parent: int | None, keep_last: int, pins: set[int]
) -> None:
    records = []
    for slot, (healthy, loss) in enumerate(live, start=1):
        body = commit_body(slot, f"checkpoints/{slot}/manifest.json", parent)
        body |= {"healthy": healthy, "validation_loss": loss}
        records.append(
            Record(
                index=slot,
                kind="COMMIT",
                generation=1,
                highest_generation=1,
                nonce=str(slot),
                previous="",
                voids=(),
                written_at=0.0,
                body=body,
            )
        )
    policy = policy_of(keep_last)
    chosen = set(victims(history(records), policy, pins))
    newest = set(range(1, len(live) + 1)[-keep_last:])
    assert not chosen & (newest | {parent} | pins)


def test_of_identical_claims_one_owns_the_generation(store: LocalStore) -> None:
    """Both read the same log and draft the same; the slower finds another's record in its slot."""
    fast: list[Incarnation] = []

    class Overtaken(type(store)):  # type: ignore[misc]
        def put_if_absent(self, key: str, data: bytes) -> bool:
            if not fast:
                fast.append(claimed(store))
            return bool(super().put_if_absent(key, data))

    slow = claimed(Overtaken(store.root))
    assert (fast[0].generation, slow.generation) == (1, 2)
    with pytest.raises(FencedError):
        fast[0].check()
    assert assert_agree(store).generation == 2


def test_a_reader_whose_checkpoint_is_retired_before_its_second_look_chooses_anew(
    store: LocalStore,
) -> None:
    writer = claimed(store)
    for step in (1, 2):
        commit(store, writer, step)

    def choose(past: History) -> Any:
        first = past.live[0]
        if first.step == 1:
            retire(store, writer, KEEP_1)
        return first

    with pinned(store, calm_log(store), choose) as checkpoint:
        assert checkpoint.step == 2
        assert store.list(checkpoint.manifest_key)
    assert not store.list("pins/")


# The code, driven along traces of the model.


class Killed(BaseException):
    """Unwinds an actor's thread, which does nothing to the store on its way."""


class Actor:
    """A writer of real code in a thread of its own, which stops before every operation."""

    def __init__(self, root: Path, letter: str, saves: int) -> None:
        self.at = "idle"
        self.outcome = ""
        self._letter = letter
        self._saves = saves
        self._store = Stepwise(root, self)
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._killed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._stopped.acquire()

    def advance(self, outcome: str = "") -> None:
        """Do one operation, and run up to the next."""
        self.outcome = outcome
        self._go.release()
        assert self._stopped.acquire(timeout=60)

    def kill(self) -> None:
        self._killed = True
        self._go.release()
        self._thread.join()

    def stop(self, at: str) -> None:
        self.at = at
        self._stopped.release()
        self._go.acquire()
        if self._killed:
            raise Killed

    def _run(self) -> None:
        try:
            self.at = self._train()
        except FencedError:
            self.at = "fenced"
        except StoreUnavailableError:
            self.at = "dead"
        except Killed:
            return
        self._stopped.release()

    def _train(self) -> str:
        self.stop("idle")
        writer = claim_run(self._store, Log(self._store), body={}, take_over=True)
        own = [r for r in writer.records if r.kind == "CLAIM"][writer.generation - 1]
        live = history([r for r in writer.records if r.index <= own.index]).live
        parent = live[-1] if live else None
        for left in range(self._saves, 0, -1):
            self.stop("begin")
            writer.check()
            self._save(writer, (parent.step if parent else 0) + 1, left, parent and parent.index)
        self.stop("begin")
        writer.check()
        return "done"

    def _save(self, writer: Incarnation, step: int, left: int, parent: int | None) -> None:
        nonce = f"{self._letter.lower()}{left}"
        self.stop("upload")
        folder = f"checkpoints/g{writer.generation:04d}/s{step:08d}-{nonce:0>12}"
        self._store.put(f"{folder}/data.safetensors", nonce.encode())
        self.stop("manifest")
        self._store.put(f"{folder}/manifest.json", nonce.encode())
        self.stop("commit")
        body = commit_body(step, f"{folder}/manifest.json", parent)
        with suppress(StoreUnavailableError):
            writer.append("COMMIT", lambda _: body)
            self._store.recorded = False
            retire(self._store, writer, KEEP_1, announce=self._announced)

    def _announced(self, phase: str) -> None:
        self._store.recorded |= phase == "retire:recorded"


class Stepwise(LocalStore):
    """Asks its actor before every operation whose order matters."""

    def __init__(self, root: Path, actor: Actor) -> None:
        super().__init__(root)
        self.recorded = False
        self._actor = actor

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._actor.stop("put")
        outcome = self._actor.outcome
        created = outcome != "loses the request" and super().put_if_absent(key, data)
        if outcome.startswith("loses"):
            self._actor.stop("back")
            raise StoreUnavailableError(outcome)
        if not created:
            self._actor.stop("taken")
        return created

    def list(self, prefix: str, start_after: str = "") -> list[str]:
        if prefix == "pins/":
            self._actor.stop("unpinned" if self.recorded else "pins")
        keys = super().list(prefix, start_after)
        if prefix == "pins/" and not self.recorded:
            self._actor.stop("retire")
        return keys

    def delete(self, key: str) -> None:
        self._actor.stop("delete")
        super().delete(key)


SILENT = ("decides anew", "has deleted")
"""Steps of the model in which the code does nothing to the store."""


def follow(actors: dict[str, Actor], step: Step) -> None:
    """Let the code do what the model did."""
    actor = actors[step.process]
    there = next(p for p in step.after.processes if p.name == step.process)
    if step.rule == "killed":
        actor.kill()
    elif step.rule not in SILENT:
        actor.advance(step.rule)
        while there.at == "fenced" and actor.at in ("put", "taken", "begin"):
            actor.advance()  # the code reads the log before the pins: fenced one step later
        deleted_all = there.at == "delete" and not there.targets
        assert actor.at == ("begin" if deleted_all else there.at), step.rule


def things(state: State) -> set[str]:
    files = {"data": "data.safetensors", "manifest": "manifest.json"}
    return {
        f"checkpoints/g{t.key.generation:04d}/s{t.key.step:08d}-{t.key.nonce[1:].lower():0>12}/"
        f"{files[t.part]}"
        for t in state.things
    }


def walk(protocol: Protocol, chance: random.Random) -> Iterator[Step]:
    """A random trace of the model to its end; faults are rare, so that traces are long."""
    state = protocol.scenario.start
    while steps := list(protocol.steps(state)):
        calm = [s for s in steps if s.rule != "killed" and not s.rule.startswith("loses")]
        step = chance.choice(steps if chance.random() < 0.15 or not calm else calm)
        yield step
        state = step.after


def test_the_code_goes_where_the_model_goes(tmp_path: Path, monkeypatch: Any) -> None:
    """300 random traces of two writers that save and retain, with lost messages and kills."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    protocol = Protocol(SCENARIOS["two writers"])
    taken: Counter[str] = Counter()
    for seed in range(300):
        root = tmp_path / str(seed)
        actors = {f"W{letter}": Actor(root, letter, saves=2) for letter in "AB"}
        place = LocalStore(root)
        state = protocol.scenario.start
        for step in walk(protocol, random.Random(seed)):
            follow(actors, step)
            taken[step.rule] += 1
            if step.after.log is not state.log:
                assert judged(assert_agree(place)) == judged(protocol.past(step.after))
            state = step.after
            assert set(place.list("checkpoints/")) == things(state), step.rule
    print(dict(taken))
    for rule in ("is fenced", "finds its own record", "decides anew", "appends RETIRE", "killed"):
        assert taken[rule] >= 30, rule


# Where creation is not atomic, the code allows what the model forbids.


def test_a_record_completed_since_it_was_found_torn_is_not_voided(tmp_path: Path) -> None:
    """Mutant `voids_what_was_torn`: the operator's Log was opened while slot 3 was written."""
    store = NotAtomic(tmp_path)
    writer = claimed(store)
    commit(store, writer, 1)
    operator = calm_log(store)
    commit(store, writer, 2)
    whole = tear(store, 3)
    operator.refresh()
    complete(store, 3, whole)
    assert [c.slot for c in assert_agree(store).live] == [2, 3]
    operator.append(lambda _: Draft(kind="VERIFIED", generation=0, body={"checkpoints": [2]}))
    assert [c.slot for c in assert_agree(store).live] == [2, 3]


def test_a_claim_completed_during_the_wait_fences_the_append_that_waited(tmp_path: Path) -> None:
    """Mutant `keeps_decision_after_wait`."""
    store = NotAtomic(tmp_path)
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        complete(store, 2, whole)

    stale = claim_run(store, Log(store, sleep=wait), body={}, take_over=True)
    claimed(store)
    whole = tear(store, 2)
    with pytest.raises(FencedError):
        stale.append("COMMIT", lambda _: commit_body(1, "checkpoints/x/manifest.json"))
    assert waited and len(read_log(store)) == 2


class Meanwhile(NotAtomic):
    """Before slot 3 is complete, others do something."""

    def __init__(self, root: Path, others: Callable[[], None]) -> None:
        super().__init__(root)
        self.others = others

    def put_if_absent(self, key: str, data: bytes) -> bool:
        created = super().put_if_absent(key, data)
        if key.endswith("0003.json"):
            path = self.root / key
            path.write_bytes(data[:9])
            self.others()
            path.write_bytes(data)
        return created


def test_a_record_is_not_acknowledged_beside_a_successor_still_being_written(
    tmp_path: Path,
) -> None:
    """Mutant `acknowledges_beside_torn`: slot 4 voids slot 3, and is completed last."""
    store = NotAtomic(tmp_path)
    commit(store, claimed(store), 1)
    voider: list[bytes] = []

    def others() -> None:
        operate(store, "VERIFIED", 2)
        voider.append(tear(store, 4))

    acknowledged: list[int] = []
    with suppress(StoreUnavailableError):  # or waits until the successor is settled
        acknowledged.append(claimed(Meanwhile(tmp_path, others)).generation)
    complete(store, 4, voider[0])
    assert not acknowledged or assert_agree(store).generation >= acknowledged[0]


def test_a_void_record_does_not_void(tmp_path: Path) -> None:
    """4 voids 3 and is torn; 3 is completed; 5 builds on 3 and voids 4; 4 is completed."""
    store = NotAtomic(tmp_path)
    writer = claimed(store)
    commit(store, writer, 1)
    commit(store, writer, 2)
    third = tear(store, 3)
    operate(store, "VERIFIED", 2)
    fourth = tear(store, 4)
    complete(store, 3, third)
    commit(store, claimed(store), 3)
    complete(store, 4, fourth)
    assert [c.slot for c in assert_agree(store).live] == [2, 3, 6]


def test_the_first_append_of_a_process_waits_for_a_torn_record_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume does not probe the store, so nothing was created before its CLAIM."""

    def no_link(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_link)
    store = LocalStore(tmp_path)
    commit(store, claimed(store), 1)
    tear(store, 2)
    waits: list[float] = []
    claim_run(
        LocalStore(tmp_path), Log(LocalStore(tmp_path), sleep=waits.append), body={}, take_over=True
    )
    assert waits
