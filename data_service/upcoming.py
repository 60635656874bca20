"""What a cache fetches and evicts by: what will be read, and when."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from data_service.download import Remote

AHEAD = 64
"""How many objects that are not yet read are held: each costs a file descriptor."""


class Upcoming(Protocol):
    """What will be read of sources that are not on this machine."""

    minimum_bytes: int
    """All that is under way at a time, and the largest object."""

    def uses(self, step: int) -> Iterator[tuple[int, Remote]]:
        """What is under way at `step`, then what is opened later, by the step of the first read."""

    def next_use(self, sha256: str, step: int) -> int | None:
        """The first step from `step` on that may read an object; None for one that is not ours."""

    def recognise(self, names: Iterable[str]) -> None:
        """Look which of these objects are ours, before `next_use` is asked for them."""


def look_ahead(upcoming: Upcoming, step: int, room: int) -> tuple[list[tuple[int, Remote]], int]:
    """What is under way and comes next, as far as there is room; and when that changes."""
    wanted: list[tuple[int, Remote]] = []
    seen: set[str] = set()
    ahead = repeats = 0
    opens_at = 2**62
    for first, remote in upcoming.uses(step):
        coming = first > step
        if coming:
            opens_at = min(opens_at, first)
        if remote.sha256 in seen:
            repeats += 1
            if repeats > len(seen) + AHEAD:  # all there is
                break
            continue
        room -= remote.size_bytes
        ahead += coming
        if coming and (room < 0 or ahead > AHEAD):
            break
        seen.add(remote.sha256)
        wanted.append((first, remote))
    return wanted, opens_at
