"""What must hold in the model. Each is asked of a state that differs from the one before it."""

from collections import Counter
from collections.abc import Iterator

from tests.protocol_model import Meaning, Process, Scenario, State, Step, is_whole
from tests.protocol_moves import Protocol


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
    if not all(is_whole(state, c) for c in past.live):
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
