"""How long, and how often, a store is asked before it counts as out of reach."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """Limits of one call of a store; the clients' own retries are off, so these are all there are.

    A call ends at the latest after `give_up_seconds` plus one attempt and one wait: with the
    defaults in about four minutes for a small object, however the server misbehaves.
    """

    connect_seconds: float = 10.0
    silence_seconds: float = 30.0
    """How long a server may send nothing while its answer is awaited."""
    attempt_seconds: float = 60.0
    bytes_per_second: float = 1e6
    """The slowest transfer that is still waited for: it lengthens an attempt by the size."""
    attempts: int = 6
    give_up_seconds: float = 150.0
    """No attempt begins later than this after the first one."""
    first_wait_seconds: float = 0.5
    longest_wait_seconds: float = 20.0

    def seconds_for(self, size_bytes: int) -> float:
        """How long one attempt to move so many bytes may take."""
        return self.attempt_seconds + size_bytes / self.bytes_per_second
