"""The starts from which the model is explored."""

from collections.abc import Iterable

from tests.protocol_model import Entry, Key, Process, Scenario, State, Thing


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
