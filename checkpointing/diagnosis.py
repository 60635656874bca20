"""What is wrong with a run, or with the place where one shall be, and what to do about it."""

import time
from collections.abc import Callable, Iterator

from checkpointing.history import Checkpoint, History, history
from checkpointing.liveness import judge
from checkpointing.naming import RUN_KEY, read_run
from checkpointing.pins import all_pins, ended
from checkpointing.pruning import sizes
from checkpointing.retention import unneeded
from checkpointing.verification import damaged_unnoticed
from storage.display import numbers, plain, size
from storage.errors import ConfigurationError, IntegrityError, RangeFlowError
from storage.log import Log
from storage.probe import Finding, examine
from storage.store import Store


def diagnose(
    store: Store,
    *,
    examined: Callable[[Store], list[Finding]] = examine,
    wall_clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Finding]:
    """Findings about the store and, unless the place is empty, about the run in it.

    Reads no checkpoint: `verify` does. Takes two beat intervals where only the heartbeats can tell
    whether the owner is alive. A store that fails is a finding.
    """
    found: list[Finding] = []
    try:
        found += examined(store)
        keys = [key for key in store.list("") if not key.startswith("probe/")]
        if not keys:
            found.append(_well("run", "none here yet: the place is empty"))
            return found
        if RUN_KEY not in keys and any(key.startswith("log/") for key in keys):
            found.append(
                _ill(
                    RUN_KEY,
                    "missing beside a log: this is an unfinished copy (give the same `python -m "
                    "checkpointing.runs copy` again), or somebody deleted it (put back a copy)",
                )
            )
            return found
        run = read_run(store)
        found.append(_well(RUN_KEY, f"readable, run {run['run']}"))
        log = Log(store, whole=True)
        past = history(log.refresh())
        found.append(_log(log))
        found += _checkpoints(store, log, past)
        found.append(_leftovers(store, log, past))
        found.append(_leases(store, wall_clock()))
        found.append(_owner(store, past, sleep))
    except ConfigurationError as error:
        found.append(_ill(RUN_KEY, str(error)))
    except RangeFlowError as error:
        found.append(_ill("store", f"{error}; try again, and look at the network and permissions"))
    return found


def _well(name: str, detail: str) -> Finding:
    return Finding(name=name, ok=True, detail=detail)


def _ill(name: str, detail: str) -> Finding:
    return Finding(name=name, ok=False, detail=detail)


def _log(log: Log) -> Finding:
    bad = damaged_unnoticed(log)
    if bad:
        return _ill(
            "log",
            f"records {numbers(bad)} are damaged or missing and are left out; put back "
            "log/*.json of these numbers from a copy, because what they said is not known",
        )
    voided = len(log.damaged)
    also = f", {voided} torn and voided" if voided else ""
    return _well("log", f"{len(log.records)} records{also}")


def _checkpoints(store: Store, log: Log, past: History) -> Iterator[Finding]:
    live, steps = past.live, [c.step for c in past.live]
    if not past.checkpoints:
        yield _well("checkpoints", "none yet")
    elif not live:
        yield _ill(
            "checkpoints",
            "none is live, so nothing can be restored; `python -m checkpointing.runs verify RUN "
            "--record` takes out of quarantine what is whole",
        )
    else:
        verified = [c.step for c in live if c.verified]
        told = f"verified: {numbers(verified)}" if verified else "none read back and verified yet"
        yield _well("checkpoints", f"live at steps {numbers(steps)}; {told}")
    for checkpoint in live:
        missing = _missing(store, checkpoint)
        if missing and checkpoint in history(log.refresh()).live:  # not retired meanwhile
            yield _ill(
                f"step {checkpoint.step}",
                f"{missing}; put it back from a copy of the run (`runs copy`), or leave it: a "
                "restore steps back to the checkpoint before",
            )
    held = [c.step for c in past.checkpoints if c.quarantined and not c.retired]
    if held:
        yield _ill(
            "quarantine",
            f"steps {numbers(held)} were read damaged; look for the cause (disk, memory, network), "
            "then `python -m checkpointing.runs verify RUN --record` lifts what is whole",
        )


def _missing(store: Store, checkpoint: Checkpoint) -> str:
    """The first object of a live checkpoint that is missing or has another size; "" for none."""
    from checkpointing.load import read_manifest  # torch takes seconds, and others need none of it

    try:
        objects = read_manifest(store, checkpoint)["objects"]
        for key, entry in objects.items():
            found = store.stat(key).size_bytes
            if found != entry["size_bytes"]:
                return f"{key} has {found} bytes, expected {entry['size_bytes']}"
    except IntegrityError as error:
        return str(error)
    except FileNotFoundError:
        return f"{key} is missing"
    return ""


def _leftovers(store: Store, log: Log, past: History) -> Finding:
    """Objects that no checkpoint needs, as `prune` sees them."""
    held = {pin.checkpoint for pin in all_pins(store)}
    found = unneeded(store, past, held, damaged=bool(log.damaged))
    keys = [key for attempt in found for key in attempt.keys]
    if not keys:
        return _well("leftovers", "no objects that no checkpoint needs")
    orphans = sum(attempt.checkpoint is None for attempt in found)
    return _ill(
        "leftovers",
        f"{len(keys)} objects, {size(sum(sizes(store, keys)))}, of {orphans} saves that never "
        f"committed and {len(found) - orphans} retired checkpoints; the next start removes them, "
        "or `python -m checkpointing.runs prune RUN`",
    )


def _leases(store: Store, now: float) -> Finding:
    pins = all_pins(store)
    over = [pin for pin in pins if ended(pin, now)]
    if over:
        return _ill(
            "pins",
            f"{len(over)} leases of readers have ended and are left over; "
            "`python -m checkpointing.runs prune RUN` removes them",
        )
    for_ever = sum(pin.until is None for pin in pins)
    return _well("pins", f"{for_ever} for ever, {len(pins) - for_ever} of readers")


def _owner(store: Store, past: History, sleep: Callable[[float], None]) -> Finding:
    """Who trains the run now. That nobody does is no fault: the same command goes on."""
    found = judge(store, past, sleep)
    who = f"generation {found.generation} on host {plain(found.host)}"
    where = "no heartbeat seen"
    if found.beat:
        where = f"phase {plain(found.beat.get('phase'))}, step {plain(found.beat.get('step'))}"
    where_from = ", a process of this machine" if found.here else ""
    said = {
        "never claimed": "never claimed",
        "complete": f"none: the run is complete; the last was {who}",
        "gone": f"gone: {who}, last: {where}; start again to go on",
        "alive": f"alive{where_from}: {who}, {where}",
        "silent": f"silent: {who}, last: {where}; a new start takes over",
    }
    return _well("owner", said[found.state])
