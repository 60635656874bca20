"""What each process of the model may do next."""

from collections.abc import Callable, Iterator

from tests.protocol_model import (
    Commit,
    Entry,
    Key,
    Meaning,
    Process,
    Rules,
    Scenario,
    State,
    Step,
    Thing,
    is_whole,
    meaning,
    victim_slots,
)


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
    if is_whole(state, me.chosen):
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
