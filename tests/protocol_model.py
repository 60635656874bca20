"""An explicit-state model of the checkpoint protocol, and the explorer that visits all its states.

It shares no code with the product. A state is what the store holds and where every process stands;
a rule makes one process do one operation on the store. Stopped and woken processes are those that
others overtake; a killed one never goes on. `explore` tries every order.

Covers: writers (claim, restore, save, retain), a sweep beside its writer's saves, a reader, an
operator, kills at every operation, lost requests, lost and delayed responses, torn records.
Does not cover: time (any wait may be over at any moment), bytes that rot, several objects' sizes.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
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


class Protocol:
    """The transition rules of one scenario."""

    def __init__(self, scenario: Scenario, rules: Rules | None = None) -> None:
        self.scenario = scenario
        self.rules = rules or Rules()

    def past(self, state: State) -> Meaning:
        return meaning(state.log, self.rules.operator_fences, self.rules.verified_unretires)

    def steps(self, state: State) -> Iterator[Step]:
        """Everything that can happen next."""
        for number, process in enumerate(state.processes):
            role = _ROLES.get(process.name[0])
            assert role is not None, process.name
            if process.at in _ENDS:
                continue
            for rule, after, there in role(self, state, process):
                processes = (*state.processes[:number], there, *state.processes[number + 1 :])
                yield Step(process.name, rule, after._replace(processes=processes))
            if process.at != "idle":
                there = Process(process.name, "dead")
                processes = (*state.processes[:number], there, *state.processes[number + 1 :])
                yield Step(process.name, "killed", state._replace(processes=processes))
        for slot, entry in state.delayed:
            after = state._replace(delayed=state.delayed - {(slot, entry)})
            if len(state.log) == slot - 1:
                after = after._replace(log=(*state.log, entry))
            yield Step(entry.writer, "a delayed request arrives", after)


Moves = Iterator[tuple[str, State, Process]]


# A writer: one start of the training program.


def _writer(protocol: Protocol, state: State, me: Process) -> Moves:
    at = me.at
    if at in ("put", "taken", "back", "finish", "look"):
        yield from _appending(protocol, state, me)
    elif at in ("idle", "claim"):
        yield from _claim(protocol, state, me)
    elif at == "restore":
        yield from _choose_for_restore(protocol, state, me)
    elif at == "read":
        yield from _read_for_restore(state, me)
    elif at == "begin":
        yield from _begin(protocol, state, me)
    elif at == "upload":
        yield "uploads an object", _put(state, me, "data"), me._replace(at="manifest")
    elif at == "manifest":
        yield "writes the manifest", _put(state, me, "manifest"), me._replace(at="commit")
    elif at == "commit":
        yield from _commit(protocol, state, me)
    elif at == "quarantine":
        yield from _quarantine(protocol, state, me)
    elif at == "pins":
        pins = frozenset(slot for _, slot in state.pins)
        yield "lists pins before retiring", state, me._replace(at="retire", pins=pins)
    elif at == "retire":
        yield from _retire(protocol, state, me)
    else:
        yield from _deleting(protocol, state, me, then="begin")


def _claim(protocol: Protocol, state: State, me: Process) -> Moves:
    generation = protocol.past(state).generation + 1
    nonce = "" if protocol.rules.no_nonce else me.name
    draft = Entry("CLAIM", generation, nonce, me.name)
    yield "decides to claim", state, _drafted(state, me, draft)


def _choose_for_restore(protocol: Protocol, state: State, me: Process) -> Moves:
    past = protocol.past(state)
    if past.generation != me.generation:
        yield "is fenced", state, _ended(me, "fenced")
    elif past.live:
        yield "chooses what to restore", state, me._replace(at="read", chosen=past.live[-1])
    else:
        yield "starts from nothing", state, me._replace(at="begin")


def _read_for_restore(state: State, me: Process) -> Moves:
    assert me.chosen is not None
    if _is_whole(state, me.chosen):
        there = me._replace(at="begin", parent=me.chosen.slot, chosen=None)
        yield "restores", state, there
    else:
        yield "finds a checkpoint damaged", state, me._replace(at="quarantine")


def _begin(protocol: Protocol, state: State, me: Process) -> Moves:
    past = protocol.past(state)
    if past.generation != me.generation:
        yield "is fenced", state, _ended(me, "fenced")
    elif not me.left:
        yield "has nothing left to do", state, _ended(me, "done")
    else:
        step = next((c.key.step for c in past.commits if c.slot == me.parent), 0) + 1
        key = Key(me.generation, step, f"{me.name}{me.left}")
        if protocol.rules.step_named_keys:
            key = Key(0, step, "")
        there = me._replace(at="upload", key=key)
        yield "begins a save", state, there


def _commit(protocol: Protocol, state: State, me: Process) -> Moves:
    if _refused(protocol, state, me):
        yield "is fenced", state, _ended(me, "fenced")
        return
    content = f"{me.name}{me.left}"
    nonce = "" if protocol.rules.no_nonce else content
    draft = Entry("COMMIT", me.generation, nonce, me.name, me.key, content, me.parent)
    yield "decides to commit", state, _drafted(state, me, draft)


def _quarantine(protocol: Protocol, state: State, me: Process) -> Moves:
    assert me.chosen is not None
    if _refused(protocol, state, me):
        yield "is fenced", state, _ended(me, "fenced")
        return
    draft = Entry("QUARANTINE", me.generation, f"{me.name}q", me.name, targets=(me.chosen.slot,))
    yield "decides to quarantine", state, _drafted(state, me, draft)


def _retire(protocol: Protocol, state: State, me: Process) -> Moves:
    if _refused(protocol, state, me):
        yield "is fenced", state, _ended(me, "fenced")
        return
    targets = victim_slots(protocol.past(state), me.pins, protocol.rules)
    if not targets:
        there = me._replace(at="begin", pins=frozenset())
        yield "has nothing to retire", state, there
        return
    nonce = "" if protocol.rules.no_nonce else f"{me.name}{me.left}r"
    draft = Entry("RETIRE", me.generation, nonce, me.name, targets=targets)
    if protocol.rules.no_retire_record:
        yield "skips the RETIRE", state, me._replace(at="unpinned", draft=draft)
    else:
        yield "decides to retire", state, _drafted(state, me, draft)


def _refused(protocol: Protocol, state: State, me: Process) -> bool:
    if protocol.rules.fence_before_write:
        return False
    return protocol.past(state).generation != me.generation


# Appending: the same for all who write to the log.


def _drafted(state: State, me: Process, draft: Entry) -> Process:
    torn = []
    for slot in range(len(state.log), 0, -1):
        if state.log[slot - 1].whole:
            break
        torn.append(slot)
    draft = draft._replace(voids=tuple(sorted(torn)))
    if draft.nonce and (len(state.log) + 1, draft) in state.delayed:
        draft = draft._replace(nonce=f"{draft.nonce}'")
    return me._replace(at="put", draft=draft, slot=len(state.log) + 1)


def _appending(protocol: Protocol, state: State, me: Process) -> Moves:
    draft, rules, scenario = me.draft, protocol.rules, protocol.scenario
    assert draft is not None
    if me.at == "put" and scenario.torn:
        yield from _create(protocol, state, me, draft)
    elif me.at == "put":
        yield from _send(protocol, state, me, draft)
    elif me.at in ("taken", "back"):
        found = state.log[me.slot - 1] if len(state.log) >= me.slot else None
        if found is not None and found.bytes() == draft.bytes():
            yield "finds its own record", *_acknowledge(protocol, state, me)
        elif me.at == "taken" or rules.appends_again:
            yield "decides anew", state, _anew(me)
        else:
            yield "gives up", state, _gave_up(me)
    elif me.at == "finish":
        log = list(state.log)
        log[me.slot - 1] = log[me.slot - 1]._replace(whole=True)
        there = me._replace(at="look")
        after = state._replace(log=tuple(log))
        if rules.acknowledges_without_look:
            yield "completes its record", *_acknowledge(protocol, after, there)
        else:
            yield "completes its record", after, there
    elif _unsettled(protocol, state, me.slot) and not rules.acknowledges_beside_torn:
        return  # until that one is complete, or void
    elif me.slot in protocol.past(state).void:
        yield "finds its record void", state, _anew(me)
    else:
        yield f"appends {draft.kind}", *_acknowledge(protocol, state, me)


def _send(protocol: Protocol, state: State, me: Process, draft: Entry) -> Moves:
    """Creation that is atomic: the store does it or not, and answers or not."""
    rules = protocol.rules
    if len(state.log) >= me.slot:
        yield "finds the slot taken", state, me._replace(at="taken")
        return
    written = state._replace(log=(*state.log, draft))
    yield f"appends {draft.kind}", *_acknowledge(protocol, written, me)
    if not protocol.scenario.faults:
        return
    for rule, after in (("loses the response", written), ("loses the request", state)):
        if rules.assumes_written:
            yield rule, *_acknowledge(protocol, after, me)
        elif rules.assumes_lost:
            yield rule, after, _anew(me)
        else:
            yield rule, after, me._replace(at="back")
    if protocol.scenario.delays:
        late = state._replace(delayed=state.delayed | {(me.slot, draft)})
        yield "waits for a response in vain", late, me._replace(at="back")


def _create(protocol: Protocol, state: State, me: Process, draft: Entry) -> Moves:
    """Creation in two operations. The second look at what it voids is one with the first."""
    rules = protocol.rules
    if len(state.log) >= me.slot:
        yield "finds the slot taken", state, _anew(me)
        return
    completed = any(state.log[slot - 1].whole for slot in draft.voids)
    if completed and not rules.voids_what_was_torn and not rules.keeps_decision_after_wait:
        yield "finds a torn record completed", state, _anew(me)
        return
    if completed and rules.keeps_decision_after_wait:
        me = _drafted(state, me, draft)
        assert me.draft is not None
        draft = me.draft
    created = state._replace(log=(*state.log, draft._replace(whole=False)))
    rule = "voids a torn record" if draft.voids else "creates its record"
    yield rule, created, me._replace(at="finish")


def _unsettled(protocol: Protocol, state: State, slot: int) -> bool:
    """Whether a later record is still being written that may yet void this one."""
    void = protocol.past(state).void
    return any(
        not entry.whole and later not in void
        for later, entry in enumerate(state.log[slot:], start=slot + 1)
    )


def _anew(me: Process) -> Process:
    """Reads the log again, and drafts anew: a new nonce."""
    assert me.draft is not None
    if me.name[0] == "O":
        return Process(me.name, "ask", left=me.left)
    return me._replace(at=me.draft.kind.lower(), draft=None, slot=0)


def _gave_up(me: Process) -> Process:
    """What was not written, as far as its writer can see, is given up and not tried again."""
    assert me.draft is not None
    if me.name[0] == "W" and me.draft.kind in ("COMMIT", "RETIRE"):
        left = me.left - (me.draft.kind == "COMMIT")
        none: frozenset[int] = frozenset()
        return me._replace(at="begin", draft=None, slot=0, key=None, pins=none, left=left)
    return _ended(me, "dead")


def _acknowledge(protocol: Protocol, state: State, me: Process) -> tuple[State, Process]:
    """The append returned: the process goes on to what follows."""
    draft = me.draft
    assert draft is not None
    noted = state.acknowledged | {(me.slot, me.name, draft.kind)}
    after = state._replace(acknowledged=noted)
    bare = me._replace(draft=None, slot=0)
    if me.name[0] == "O":
        if draft.kind == "RETIRE":
            return after, me._replace(at="unpinned", slot=0, left=me.left - 1)
        return after, bare._replace(at="ask", left=me.left - 1)
    if draft.kind == "CLAIM":
        at = "restore" if protocol.scenario.restores else "begin"
        live = protocol.past(state._replace(log=state.log[: me.slot])).live
        parent = live[-1].slot if live and not protocol.scenario.restores else 0
        there = bare._replace(at=at, generation=draft.generation, claim=me.slot, parent=parent)
        return after, there
    if draft.kind == "COMMIT":
        at = "pins" if protocol.scenario.retains else "begin"
        return after, bare._replace(at=at, key=None, left=me.left - 1)
    if draft.kind == "QUARANTINE":
        return after, bare._replace(at="restore", chosen=None)
    return after, me._replace(at="unpinned", slot=0)


# Deleting what was retired, by its retirer.


def _deleting(protocol: Protocol, state: State, me: Process, *, then: str) -> Moves:
    if me.at == "unpinned":
        assert me.draft is not None
        pins = frozenset(slot for _, slot in state.pins)
        if protocol.rules.pins_before_retire:
            pins = me.pins
        keys = {
            c.key
            for c in protocol.past(state).commits
            if c.slot in me.draft.targets and c.slot not in pins
        }
        targets = tuple(sorted(thing for thing in state.things if thing.key in keys))
        there = me._replace(at="delete", draft=None, pins=frozenset(), targets=targets)
        yield "lists pins before deleting", state, there
    elif me.targets:
        after, there = _delete_one(state, me)
        yield "deletes a retired object", after, there
    else:
        yield "has deleted", state, me._replace(at=then)


def _delete_one(state: State, me: Process) -> tuple[State, Process]:
    """Delete by key: whatever lies there now."""
    target = me.targets[0]
    gone = {t for t in state.things if (t.key, t.part) == (target.key, target.part)}
    return state._replace(things=state.things - gone), me._replace(targets=me.targets[1:])


# A sweep, beside the saves of the writer of the same letter.


def _sweep(protocol: Protocol, state: State, me: Process) -> Moves:
    rules = protocol.rules
    past = protocol.past(state)
    if me.at == "idle":
        owner = next(p for p in state.processes if p.name == f"W{me.name[1]}")
        if owner.generation == 0:
            return
        if past.generation != owner.generation:
            yield "is fenced", state, _ended(me, "fenced")
            return
        there = Process(me.name, "list pins", owner.generation, slot=len(state.log))
        yield "reads the log to sweep", state, there
    elif me.at == "list pins":
        pins = frozenset(slot for _, slot in state.pins)
        yield "lists pins to sweep", state, me._replace(at="list objects", pins=pins)
    elif me.at == "list objects":
        read = meaning(state.log[: me.slot], rules.operator_fences, rules.verified_unretires)
        commits = {c.key: c for c in read.commits}
        targets = tuple(
            sorted(t for t in state.things if _may_go(t, commits.get(t.key), me, rules))
        )
        there = Process(me.name, "delete", me.generation, targets=targets)
        yield "lists objects to sweep", state, there
    elif me.targets:
        after, there = _delete_one(state, me)
        yield "sweeps an object", after, there
    else:
        yield "has swept", state, _ended(me, "done")


def _may_go(thing: Thing, commit: Commit | None, me: Process, rules: Rules) -> bool:
    if rules.sweeps_all_not_live:
        return thing.key.generation < me.generation and (commit is None or not commit.live)
    if commit is None:
        return rules.sweeps_any_generation or thing.key.generation < me.generation
    if commit.quarantined:
        return rules.sweeps_quarantined
    return commit.retired and (rules.no_sweep_pins or commit.slot not in me.pins)


# A reader, of any live checkpoint.


def _reader(protocol: Protocol, state: State, me: Process) -> Moves:
    rules = protocol.rules
    if me.at in ("idle", "choose"):
        for commit in protocol.past(state).live:
            yield "chooses what to read", state, me._replace(at="pin", chosen=commit)
        return
    chosen = me.chosen
    assert chosen is not None
    pin = (me.name, chosen.slot)
    if me.at == "pin":
        after = state if rules.no_pin else state._replace(pins=state.pins | {pin})
        yield "pins", after, me._replace(at="data" if rules.no_second_look else "second look")
    elif me.at == "second look":
        now = {c.slot: c for c in protocol.past(state).commits}
        if chosen.slot in now and not now[chosen.slot].retired:
            yield "looks again", state, me._replace(at="manifest")
        else:
            yield "finds it retired meanwhile", state, me._replace(at="unpin to choose")
    elif me.at in ("manifest", "data"):
        if Thing(chosen.key, me.at, chosen.content) not in state.things:
            yield "misreads", state, me._replace(at="misread")
        else:
            then = "unpin" if me.at == "data" else "data"
            yield f"reads the {me.at}", state, me._replace(at=then)
    else:
        after = state._replace(pins=state.pins - {pin})
        if me.at == "unpin":
            yield "unpins", after, _ended(me, "done")
        else:
            yield "unpins", after, me._replace(at="choose", chosen=None)


# An operator, who fences nobody.


def _operator(protocol: Protocol, state: State, me: Process) -> Moves:
    if me.at in ("idle", "ask"):
        if not me.left:
            yield "has nothing left to do", state, _ended(me, "done")
            return
        for kind, targets in _wishes(protocol, state):
            draft = Entry(kind, 0, f"{me.name}{me.left}", me.name, targets=targets)
            yield f"asks for {kind}", state, _drafted(state, me, draft)
    elif me.at in ("unpinned", "delete"):
        yield from _deleting(protocol, state, me, then="ask")
    else:
        yield from _appending(protocol, state, me)


def _wishes(protocol: Protocol, state: State) -> Iterator[tuple[str, tuple[int, ...]]]:
    past = protocol.past(state)
    if "RETIRE" in protocol.scenario.operator:
        for slot in victim_slots(past, (), protocol.rules):
            yield "RETIRE", (slot,)
    for commit in past.commits:
        if "VERIFIED" in protocol.scenario.operator:
            yield "VERIFIED", (commit.slot,)
        if "QUARANTINE" in protocol.scenario.operator and commit.live:
            yield "QUARANTINE", (commit.slot,)


_ROLES: dict[str, Callable[[Protocol, State, Process], Moves]] = {
    "W": _writer,
    "S": _sweep,
    "R": _reader,
    "O": _operator,
}
_ENDS = ("dead", "done", "fenced", "misread")


def _ended(me: Process, at: str) -> Process:
    """What remains of a process that does nothing more. `claim` tells whom it was fenced by."""
    return Process(me.name, at, me.generation, me.claim)


def _put(state: State, me: Process, part: str) -> State:
    assert me.key is not None
    there = {t for t in state.things if (t.key, t.part) == (me.key, part)}
    thing = Thing(me.key, part, f"{me.name}{me.left}")
    return state._replace(things=(state.things - there) | {thing})


def _is_whole(state: State, commit: Commit) -> bool:
    parts = ("data", "manifest")
    return all(Thing(commit.key, part, commit.content) in state.things for part in parts)


# What must hold. Each is asked of a state that differs from the one before it.


def broken_by(protocol: Protocol, before: State, step: Step) -> Iterator[str]:
    """Names of the invariants that this step breaks, whatever state it leads to."""
    after = step.after
    if step.rule == "misreads":
        yield "a pinned reader finds its objects"
    if step.rule == "is fenced" and not _claimed_later(before, step):
        yield "only a later CLAIM fences"
    if step.rule == "sweeps an object" and _in_quarantine(protocol, before, step):
        yield "the sweep leaves what is in quarantine"
    if after.things is not before.things:
        keys = {(t.key, t.part): t.content for t in before.things}
        if any(keys.get((t.key, t.part), t.content) != t.content for t in after.things):
            yield "nothing is overwritten"
    if after.log is not before.log:
        for slot, entry in enumerate(before.log, start=1):
            if entry.whole and after.log[slot - 1] != entry:
                yield "nothing is overwritten"
        yield from _broken_retirement(protocol, before, after)


def broken_in(protocol: Protocol, state: State) -> Iterator[str]:
    """Names of the invariants that do not hold in this state."""
    past = protocol.past(state)
    yield from _broken_promises(past, state)
    if not all(_is_whole(state, c) for c in past.live):
        yield "a live checkpoint is whole"
    if len({c.key for c in past.commits}) != len(past.commits):
        yield "an attempt is committed once"
    quarantines = [e for e in state.log if e.kind == "QUARANTINE" and e.whole]
    if any(e.writer[0] == "W" for e in quarantines):
        yield "nothing whole is quarantined by a restore"
    if past.commits and not past.live and not quarantines:
        yield "the newest checkpoint is never retired, nor its parent"


def _claimed_later(before: State, step: Step) -> bool:
    fenced = next(p for p in step.after.processes if p.name == step.process)
    # A sweep that was not begun is fenced with its writer.
    owner = [p for p in before.processes if p.name == f"W{step.process[1]}"]
    generation = fenced.generation or owner[0].generation
    return any(e.kind == "CLAIM" and e.whole and e.generation > generation for e in before.log)


def _in_quarantine(protocol: Protocol, before: State, step: Step) -> bool:
    gone = {thing.key for thing in before.things - step.after.things}
    return any(c.quarantined and c.key in gone for c in protocol.past(before).commits)


def _broken_retirement(protocol: Protocol, before: State, after: State) -> Iterator[str]:
    for slot, entry in enumerate(after.log, start=1):
        seen = slot <= len(before.log) and before.log[slot - 1].whole
        if entry.kind == "RETIRE" and entry.whole and not seen:
            log = (*after.log[: slot - 1], entry._replace(targets=()))
            live = protocol.past(after._replace(log=log)).live
            if live and {live[-1].slot, live[-1].parent} & set(entry.targets):
                yield "the newest checkpoint is never retired, nor its parent"


def _broken_promises(past: Meaning, state: State) -> Iterator[str]:
    """What was acknowledged, of the state as it stands."""
    counted = {c.slot for c in past.commits}
    kept = {slot for slot, _, _ in state.acknowledged}
    owners: Counter[int] = Counter()
    for slot, writer, kind in state.acknowledged:
        entry = state.log[slot - 1] if slot <= len(state.log) else None
        if entry is None or entry.writer != writer:
            yield "what is acknowledged is in the log"
        elif slot in past.void:
            yield "an acknowledged record is never void"
        elif kind == "COMMIT" and slot not in counted:
            yield "an acknowledged COMMIT counts"
        if kind == "CLAIM" and entry is not None:
            owners[entry.generation] += 1
    if owners and max(owners.values()) > 1:
        yield "a generation has one owner"
    highest = 0
    for slot, entry in enumerate(state.log, start=1):
        if not entry.whole or slot in past.void:
            continue
        if entry.kind == "CLAIM":
            highest = max(highest, entry.generation)
        elif 0 < entry.generation < highest and (slot in counted or slot in kept):
            yield "a fenced record never counts and is never acknowledged"


def fresh_start(protocol: Protocol, state: State) -> bool:
    """Whether a new writer, alone with what the store holds, claims the run and restores."""
    past = protocol.past(state)
    newest = past.live[-1].slot if past.live else 0
    calm = Scenario(start=state, torn=protocol.scenario.torn, restores=True)
    alone = Protocol(calm, protocol.rules)
    state = State(state.log, state.things, state.pins, (Process("WX", "idle"),))
    for _ in range(10):
        (me,) = state.processes
        if me.at == "begin":
            return me.generation > past.generation and me.parent == newest
        first = next(alone.steps(state), None)
        if first is None:
            return False
        state = first.after
    return False


# The scenarios.


def committed(slot: int, *, parent: int = 0, writer: str = "WP") -> tuple[Entry, set[Thing]]:
    """A COMMIT of generation 1 in this slot, and its objects."""
    key = Key(1, slot, f"{writer}{slot}")
    entry = Entry("COMMIT", 1, key.nonce, writer, key, key.nonce, parent)
    return entry, {Thing(key, part, key.nonce) for part in ("data", "manifest")}


def begun(
    *processes: Process,
    commits: int,
    marks: Iterable[tuple[str, int]] = (),
    abandoned: bool = False,
) -> State:
    """A store that generation 1 left, or still owns when WP is among the processes."""
    log = [Entry("CLAIM", 1, "WP", "WP")]
    things: set[Thing] = set()
    for slot in range(2, 2 + commits):
        entry, stored = committed(slot)
        log.append(entry)
        things |= stored
    for kind, slot in marks:
        log.append(Entry(kind, 0, f"{kind}{slot}", "OP", targets=(slot,)))
    if abandoned:
        things.add(Thing(Key(1, 9, "WP9"), "data", "WP9"))
    return State(tuple(log), frozenset(things), frozenset(), processes)


def empty(*processes: Process) -> State:
    """A store that holds nothing."""
    return State((), frozenset(), frozenset(), processes)


def starter(letter: str, *, saves: int) -> Process:
    """A writer that has not begun."""
    return Process(f"W{letter}", "idle", left=saves)


def owner(*, saves: int) -> Process:
    """The writer of generation 1, about to save."""
    return Process("WP", "begin", generation=1, claim=1, left=saves)


_SWEEPS = (Process("SA", "idle"), Process("SB", "idle"))
_READER = Process("RR", "choose")
_MARKS = ("RETIRE", "VERIFIED", "QUARANTINE")


def _asking(count: int) -> Process:
    return Process("OO", "ask", left=count)


SCENARIOS = {
    # Three starters whose drafts differ by their nonces alone.
    "claims": Scenario(
        start=empty(starter("A", saves=1), starter("B", saves=1), starter("C", saves=0)),
        faults=True,
        retains=False,
    ),
    "two writers": Scenario(start=empty(starter("A", saves=2), starter("B", saves=2)), faults=True),
    "late requests": Scenario(
        start=empty(starter("A", saves=2), starter("B", saves=1)), faults=True, delays=True
    ),
    # One that reads what it goes on from may be overtaken twice, and find that retired.
    "restores": Scenario(
        start=begun(starter("A", saves=0), starter("B", saves=1), starter("C", saves=1), commits=1),
        restores=True,
    ),
    "reader": Scenario(
        start=begun(owner(saves=1), starter("A", saves=1), _READER, commits=2), faults=True
    ),
    "operator": Scenario(
        start=begun(owner(saves=1), starter("A", saves=1), _asking(1), commits=2),
        operator=_MARKS,
    ),
    "operator twice": Scenario(
        start=begun(starter("A", saves=1), _asking(2), commits=2),
        operator=_MARKS,
        faults=True,
        restores=True,
    ),
    "operator and reader": Scenario(
        start=begun(starter("A", saves=1), _READER, _asking(1), commits=2),
        operator=_MARKS,
        restores=True,
    ),
    "sweep": Scenario(
        start=begun(
            starter("A", saves=1), starter("B", saves=1), *_SWEEPS, commits=1, abandoned=True
        )
    ),
    "sweep and reader": Scenario(
        start=begun(
            owner(saves=1),
            starter("A", saves=0),
            _SWEEPS[0],
            _READER,
            commits=3,
            marks=(("QUARANTINE", 2),),
            abandoned=True,
        )
    ),
    "sweep, operator and reader": Scenario(
        start=begun(
            starter("A", saves=0),
            _SWEEPS[0],
            _READER,
            _asking(1),
            commits=3,
            marks=(("QUARANTINE", 2),),
            abandoned=True,
        ),
        operator=_MARKS,
    ),
    "torn records": Scenario(
        start=begun(owner(saves=1), starter("A", saves=1), _asking(1), commits=1),
        torn=True,
        retains=False,
        operator=("VERIFIED",),
    ),
}


# The explorer.


Reached = dict[State, tuple[State, str, str] | None]


class Trace(NamedTuple):
    """How a state was reached: (process, rule) from the start on, and the names that it breaks."""

    steps: tuple[tuple[str, str], ...]
    breaks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Explored:
    """What an exploration met. `violation` is one of the shortest; None when all states hold."""

    states: int
    transitions: int
    rules: Counter[str]
    violation: Trace | None
    reached: Reached

    def trace(self, state: State) -> tuple[tuple[str, str], ...]:
        """The shortest way to a state."""
        return _way(self.reached, state)


def explore(
    scenario: Scenario, rules: Rules | None = None, *, wanted: str | None = None
) -> Explored:
    """Visit every reachable state, breadth first; stop at the first that breaks an invariant.

    `wanted` names the only invariant to stop for.
    """
    protocol = Protocol(scenario, rules)
    reached: Reached = {scenario.start: None}
    waiting = deque([scenario.start])
    taken: Counter[str] = Counter()
    restartable: set[tuple[object, ...]] = set()
    violation: Trace | None = None
    while waiting and violation is None:
        state = waiting.popleft()
        for step in protocol.steps(state):
            taken[step.rule] += 1
            breaks = list(broken_by(protocol, state, step))
            if step.after not in reached:
                reached[step.after] = (state, step.process, step.rule)
                waiting.append(step.after)
                breaks += broken_in(protocol, step.after)
                place = (step.after.log, step.after.things)
                if not breaks and place not in restartable:
                    restartable.add(place)
                    if not fresh_start(protocol, step.after):
                        breaks = ["a fresh start claims and restores"]
            if breaks and (wanted is None or wanted in breaks):
                way = (*_way(reached, state), (step.process, step.rule))
                violation = Trace(way, tuple(dict.fromkeys(breaks)))
                break
    return Explored(
        states=len(reached),
        transitions=taken.total(),
        rules=taken,
        violation=violation,
        reached=reached,
    )


def _way(reached: Reached, state: State) -> tuple[tuple[str, str], ...]:
    steps = []
    while (came := reached[state]) is not None:
        state, process, rule = came
        steps.append((process, rule))
    return tuple(reversed(steps))
