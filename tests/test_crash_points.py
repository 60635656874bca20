"""Whatever goes wrong at any store operation, a restart has the newest committed checkpoint."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from checkpointing import retention
from checkpointing.copying import copy_run
from checkpointing.group import Group, Solo
from checkpointing.history import Checkpoint, history
from checkpointing.incarnation import Incarnation, claim_run
from checkpointing.load import load
from checkpointing.naming import RUN_KEY
from checkpointing.pins import pinned
from checkpointing.pruning import prune
from checkpointing.restore import restore
from checkpointing.retention import RetentionConfig, attempts, retire, sweep
from checkpointing.save import Saver, TrainingState, save
from checkpointing.tier import adopt, claim_tier, for_tier, tier_context
from checkpointing.write import Job
from storage.canonical import canonical_json, sha256_hex
from storage.errors import FencedError, RangeFlowError
from storage.log import Log, Record
from storage.store import LocalStore, Store
from tests.crash_points import ALWAYS, Case, Kind, Outcome, Places, Violation, explore
from tests.faulty_store import Crash
from tests.groups import ThreadGroup

KEEP = RetentionConfig(keep_last=2)
RUN = {"format": 1, "run": "made", "identity": {"seed": 0}}
AFTER, ANOTHERS, MINE = 9, 7, 4
"""Steps that are saved by a restart, by another process meanwhile, and by the operation."""


def state(step: int) -> TrainingState:
    tensors = {"w": torch.full((5,), float(step)), "b": torch.arange(step)}
    return TrainingState(tensors=tensors, exact={"step": step}, extra={"rng": [step]})


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The digest of each state, from a store that nothing happens to."""
    store = LocalStore(tmp_path_factory.mktemp("digests"))
    owner = claimed(store)
    found = {}
    for step in range(1, 10):
        saved = save(store, owner, Solo(), state(step), step=step)
        assert saved is not None
        found[step] = saved.digest
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where syncing costs nothing, if there is one."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    with TemporaryDirectory(dir=memory) as made:
        yield Path(made)


def claimed(store: Store) -> Incarnation:
    log = Log(store, sleep=lambda seconds: None)
    return claim_run(store, log, body={}, take_over=True)


def reopened(store: Store) -> Incarnation:
    """The last claimant, as its own process would see the log."""
    log = Log(store, sleep=lambda seconds: None)
    records = log.refresh()
    return Incarnation(log, [record for record in records if record.kind == "CLAIM"][-1])


def past_of(store: Store) -> tuple[Log, Any]:
    log = Log(store, whole=True)
    return log, history(log.refresh())


# What the operations begin with.


def two(folder: Path) -> None:
    """A run with the checkpoints 1 and 2, and its owner."""
    store = LocalStore(folder / "run")
    store.put(RUN_KEY, canonical_json(RUN))
    owner = claimed(store)
    for step in (1, 2):
        save(store, owner, Solo(), state(step), step=step)


def three(folder: Path) -> None:
    """And one of step 3."""
    two(folder)
    store = LocalStore(folder / "run")
    save(store, reopened(store), Solo(), state(3), step=3)


def with_leftovers(folder: Path) -> None:
    """Also: 1 is retired and not removed, and an attempt of the last owner never committed."""
    three(folder)
    store = LocalStore(folder / "run")
    owner = reopened(store)
    first = history(owner.records).live[0]
    owner.append("RETIRE", lambda _: {"checkpoints": [first.index]})
    for name in ("r000-p00.safetensors", "manifest.json"):
        store.put(f"checkpoints/g0001/s00000005-{'a' * 12}/{name}", b"never committed")
    claimed(store)


def with_a_tier(folder: Path) -> None:
    """Also: the last owner has left a snapshot of step 4 on this host, and another one begins."""
    three(folder)
    store, tier = LocalStore(folder / "run"), LocalStore(folder / "tier")
    owner = reopened(store)
    mine = claim_tier(tier, owner.generation)
    save(tier, mine, Solo(), for_tier(state(MINE), tier_context(history(owner.records))), step=MINE)
    claimed(store)


# The operations.


def claiming(places: Places) -> Callable[[], object]:
    store = places.store("run")
    return lambda: claimed(store)


def claiming_after_a_wait(places: Places) -> Callable[[], object]:
    """The owner is this very process, which is not gone, and does not beat."""
    store, now = places.store("run"), [0.0]

    def sleep(seconds: float) -> None:
        now[0] += 4.0

    def act() -> object:
        log = Log(store, sleep=lambda seconds: None)
        return claim_run(store, log, body={}, take_over=False, clock=lambda: now[0], sleep=sleep)

    return act


def saved_on(
    places: Places, store: Store, owner: Incarnation | None, group: Group
) -> Checkpoint | None:
    """As a training loop does it; when a save fails, training goes on to the next one."""
    for _ in range(2):
        with Saver(store, owner, group) as saver:
            saver.begin(state(MINE), step=MINE)
            saver.wait_for_copy()
            places.trained.set()
            step = saver.finish()
            if saver.newest is not None:
                places.acknowledged.append(saver.newest.index)
            if step is not None:
                return saver.newest
    raise AssertionError("a store that works again was not used")


def saving(places: Places) -> Callable[[], object]:
    store = places.store("run")
    owner = reopened(store)
    return lambda: saved_on(places, store, owner, Solo())


def saving_on_two(places: Places) -> Callable[[], object]:
    """Two ranks, each with a store of its own. When one dies, the other's collectives fail."""
    stores = [places.store(f"run:{rank}") for rank in range(2)]
    owner = reopened(stores[0])

    def act() -> object:
        slots: list[Any] = [None] * 2
        barrier = threading.Barrier(2)
        outcomes: list[Outcome] = [None] * 2

        def one(rank: int) -> None:
            group = ThreadGroup(rank, 2, slots, barrier)
            try:
                outcomes[rank] = saved_on(places, stores[rank], owner if rank == 0 else None, group)
            except (Exception, Crash) as error:
                outcomes[rank] = error
                if isinstance(error, Crash):
                    barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for outcome in outcomes:
            if isinstance(outcome, Crash):
                raise outcome
        if isinstance(outcomes[0], BaseException):
            raise outcomes[0]
        assert not isinstance(outcomes[1], BaseException), "both ranks go on, or neither"
        return outcomes[0]

    return act


def retiring(places: Places) -> Callable[[], object]:
    store = places.store("run")
    owner = reopened(store)
    return lambda: retire(store, owner, KEEP)


def sweeping(places: Places) -> Callable[[], object]:
    store = places.store("run")
    owner = reopened(store)
    return lambda: sweep(store, owner)


def pruning(places: Places) -> Callable[[], object]:
    store = places.store("run")
    return lambda: prune(
        store,
        Log(store, sleep=lambda seconds: None),
        keep_last=2,
        keep_every_steps=0,
        wall_clock=lambda: 0.0,
    )


def copying(places: Places) -> Callable[[], object]:
    source, destination = places.store("run"), places.store("copy")
    return lambda: copy_run(source, destination)


def adopting(places: Places) -> Callable[[], object]:
    tier, store = places.store("tier"), places.store("run")
    owner = reopened(store)
    return lambda: adopt(tier, store, owner)


# What others do meanwhile.


def another_claims(places: Places) -> None:
    claimed(places.plain("run"))


def another_goes_on(places: Places) -> None:
    """A whole restart, which saves."""
    store = places.plain("run")
    owner = claimed(store)
    restore(store, owner, Solo())
    sweep(store, owner)
    assert save(store, owner, Solo(), state(ANOTHERS), step=ANOTHERS) is not None


def the_owner_goes_on(places: Places) -> None:
    """Training beside an operator's command: a save, and what is then retired."""
    store = places.plain("run")
    owner = reopened(store)
    assert save(store, owner, Solo(), state(ANOTHERS), step=ANOTHERS) is not None
    retire(store, owner, KEEP)


def a_reader_pins(places: Places) -> None:
    """Somebody chooses the oldest, and reads it until the end."""
    store = places.plain("run")
    log = Log(store)
    held = places.held.enter_context(pinned(store, log, lambda past: past.live[0]))
    places.held.callback(lambda: load(store, held))
    load(store, held)


# What must be afterwards.


class Judge:
    """Restarts, and looks at everything."""

    def __init__(self, digests: Mapping[int, str]) -> None:
        self._digests = digests

    def run(self, places: Places, kind: Kind, outcome: Outcome) -> None:
        """Of an operation on a run: what it came to, and what a restart finds."""
        self._outcome(places, kind, outcome)
        _, begun = past_of(LocalStore(places.folder.parent / "start" / "run"))
        committed = [*(c.index for c in begun.checkpoints), *places.acknowledged]
        self.restarted(places.plain("run"), committed, torn=kind == "truncate")

    def owners(self, places: Places, kind: Kind, outcome: Outcome) -> None:
        """Also: who owned the run when another one claimed it is fenced, or was done before."""
        if kind in ("delay", "hang") and places.instant.operation is not None:
            stale = Incarnation(Log(store := places.plain("run")), first_claim(places))
            before = store.list("")
            with pytest.raises(FencedError):
                save(store, stale, Solo(), state(8), step=8)
            assert store.list("") == before, "a fenced process has written"
        self.run(places, kind, outcome)

    def adopted(self, places: Places, kind: Kind, outcome: Outcome) -> None:
        """Also: what the tier held is committed, or nothing is."""
        if isinstance(outcome, Checkpoint):
            places.acknowledged.append(outcome.index)
        self.owners(places, kind, outcome)

    def copied(self, places: Places, kind: Kind, outcome: Outcome) -> None:
        """Of a copy: no half run is a run, the same command goes on, and both places restart."""
        self._outcome(places, kind, outcome)
        source, copy = places.plain("run"), places.plain("copy")
        if RUN_KEY in copy.list(""):
            gone = without_a_pin(kind, places, outcome)
            assert self._live(copy, but=gone), "a copy that looks complete is"
        else:
            assert not isinstance(outcome, dict), "a copy that says that it is complete is"
        copy_run(source, copy)
        _, there = past_of(source)
        _, here = past_of(copy)
        assert here.checkpoints == there.checkpoints
        assert self._live(source) and self._live(copy)
        if isinstance(outcome, Crash):
            self.restarted(copy, [], torn=False)

    def restarted(self, store: Store, acknowledged: Sequence[int], *, torn: bool) -> None:
        """The next start restores the newest committed checkpoint, and saves."""
        _, before = past_of(store)
        assert len(before.live) >= 2
        assert set(acknowledged) <= {c.index for c in before.checkpoints}, "acknowledged, and lost"
        owner = claimed(store)
        loaded = restore(store, owner, Solo())
        assert loaded is not None
        assert loaded.checkpoint == before.live[-1], "the newest committed one was not restored"
        self._is_right(loaded.checkpoint, loaded.tensors)
        sweep(store, owner)
        saved = save(store, owner, Solo(), state(AFTER), step=AFTER)
        assert saved is not None and saved.generation == before.generation + 1

        log, after = past_of(store)
        assert [*(c.index for c in before.live), saved.index] == [c.index for c in after.live]
        assert len(self._live(store)) == len(after.live)
        assert torn or not log.damaged, f"records {log.damaged} are damaged"
        assert len(log.damaged) <= 1
        names = store.list("log/")
        assert names == [f"log/{n:010d}.json" for n in range(1, len(names) + 1)]
        assert_fenced(log.records)
        if not log.damaged:
            left = [a for a in attempts(store, after) if a.checkpoint is None]
            assert not left, "the sweep left what nobody needs"

    def _live(self, store: Store, but: Sequence[int] = ()) -> list[Checkpoint]:
        """Every live checkpoint, read and compared."""
        _, past = past_of(store)
        live = [c for c in past.live if c.index not in but]
        for checkpoint in live:
            self._is_right(checkpoint, load(store, checkpoint).tensors)
        return live

    def _is_right(self, checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> None:
        assert checkpoint.digest == self._digests[checkpoint.step]
        expected = state(checkpoint.step).tensors
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)

    def _outcome(self, places: Places, kind: Kind, outcome: Outcome) -> None:
        """A crash is one, and nothing else ends in an error that is not for people."""
        hit = places.instant.operation is not None
        crashes = hit and kind in ("crash before", "crash after", "truncate")
        assert isinstance(outcome, Crash) == crashes, f"ended with {outcome!r}"
        if isinstance(outcome, Exception):
            assert hit and isinstance(outcome, RangeFlowError), f"ended with {outcome!r}"


def without_a_pin(kind: Kind, places: Places, outcome: Outcome) -> list[int]:
    """What a copy has said that it could not copy, because the source took no pin for it."""
    operation = places.instant.operation
    if kind != "hang" or operation is None or not operation.key.startswith("pins/"):
        return []
    assert isinstance(outcome, dict)
    return [c["index"] for c in outcome["checkpoints"] if c["verdict"] == "damaged"]


def first_claim(places: Places) -> Record:
    """The claim of the incarnation that the operation belonged to."""
    claims = [r for r in past_of(places.plain("run"))[0].records if r.kind == "CLAIM"]
    (start, _) = past_of(LocalStore(places.folder.parent / "start" / "run"))
    generation = max(r.generation for r in start.records)
    return next(claim for claim in claims if claim.generation == generation)


def assert_fenced(records: Sequence[Record]) -> None:
    """Nothing of a lower generation stands after a CLAIM, and no generation is claimed twice."""
    claimed = 0
    for record in records:
        if record.kind == "CLAIM":
            assert record.generation > claimed
            claimed = record.generation
        else:
            assert record.generation in (0, claimed), f"{record.kind} of a fenced incarnation"


def case(name: str, judge: Judge) -> Case:
    """The case of that name."""
    torn: tuple[Kind, ...] = (*ALWAYS, "truncate")
    owners = {"start": three, "faulty": "run", "kinds": torn}
    owners |= {"check": judge.owners, "meanwhile": another_goes_on}
    run: dict[str, Any] = {**owners, "check": judge.run}
    copied = {**run, "check": judge.copied, "make": copying, "start": two}
    copied["meanwhile"] = the_owner_goes_on
    made: dict[str, dict[str, Any]] = {
        "claim": {**run, "make": claiming, "meanwhile": another_claims},
        "claim after a wait": {**run, "make": claiming_after_a_wait, "meanwhile": another_claims},
        "save": {**owners, "make": saving, "trains": True},
        "save on rank 0": {
            **owners,
            "make": saving_on_two,
            "trains": True,
            "faulty": "run:0",
        },
        "save on rank 1": {
            **owners,
            "make": saving_on_two,
            "trains": True,
            "faulty": "run:1",
        },
        "retire": {
            **owners,
            "make": retiring,
            "kinds": (*torn, "pin"),
            "pin": a_reader_pins,
        },
        "sweep": {
            **owners,
            "start": with_leftovers,
            "make": sweeping,
            "kinds": (*torn, "pin"),
            "pin": a_reader_pins,
        },
        "prune": {
            **run,
            "make": pruning,
            "meanwhile": the_owner_goes_on,
            "kinds": (*torn, "pin"),
            "pin": a_reader_pins,
        },
        "copy from": {**copied, "kinds": ALWAYS},
        "copy to": {**copied, "faulty": "copy"},
        "adopt": {**owners, "start": with_a_tier, "make": adopting, "check": judge.adopted},
        "adopt from": {
            **owners,
            "start": with_a_tier,
            "make": adopting,
            "check": judge.adopted,
            "faulty": "tier",
            "kinds": ALWAYS,
        },
    }
    return Case(name=name, **made[name])


FLOORS = {
    "claim": 60,
    "claim after a wait": 90,
    "save": 120,
    "save on rank 0": 85,
    "save on rank 1": 19,
    "retire": 70,
    "sweep": 50,
    "prune": 130,
    "copy from": 190,
    "copy to": 150,
    "adopt": 130,
    "adopt from": 40,
}
"""How many points there are at least, so that no exploration is empty without being noticed."""


@pytest.mark.parametrize("name", FLOORS)
def test_after_every_fault_at_every_operation_a_restart_has_the_newest_checkpoint(
    name: str,
    folder: Path,
    digests: dict[int, str],
    record_property: Callable[[str, object], None],
) -> None:
    points = explore(case(name, Judge(digests)), folder)
    record_property("points", points)
    print(f"{name}: {sum(points.values())} points: {points}")
    assert sum(points.values()) >= FLOORS[name]


# The controls: what the exploration must find.


def removed_before_retired(
    store: Store, incarnation: Incarnation, policy: RetentionConfig, **_: object
) -> None:
    """Retention in the wrong order."""
    past = history(incarnation.check())
    chosen = retention.victims(past, policy, set())
    for checkpoint in past.checkpoints:
        if checkpoint.index in chosen:
            for key in store.list(checkpoint.folder):
                store.delete(key)
    incarnation.append("RETIRE", lambda _: {"checkpoints": chosen})


def committed_before_stored(
    store: Store,
    incarnation: Incarnation,
    job: Job,
    manifest: Mapping[str, Any],
    attempt: str,
    around: Any,
) -> int:
    """A COMMIT of a manifest that is written next."""
    key, data = f"{attempt}/manifest.json", canonical_json(manifest)
    body = {name: manifest[name] for name in ("step", "digest", "parent", "healthy")}
    body |= {"manifest_key": key, "manifest_sha256": sha256_hex(data), "validation_loss": None}
    record = incarnation.append("COMMIT", lambda _: body)
    assert record is not None
    store.put(key, data)
    return record.index


def never_fenced(log: Log, records: Sequence[Record], claim: Record) -> None:
    """An append that does not look for a later CLAIM."""


def everything(store: Store, past: Any, pinned: set[int], **_: object) -> list[Any]:
    """A sweep of all attempts without a COMMIT, those of the owner too."""
    return [a for a in attempts(store, past) if a.checkpoint is None or a.checkpoint.retired]


MUTANTS: dict[str, tuple[str, str, object, str]] = {
    "objects go before the RETIRE": (
        "retire",
        "tests.test_crash_points.retire",
        removed_before_retired,
        "retire: crash .*manifest.json is missing",
    ),
    "the COMMIT comes before the manifest": (
        "save",
        "checkpointing.write._commit",
        committed_before_stored,
        "save: crash .*the newest committed one was not restored",
    ),
    "nobody looks for pins": (
        "retire",
        "checkpointing.retention.pinned_checkpoints",
        lambda store: set(),
        "retire: pin .* is missing",
    ),
    "nobody looks for pins when pruning": (
        "prune",
        "checkpointing.pruning.pinned_checkpoints",
        lambda store, wall_clock: set(),
        "prune: pin .* is missing",
    ),
    "nobody looks for a later CLAIM": (
        "save",
        "checkpointing.incarnation._refuse_if_stale",
        never_fenced,
        "save: (delay|hang) ",
    ),
    "a lost response is a failure": (
        "save",
        "storage.log.Log.holds",
        lambda log, record: False,
        "save: ",
    ),
    "the sweep takes what the owner writes": (
        "sweep",
        "checkpointing.retention.unneeded",
        everything,
        "sweep: (delay|hang) .* ",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_is_done_in_the_wrong_order_is_found(
    mutant: str, folder: Path, digests: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, place, wrong, message = MUTANTS[mutant]
    judged = case(name, Judge(digests))
    judged.start(folder / "start")
    monkeypatch.setattr(place, wrong)
    with pytest.raises(Violation, match=message):
        explore(judged, folder)


def test_there_are_a_thousand_points() -> None:
    assert sum(FLOORS.values()) >= 1000
