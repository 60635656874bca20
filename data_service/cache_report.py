"""What a cache has measured, for metrics and people; nothing that decides which data comes."""

from dataclasses import dataclass

_NEWEST_SHARE = 0.3  # of the newest measurement in a mean


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheReport:
    """How the cache does, since the start of this process."""

    openings: int
    hit_rate: float
    """Openings that did not wait for a download, of all."""
    downloads: int
    downloaded_bytes: int
    next_shard: str
    """What is not here yet of what comes, soonest first; "" when all that is looked at is here."""
    seconds_until_needed: float
    seconds_until_there: float
    """Of the next shard, as measured so far; 0 when nothing is known."""

    def __str__(self) -> str:
        said = (
            f"cache: {self.hit_rate:.1%} of {self.openings} openings without waiting, "
            f"{self.downloads} downloads, {self.downloaded_bytes / 1e6:,.0f} MB"
        )
        if self.next_shard:
            said += (
                f"; next {self.next_shard}, needed in {self.seconds_until_needed:.0f} s, here in "
                f"{self.seconds_until_there:.0f} s"
            )
        return said


class Mean:
    """A mean of measurements, the newest of which count most; 0 before the first."""

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, measured: float) -> None:
        self.value += (_NEWEST_SHARE if self.value else 1.0) * (measured - self.value)


class Pace:
    """Seconds between steps."""

    def __init__(self) -> None:
        self.seconds = Mean()
        self._last: tuple[int, float] | None = None

    def at(self, step: int, now: float) -> None:
        if self._last is not None and step > self._last[0]:
            self.seconds.add((now - self._last[1]) / (step - self._last[0]))
        self._last = step, now
