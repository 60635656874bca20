"""Which host the others meet at: a run's supervisors agree on it through the run's store.

torchrun needs one host that holds the rendezvous, and losing that one ends every agent. So the
place is written down: `rendezvous/<number>.json`, created once each, and the newest counts. Whoever
finds that nobody lives on the run, and that the newest place cannot be reached, creates the next
number, with its own address. A live run keeps its place, whose number its CLAIM carries: nobody
makes another beside it, and who was cut off, or made one too soon, comes back to it.

Covers: the loss of any host, also of this one; hosts that are cut off and healed; starts at once.
Does not cover: two hosts of one address; a network in which only some hosts reach each other: who
does not reach the place of a live run waits.
"""

import json
import math
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from checkpointing.beats import BEAT_SECONDS, read_beat, silent_seconds
from checkpointing.history import history
from checkpointing.incarnation import SILENT_SECONDS
from checkpointing.owner import provably_gone
from storage.canonical import canonical_json
from storage.errors import RunBusyError
from storage.log import Log
from storage.store import Store

FOLDER = "rendezvous/"
LOOK_SECONDS = 1.0


class Reach(Enum):
    """What a place answers."""

    OPEN = "is open"
    REFUSED = "is on a host that answers, where nothing listens"
    SILENT = "does not answer"
    DEAF = "takes connections, and nobody answers"


PATIENCE_SECONDS = {Reach.REFUSED: 60.0, Reach.SILENT: 6.0, Reach.DEAF: 6.0}
"""How long the place of the last world may be unreachable, once nobody lives on the run, before
another is made. Where a host answers, its agent may be about to start."""
NEW_PLACE_SECONDS = 60.0
"""The same for a place that was made since: whoever made it lives, so it may be this host that is
cut off. Doubled with each such place, or slow machines would never come together."""
_MOST_DOUBLINGS = 4
_LOOKING_SECONDS = 30.0
"""Looks further apart than this tell nothing of the time between them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the hosts meet. `host` is for people.

    `token` tells this run's hosts from another's, who meet at the same address later.
    """

    number: int
    address: str
    port: int
    host: str
    token: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """The newest incarnation of the run. `live` is None as long as it is not known.

    `place` is the number of the place where its world came together, 0 when it has none.
    """

    generation: int
    job: str
    place: int
    live: bool | None
    said: str = ""
    """Host, process, phase and step, for people."""
    ended_at: int | None = None
    """The step with which it has brought the run to its end, if it has."""


class Verdict(Enum):
    """What to do about a place."""

    USE = "use it"
    LOOK = "look again later"
    REPLACE = "make another"


def place_to_judge(places: Sequence[int], owner: Owner | None) -> int | None:
    """The number of the place that matters: a live owner's, else the newest.

    None while it is not known whether the owner of an older place lives.
    """
    newest = max(places)
    if owner is None or owner.place not in places or owner.place == newest or owner.live is False:
        return newest
    return owner.place if owner.live else None


def judge(
    reach: Reach, *, mine: bool, owner: Owner | None, unreachable_seconds: float, in_vain: int
) -> Verdict:
    """What to do about the place that matters. Beside a live owner no other is made.

    `in_vain` is how many places were made since a world came together.
    """
    if reach is Reach.OPEN or mine:
        return Verdict.USE
    gone = owner is None or owner.live is False
    patience_seconds = PATIENCE_SECONDS[reach]
    if in_vain:
        patience_seconds = NEW_PLACE_SECONDS * 2.0 ** min(in_vain - 1, _MOST_DOUBLINGS)
    return Verdict.REPLACE if gone and unreachable_seconds >= patience_seconds else Verdict.LOOK


class Watch:
    """Tells who owns the run, and whether it lives, as a claimant would judge it."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._log = Log(store)
        self._clock = clock
        self._generation = 0
        self._beat: dict[str, Any] = {}
        self._news = 0.0
        self._heard = False

    def __call__(self) -> Owner | None:
        """The newest incarnation; None when the run was never claimed."""
        past = history(self._log.refresh())
        if past.generation == 0:
            return None
        beat = read_beat(self._store, past.generation)
        if past.generation != self._generation:
            self._heard = self._generation > 0  # it has claimed the run before our eyes
            self._generation, self._beat, self._news = past.generation, beat, self._clock()
            if beat and silent_seconds(self._store, past.generation) >= SILENT_SECONDS:
                self._news = -math.inf
        elif beat != self._beat:
            self._beat, self._heard, self._news = beat, True, self._clock()
        body = past.claim.body if past.claim is not None else {}
        process = body.get("owner", {})
        end = past.end
        quiet = self._clock() - self._news >= 2 * BEAT_SECONDS
        gone = bool(beat.get("left")) or provably_gone(process) or quiet
        return Owner(
            generation=past.generation,
            job=str(body.get("job", "")),
            place=int(body.get("rendezvous", 0)),
            live=False if gone else True if self._heard else None,
            said=f"host {process.get('host', 'unknown')}, process {process.get('pid')}, in phase "
            f"{beat.get('phase')!r} at step {beat.get('step')}",
            ended_at=end.body["step"] if end and end.generation == past.generation else None,
        )


class Membership:
    """This host's part in the agreement. `job` must be the same on all hosts of a job.

    Use one for all starts: what was seen while an agent waited in vain need not be seen again.
    `deaf` are the numbers of places where nobody answered torchrun, though one could connect:
    another program has that port now, or the host there is frozen.
    """

    def __init__(
        self,
        store: Store,
        *,
        job: str,
        address: str,
        host: str,
        owner: Callable[[], Owner | None],
        reach: Callable[[str, int], Reach],
        free_port: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = lambda text: None,
        deaf: Collection[int] = (),
    ) -> None:
        self._store = store
        self._deaf = deaf
        self._job = job
        self.address = address
        self._host = host
        self._owner = owner
        self._reach = reach
        self._free_port = free_port
        self._clock = clock
        self._say = say
        self._places: dict[int, Place] = {}
        self._unreachable: tuple[int, Reach] | None = None
        self._unreachable_since = self._looked_at = clock()
        self._told = ""

    def look(self) -> tuple[Place, bool] | None:
        """The place to meet at, and whether this host holds it; None: look again in a second.

        Raises RunBusyError when another job lives on the run, StoreUnavailableError when the store
        fails.
        """
        self._read()
        if not self._places:
            self._create(1)
            return None
        owner = self._owner()
        foreign = owner is not None and owner.job != self._job
        if owner is not None and foreign and owner.live:
            raise RunBusyError(
                f"{self._store.url} is in use by generation {owner.generation}, of job "
                f"{owner.job!r}: {owner.said}. Stop that one, or let it end"
            )
        number = place_to_judge(list(self._places), owner)
        if number is None or (owner is not None and foreign and owner.live is None):
            self._wait("whether the run's last owner still lives is not known yet")
            return None
        place = self._places[number]
        reach = self._reach(place.address, place.port)
        mine = place.address == self.address
        deaf = number in self._deaf and not (owner is not None and owner.live)
        if deaf and reach is Reach.OPEN:
            reach = Reach.DEAF
        seconds = self._seconds_unreachable(number, reach)
        if deaf and mine:
            mine, seconds = False, math.inf  # nobody else will listen there
        verdict = judge(
            reach,
            mine=mine,
            owner=owner,
            unreachable_seconds=seconds,
            in_vain=self._places_in_vain(owner),
        )
        if verdict is Verdict.USE:
            self._unreachable = None
            return place, mine and reach is not Reach.OPEN
        if verdict is Verdict.REPLACE:
            self._create(max(self._places) + 1)
            return None
        self._wait(f"{place.host} ({place.address}:{place.port}) {reach.value}")
        return None

    def join(self, pause: Callable[[float], bool]) -> tuple[Place, bool] | None:
        """As `look`, until there is a place; None when `pause` returns False (a notice came)."""
        while (found := self.look()) is None:
            if not pause(LOOK_SECONDS):
                return None
        place, holds = found
        self._say(
            f"the hosts meet at {place.address}:{place.port}, number {place.number}, "
            f"{'here' if holds else f'on {place.host}'}"
        )
        self._unreachable, self._told = None, ""
        return found

    def outdated(self, place: Place) -> str:
        """Why an agent none of whose ranks lives waits there in vain; "" when it may go on.

        That a newer place was made by somebody who cannot be reached ends nothing: the first world
        that comes together decides.
        """
        self._read()
        reach, unreachable_seconds = Reach.OPEN, 0.0
        if place.address != self.address:  # silence counts from the first, whoever lives meanwhile
            reach = self._reach(place.address, place.port)
            unreachable_seconds = self._seconds_unreachable(place.number, reach)
        owner = self._owner()
        if owner is not None and owner.live and owner.place == place.number:
            return ""
        newest = self._places[max(self._places)]
        lives_elsewhere = owner is not None and owner.live and owner.place in self._places
        if lives_elsewhere or (
            newest.number > place.number
            and self._reach(newest.address, newest.port) is not Reach.SILENT
        ):
            return f"the hosts meet at another place than number {place.number}"
        if unreachable_seconds < PATIENCE_SECONDS[Reach.SILENT]:
            return ""
        return f"{place.host} ({place.address}:{place.port}), where the hosts meet, {reach.value}"

    def _read(self) -> None:
        after = _key(max(self._places)) if self._places else ""
        for key in self._store.list(FOLDER, start_after=after):
            place = _decoded(self._store.get(key), int(Path(key).stem))
            self._places[place.number] = place

    def _create(self, number: int) -> None:
        """Make the next place, here. Who loses the race reads who won."""
        place = Place(
            number=number,
            address=self.address,
            port=self._free_port(),
            host=self._host,
            token=uuid.uuid4().hex[:12],
        )
        self._store.put_if_absent(_key(number), canonical_json(asdict(place)))
        self._unreachable = None

    def _places_in_vain(self, owner: Owner | None) -> int:
        newest = max(self._places)
        if owner is None:
            return newest - 1
        return newest - owner.place if owner.place in self._places else 0

    def _seconds_unreachable(self, number: int, reach: Reach) -> float:
        if reach is Reach.OPEN:
            self._unreachable = None
            return 0.0
        now = self._clock()
        unbroken = now - self._looked_at <= _LOOKING_SECONDS
        if self._unreachable != (number, reach) or not unbroken:
            self._unreachable, self._unreachable_since = (number, reach), now
        self._looked_at = now
        return now - self._unreachable_since

    def _wait(self, why: str) -> None:
        """Say once what is waited for."""
        if why != self._told:
            self._told = why
            self._say(f"waiting: {why}")


def _key(number: int) -> str:
    return f"{FOLDER}{number:010d}.json"


def _decoded(data: bytes, number: int) -> Place:
    """What stands there; a damaged place is one that does not answer."""
    try:
        content = json.loads(data)
        address, port, host = str(content["address"]), int(content["port"]), str(content["host"])
        token = str(content.get("token", ""))
    except (ValueError, KeyError, TypeError):
        address, port, host, token = "0.0.0.0", 0, "unknown", ""
    return Place(number=number, address=address, port=port, host=host, token=token)
