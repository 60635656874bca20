"""What operators ask of the incarnation that owns a run: small objects that it finds and answers.

`requests/<nonce>.json` says what is asked; to answer is to delete it, and to refuse is to put the
reason into `answers/<nonce>.json` before. Whoever can write to the run's store can ask; nothing in
a request is executed, and none can harm the run by its form. What a kind of request means is known
to the package that owns it.

Covers: requests that are half written, too large, not JSON, of another version, put twice.
Does not cover: what a request makes the owner do; a request is answered once that is done, so that
one whose owner dies meanwhile is found by the next.
"""

import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from storage.canonical import canonical_json, sha256_hex
from storage.errors import ConfigurationError, StoreUnavailableError
from storage.store import Store

logger = logging.getLogger(__name__)

FORMAT = 1
MOST_BYTES = 64 * 2**10
MOST_PENDING = 100
"""Requests read at one look; the others are read once these are answered."""

_KEY = re.compile(r"requests/[0-9a-f]{32}\.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request. `asked_at` is on the clock of who asked."""

    key: str
    kind: str
    body: dict[str, Any]
    asked_at: float


def put_request(
    store: Store,
    kind: str,
    body: dict[str, Any] | None = None,
    *,
    wall_clock: Callable[[], float] = time.time,
) -> str:
    """Ask the owner of the run for `kind`; returns the key, which is gone once it is answered."""
    content = {"format": FORMAT, "kind": kind, "body": body or {}, "asked_at": wall_clock()}
    data = canonical_json(content)
    if len(data) > MOST_BYTES:
        raise ConfigurationError(
            f"a request must have at most {MOST_BYTES} bytes; this one has {len(data)}"
        )
    key = f"requests/{uuid.uuid4().hex}.json"
    store.put_if_absent(key, data)
    return key


def refusal(store: Store, key: str) -> str | None:
    """Why the request of this key was refused; None when it was not, or not yet."""
    try:
        answer = json.loads(store.get(_answer_key(key), 0, MOST_BYTES))
        return str(answer["refused"])
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        return None


def forget(store: Store, key: str) -> None:
    """Withdraw the request of this key, and remove the answer to it."""
    store.delete(key)
    store.delete(_answer_key(key))


class Inbox:
    """The requests of one run, as its owner sees them. For one thread.

    `kinds` are those that the owner knows how to answer.
    """

    def __init__(self, store: Store, kinds: Iterable[str]) -> None:
        self._store = store
        self._kinds = sorted(kinds)
        self._unclear: dict[str, str] = {}
        self._refused: set[str] = set()

    def pending(self) -> list[Request]:
        """The requests not yet answered, in the order of asking as the askers' clocks have it.

        What is no request is refused: deleted, with one warning. It is refused only when it looks
        the same at the second look, because where creation is not atomic it may be half written.
        Raises StoreUnavailableError.
        """
        keys = self._store.list("requests/")
        ours = [key for key in keys if _KEY.fullmatch(key)]
        for key in sorted(set(keys) - set(ours)):
            self._warn(key, "it is not named as one, and stays")
        found = [request for key in ours[:MOST_PENDING] if (request := self._look(key)) is not None]
        return sorted(found, key=lambda request: (request.asked_at, request.key))

    def answered(self, request: Request) -> None:
        """Delete a request; that it is gone already is not an error."""
        self._store.delete(request.key)

    def refuse(self, request: Request, why: str) -> None:
        """Say why a request is not done, where the asker looks, and delete it."""
        self._store.put(_answer_key(request.key), canonical_json({"refused": why}))
        self._store.delete(request.key)

    def _look(self, key: str) -> Request | None:
        try:
            data = self._store.get(key, 0, MOST_BYTES + 1)
        except FileNotFoundError:
            return None  # withdrawn since it was listed
        try:
            return _request(key, data, self._kinds)
        except ValueError as error:
            digest = sha256_hex(data)
            if self._unclear.get(key) != digest:
                self._unclear[key] = digest
                return None
            self._warn(key, str(error))
            with suppress(StoreUnavailableError):  # tried again at the next look
                self._store.delete(key)
            return None

    def _warn(self, key: str, why: str) -> None:
        """Say once that something is no request."""
        if key not in self._refused:
            self._refused.add(key)
            logger.warning("%s/%s is no request: %s", self._store.url, key, why)


def _answer_key(key: str) -> str:
    return key.replace("requests/", "answers/", 1)


def _request(key: str, data: bytes, kinds: Sequence[str]) -> Request:
    """The request in these bytes; ValueError, saying why, when there is none."""
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT}; was it written by another version?")
    kind, body, asked_at = (content.get(name) for name in ("kind", "body", "asked_at"))
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"it asks for {kind!r:.40}; expected one of {', '.join(kinds)}")
    if not isinstance(body, dict) or not isinstance(asked_at, int | float):
        raise ValueError("`body` must be an object, and `asked_at` a number")
    return Request(key=key, kind=kind, body=body, asked_at=asked_at)
