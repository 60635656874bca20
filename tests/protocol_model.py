"""An explicit-state model of the checkpoint protocol: what the store holds, and who takes part.

It shares no code with the product. A state is what the store holds and where every process stands;
a rule (`protocol_moves`) makes one process do one operation on the store. Stopped and woken
processes are those that others overtake; a killed one never goes on. `protocol_search` tries every
order, from the starts in `protocol_scenarios`, and asks `protocol_invariants` of every state.

Covers: writers (claim, restore, save, retain), a sweep beside its writer's saves, a reader, an
operator, kills at every operation, lost requests, lost and delayed responses, torn records.
Does not cover: time (any wait may be over at any moment), bytes that rot, several objects' sizes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

KEEP_LAST = 1


class Key(NamedTuple):
    """Where an attempt's objects lie: unique per generation, step, attempt."""

    generation: int
    step: int
    nonce: str


class Entry(NamedTuple):
    """One slot of the log. `writer` and `content` are known to the model alone.

    `whole` is False while the record is being created, or was left torn.
    """

    kind: str
    generation: int
    nonce: str
    writer: str
    key: Key | None = None
    content: str = ""
    parent: int = 0
    targets: tuple[int, ...] = ()
    voids: tuple[int, ...] = ()
    whole: bool = True

    def bytes(self) -> tuple[object, ...]:
        """What the store holds of it, without who wrote it."""
        return self._replace(writer="", whole=True)


class Thing(NamedTuple):
    """One stored object: `part` is data or manifest, `content` the attempt that wrote it."""

    key: Key
    part: str
    content: str


class Commit(NamedTuple):
    """A COMMIT that counts."""

    slot: int
    generation: int
    key: Key
    content: str
    parent: int
    retired: bool = False
    quarantined: bool = False
    verified: bool = False

    @property
    def live(self) -> bool:
        return not self.retired and not self.quarantined


class Meaning(NamedTuple):
    """What a log means."""

    generation: int
    commits: tuple[Commit, ...]
    void: frozenset[int]

    @property
    def live(self) -> tuple[Commit, ...]:
        return tuple(c for c in self.commits if c.live)


class Process(NamedTuple):
    """Where one process stands. What it need not remember is at its default: fewer states."""

    name: str
    at: str
    generation: int = 0
    claim: int = 0
    left: int = 0
    parent: int = 0
    key: Key | None = None
    draft: Entry | None = None
    slot: int = 0
    pins: frozenset[int] = frozenset()
    keep: frozenset[Key] = frozenset()
    chosen: Commit | None = None
    targets: tuple[Thing, ...] = ()


class State(NamedTuple):
    """The store, the processes, and what they acknowledged: (slot, writer, kind)."""

    log: tuple[Entry, ...]
    things: frozenset[Thing]
    pins: frozenset[tuple[str, int]]
    processes: tuple[Process, ...]
    acknowledged: frozenset[tuple[int, str, str]] = frozenset()
    delayed: frozenset[tuple[int, Entry]] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """The protocol, and one flag for each way of getting it wrong."""

    assumes_written: bool = False
    """After a lost response: goes on without reading the slot."""
    assumes_lost: bool = False
    """After a lost response: appends again without reading the slot."""
    appends_again: bool = False
    """After a lost request: appends again, while the lost one may still arrive."""
    no_nonce: bool = False
    no_retire_record: bool = False
    step_named_keys: bool = False
    fence_before_write: bool = False
    """Looks for a later CLAIM when a save begins, not for every slot it tries."""
    no_pin: bool = False
    no_second_look: bool = False
    pins_before_retire: bool = False
    """Whoever deletes believes the pins that it listed before its RETIRE."""
    sweeps_all_not_live: bool = False
    sweeps_any_generation: bool = False
    sweeps_quarantined: bool = False
    no_sweep_pins: bool = False
    """The sweep does not ask whether somebody reads what was retired."""
    retires_newest: bool = False
    retires_parent: bool = False
    operator_fences: bool = False
    verified_unretires: bool = False
    acknowledges_without_look: bool = False
    """Where creation is not atomic: acknowledges what it wrote without looking for a successor."""
    acknowledges_beside_torn: bool = False
    """Where creation is not atomic: takes a successor that is still being written for none."""
    voids_what_was_torn: bool = False
    """Voids what it once found torn, without judging it again."""
    keeps_decision_after_wait: bool = False
    """Judges a torn record again, and appends what it had decided before that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """Who takes part, from which store on, and what can go wrong."""

    start: State
    faults: bool = False
    """Requests and responses get lost."""
    delays: bool = False
    """A request that its sender gave up arrives later."""
    torn: bool = False
    """Creation is not atomic."""
    restores: bool = False
    """Writers read the checkpoint they go on from, and quarantine it when it is not whole."""
    retains: bool = True
    operator: tuple[str, ...] = ()
    """The records an operator may append."""


class Step(NamedTuple):
    """One transition: the process, the rule, and the state after it."""

    process: str
    rule: str
    after: State


@lru_cache(maxsize=200_000)
def meaning(
    log: tuple[Entry, ...], operator_fences: bool = False, verified_unretires: bool = False
) -> Meaning:
    """The fold of a log. A void record does not void; one that is not whole says nothing."""
    void: set[int] = set()
    for slot in range(len(log), 0, -1):
        if log[slot - 1].whole and slot not in void:
            void |= set(log[slot - 1].voids)
    generation = 0
    commits: dict[int, Commit] = {}
    for slot, entry in enumerate(log, start=1):
        if not entry.whole or slot in void:
            continue
        if entry.kind == "CLAIM":
            generation = max(generation, entry.generation)
            continue
        generation = max(generation, entry.generation)
        if operator_fences and entry.generation == 0:
            generation += 1
        if entry.generation not in (0, generation):
            continue
        if entry.kind == "COMMIT":
            assert entry.key is not None
            commits[slot] = Commit(
                slot, entry.generation, entry.key, entry.content, entry.parent or 0
            )
        elif entry.kind in ("RETIRE", "QUARANTINE", "VERIFIED"):
            for target in entry.targets:
                if target in commits:
                    commits[target] = _marked(commits[target], entry.kind, verified_unretires)
    return Meaning(generation, tuple(commits.values()), frozenset(void))


def _marked(commit: Commit, kind: str, verified_unretires: bool) -> Commit:
    if kind == "RETIRE":
        return commit._replace(retired=True)
    if kind == "QUARANTINE":
        return commit._replace(quarantined=True)
    retired = commit.retired and not verified_unretires
    return commit._replace(quarantined=False, verified=True, retired=retired)


def victim_slots(past: Meaning, pinned: Iterable[int], rules: Rules) -> tuple[int, ...]:
    """What retention retires: all live ones but the newest, its parent, and the pinned."""
    live = past.live
    if not live:
        return ()
    kept = set(pinned)
    if not rules.retires_newest:
        kept |= {c.slot for c in live[-KEEP_LAST:]}
    if not rules.retires_parent:
        kept.add(live[-1].parent)
    return tuple(c.slot for c in live if c.slot not in kept)


def is_whole(state: State, commit: Commit) -> bool:
    parts = ("data", "manifest")
    return all(Thing(commit.key, part, commit.content) in state.things for part in parts)
