"""The proof of a resume: steps that are made again, beside what the dead incarnation recorded.

Each heartbeat holds the newest steps of its incarnation: of each the digest of its samples, the
bits of its loss, and those of its gradient's norm. The next incarnation compares what it replays.
Every process does so, by itself, since all see the same: all stop at the same step, or none.

Covers: other samples, order, mixture or shard contents; another state after the restore; arithmetic
that gives other bits.
Does not cover: the seconds between the last heartbeat and a kill, which nobody recorded; what was
changed on purpose in between: identity, schedule, the plan from an edited step on.
"""

import base64
import logging
import math
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from checkpointing.beats import read_beat
from checkpointing.history import history
from data_service.recorded import plan_records, recorded_plan
from storage.errors import IntegrityError, StoreUnavailableError
from storage.log import Record, record_from_json
from storage.store import Store

logger = logging.getLogger(__name__)

FORMAT = 1
KEPT_STEPS = 1024
"""Newest steps in a heartbeat: 33 KB."""
MOST_GENERATIONS = 20
"""Heartbeats that a start reads at most, newest first."""

_STEP = struct.Struct("<8sdd")  # samples, loss, norm of the gradient


class Proof:
    """Compares each step with what was recorded of it, and records it.

    `recorded` is what `recorded_steps` found. With `stop`, the first difference is an error; else a
    warning. Only the `leader` logs and records.
    """

    def __init__(
        self, recorded: Mapping[str, Any], *, restored_step: int, stop: bool, leader: bool
    ) -> None:
        self._expected = {int(step): entry for step, entry in recorded["steps"].items()}
        self._all = len(self._expected)
        self._restored_step = restored_step
        self._stop = stop
        self._leader = leader
        self._difference: dict[str, Any] | None = None
        self._why_not = str(recorded["why_not"])
        self._lock = threading.Lock()
        self._first = 0
        self._steps: deque[bytes] = deque(maxlen=KEPT_STEPS)
        if leader and self._all:
            steps = sorted(self._expected)
            logger.info(
                "steps %d to %d were made before: %d of them will be compared with what was "
                "recorded of them",
                restored_step + 1,
                steps[-1],
                self._all,
            )
        if leader and self._why_not:
            level = logging.INFO if self._all else logging.WARNING
            logger.log(level, "steps that are made again are not compared: %s", self._why_not)

    def step(self, step: int, samples: Callable[[], bytes], loss: float, norm: float) -> None:
        """Compare step number `step`, just made, and record it.

        Raises IntegrityError, with nothing recorded, where it differs and that is to stop the run.
        """
        if not self._leader and not (self._stop and self._expected):
            return
        made = _STEP.pack(samples()[:8], _one_nan(loss), _one_nan(norm))
        expected = self._expected.pop(step, None)
        if expected is not None and self._difference is None:
            self._compare(step, made, int(expected[0]), bytes.fromhex(expected[1]))
        with self._lock:
            self._steps.append(made)
            self._first = step - len(self._steps) + 1

    @property
    def holds_back(self) -> bool:
        """Whether nothing should be saved yet: what a difference is to stop may be wrong already.

        A step's loss shows what was restored; the state after it shows in the next step's.
        """
        return self._stop and bool(self._expected)

    def beat(self) -> dict[str, Any]:
        """For the heartbeat: the newest steps, and what was found of those before."""
        with self._lock:
            first, steps = self._first, b"".join(self._steps)
        resume = {
            "from_step": self._restored_step,
            "recorded": self._all,
            "compared": self._all - len(self._expected),
            "verified": self._verdict(),
            "difference": self._difference,
            "why_not": self._why_not,
        }
        encoded = base64.b64encode(steps).decode("ascii")
        return {"proof": {"format": FORMAT, "first": first, "steps": encoded, "resume": resume}}

    def _verdict(self) -> bool | None:
        """Whether the resume is proved; None as long as that is open, or nothing was recorded."""
        if self._difference is not None:
            return False
        return True if self._all and not self._expected else None

    def _compare(self, step: int, made: bytes, generation: int, recorded: bytes) -> None:
        found = _first_difference(recorded, made)
        if found is not None:
            part, before, now = found
            self._difference = {
                "step": step,
                "part": part,
                "recorded": before,
                "replayed": now,
                "generation": generation,
            }
            self._tell(self._difference)
        elif not self._expected and self._leader:
            logger.info("resume verified on %d replayed steps", self._all)

    def _tell(self, found: Mapping[str, Any]) -> None:
        said = (
            f"step {found['step']} is not what generation {found['generation']} made of it: its "
            f"{found['part']} is {found['replayed']}, expected {found['recorded']}, though both "
            f"went on from the same bits"
        )
        causes = (
            "Something decides bits that is not configuration: another device or version of torch "
            "(the start warns of these), --reduction fast with another number of processes, "
            "changed code or data, faulty memory"
        )
        if self._stop:
            raise IntegrityError(
                f"{said}. Nothing is saved from step {found['step']} on. {causes}. Start again "
                "where it was right, or with --on_divergence warn to accept it: the run is exact "
                "up to here, and again from here"
            )
        if self._leader:
            logger.warning("%s. The run goes on, and is exact up to here only. %s", said, causes)


def recorded_steps(
    store: Store, records: Sequence[Record], generation: int, step: int, oldest: int
) -> dict[str, Any]:
    """What earlier generations, down to `oldest`, recorded of the steps after `step`, as JSON.

    `steps` maps each to the generation and its record, the newest of several. `why_not` says which
    heartbeats were not used and why, "" when there is nothing to say. `records` is the log of
    `generation`. Steps that another configuration or an edit of the plan decides are left out.
    """
    edits = [(r.generation, recorded_plan(r).from_step) for r in plan_records(records)]
    steps: dict[int, tuple[int, str]] = {}
    unread: list[int] = []
    why_not = ""
    for earlier in range(generation - 1, max(oldest, generation - MOST_GENERATIONS, 1) - 1, -1):
        try:
            found = steps_told(store, earlier, step)
        except (StoreUnavailableError, ValueError):
            unread.append(earlier)
            continue
        if found and (why_not := _changed(records, earlier, generation)):
            break
        last = min((first for by, first in edits if by > earlier), default=None)
        for number, made in found.items():
            if last is None or number <= last:
                steps.setdefault(number, (earlier, made.hex()))
    if unread:
        names = ", ".join(map(str, sorted(unread)))
        reason = f"no steps can be read in the heartbeats of generation {names}"
        why_not = f"{reason}; {why_not}" if why_not else reason
    return {"steps": {str(number): steps[number] for number in sorted(steps)}, "why_not": why_not}


def nothing_recorded() -> dict[str, Any]:
    """As `recorded_steps` where there was no earlier generation."""
    return {"steps": {}, "why_not": ""}


def _changed(records: Sequence[Record], earlier: int, generation: int) -> str:
    """What decides bits and changed on purpose between two generations; "" for nothing."""
    claims = {record.generation: record for record in _claims(records)}
    before, after = claims.get(earlier), claims.get(generation)
    if before is None or after is None:
        return f"the log does not tell with which configuration generation {earlier} ran"
    changed = {n for at, f in history(records).changes if at > before.index for n in f}
    one, other = (
        {name: value for name, value in claim.body.get("schedule", {}).items() if "." in name}
        for claim in (before, after)
    )  # `data` and `weights` are in the plan
    changed |= {name for name in one | other if one.get(name) != other.get(name)}
    return f"{', '.join(sorted(changed))} changed after generation {earlier}" if changed else ""


def _claims(records: Sequence[Record]) -> Iterator[Record]:
    for record in records:
        if record.kind == "BASE" and (claim := record.body["history"]["claim"]):
            yield record_from_json(claim)
        elif record.kind == "CLAIM":
            yield record


def steps_told(store: Store, generation: int, step: int) -> dict[int, bytes]:
    """The steps after `step` in a generation's last heartbeat; ValueError when it has lost them."""
    beat = read_beat(store, generation)
    if "proof" not in beat and type(beat.get("step")) is int and beat["step"] <= step:
        return {}  # it never came so far
    proof = beat.get("proof")
    if not isinstance(proof, dict) or proof.get("format") != FORMAT:
        raise ValueError("no proof of this version")
    first, encoded = proof.get("first"), proof.get("steps")
    if type(first) is not int or first < 0 or not isinstance(encoded, str):
        raise ValueError("no steps")
    data = base64.b64decode(encoded, validate=True)
    if len(data) % _STEP.size:
        raise ValueError("a part of a step")
    cuts = range(0, len(data), _STEP.size)
    steps = {first + n: data[at : at + _STEP.size] for n, at in enumerate(cuts)}
    return {number: made for number, made in steps.items() if number > step}


def _first_difference(recorded: bytes, made: bytes) -> tuple[str, str, str] | None:
    """The first part that differs, and both values of it; None when the bits are the same."""
    if recorded == made:
        return None
    before, now = _STEP.unpack(recorded), _STEP.unpack(made)
    if before[0] != now[0]:
        return "samples", before[0].hex(), now[0].hex()
    part = 1 if struct.pack("<d", before[1]) != struct.pack("<d", now[1]) else 2
    return ("loss", "gradient norm")[part - 1], repr(before[part]), repr(now[part])


def _one_nan(value: float) -> float:
    """The same bits for every NaN."""
    return math.nan if math.isnan(value) else value
