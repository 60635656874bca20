"""What a store promises: objects under keys, created once or not at all, read whole or not at all.

Covers: the methods that every store has, what a key may be, and what a store says of an object.
Does not cover: a store that lies; `probe.py` finds one whose creation does not exclude a second
writer.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from storage.errors import ConfigurationError

_KEY_PART = re.compile(r"[A-Za-z0-9_+=-][A-Za-z0-9._+=-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectInfo:
    """What a store says of an object without reading it.

    `checksum` is the server's own, "crc32c:<8 hex digits>" or "md5:<32 hex digits>", for
    `checksum.matches`; "" where it gives none (a local folder, a multipart upload). `modified_at`
    is in unix seconds on the server's own clock, to the second at worst; None where it gives none.
    """

    size_bytes: int
    checksum: str = ""
    modified_at: float | None = None


class Store(Protocol):
    """Objects under keys. A key is parts of letters, digits and `._+=-`, joined by `/`.

    Every method may be called by several threads at once. Every method raises
    `StoreUnavailableError` when the place fails (`StoreRefusedError` when it does not permit the
    operation), and `ConfigurationError` for a key that is not one.
    """

    url: str
    creates_atomically: bool
    """False when a crash inside `put_if_absent` can leave a torn object (no hard links here)."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create the object, whole and durable. False, and no change, when the key exists.

        Over a network False may also mean that this very call created the object: when the
        response is lost, the call is repeated, and the second answer is "exists". After False,
        and after an error, a caller that must know reads the object and looks for its own nonce.
        """

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write the whole object durably, replacing one of that key, which nobody else writes."""

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes [start, end) of the object, as far as there are. FileNotFoundError: none."""

    def list(self, prefix: str, start_after: str = "") -> list[str]:
        """All keys that begin with `prefix` and sort after `start_after`, sorted."""

    def delete(self, key: str) -> None:
        """Remove the object; that there is none is not an error."""

    def stat(self, key: str) -> ObjectInfo:
        """Size and checksum of the object. Raises FileNotFoundError when there is none."""

    def local_path(self, key: str) -> Path | None:
        """A file that can be mapped into memory, or None when the objects are not files here."""


def check_key(key: str) -> str:
    """The key, or ConfigurationError when it could name something outside the store."""
    parts = key.split("/")
    if not all(_KEY_PART.fullmatch(part) for part in parts):
        raise ConfigurationError(
            f"{key!r} is not a key: expected parts of letters, digits and '._+=-' joined by '/', "
            "none beginning with a dot"
        )
    return key
