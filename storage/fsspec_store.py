"""A place that fsspec reaches, such as a bucket: every call is repeated, bounded, and explained.

Covers: passing failures of servers and networks (408, 409, 425, 429, 5xx, resets, broken streams,
silence), lost responses as the contract has them, time-outs, messages without secrets, threads,
and forks (a child opens its own client).
Does not cover: time-outs of places other than gs:// and s3://; objects over 5 GiB on S3.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_random_exponential,
)

from storage.clients import Client, open_client
from storage.contract import ObjectInfo, check_key
from storage.errors import ConfigurationError, StoreRefusedError, StoreUnavailableError
from storage.failures import judge, told
from storage.patience import Patience

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class FsspecStore:
    """Objects at an fsspec URL; creation relies on the server's own condition."""

    def __init__(
        self,
        url: str,
        *,
        patience: Patience | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = url
        self.creates_atomically = True
        self._protocol = url.partition("://")[0]
        self._patience = patience or Patience()
        self._sleep = sleep
        self._opening = threading.Lock()
        self._process = os.getpid()
        self._opened = open_client(self._protocol, self._patience)
        self._root = self._opened.path(url).rstrip("/")

    def close(self) -> None:
        """Give the connections back. The store may be used again, and opens new ones."""
        if self._process == os.getpid():
            self._opened.close()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        try:
            self._do("create", key, lambda client: client.write(path, data, create=True))
        except FileExistsError:
            return False
        return True

    def put(self, key: str, data: bytes | memoryview) -> None:
        path = self._path(key)
        self._do("write", key, lambda client: client.write(path, data, create=False))

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        if end is not None and end <= start:  # no HTTP range says this
            self.stat(key)
            return b""
        path = self._path(key)
        try:
            return self._do("read", key, lambda client: client.read(path, start, end))
        except EOFError:
            return b""

    def list(self, prefix: str, start_after: str = "") -> list[str]:
        folder, _, rest = prefix.rpartition("/")
        above = f"{self._root}/{folder}".rstrip("/")
        after = start_after[len(prefix) - len(rest) :] if start_after.startswith(prefix) else ""
        paths = self._do("list", prefix, lambda client: client.paths(above, rest, after))
        keys = {path[len(self._root) :].lstrip("/") for path in paths}
        return sorted(key for key in keys if key.startswith(prefix) and key > start_after)

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            self._do("delete", key, lambda client: client.remove(path))
        except FileNotFoundError:
            return

    def stat(self, key: str) -> ObjectInfo:
        path = self._path(key)
        return self._do("look up", key, lambda client: client.info(path))

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def _client(self) -> Client:
        """This process's own: neither connections nor the loop's thread outlive a fork."""
        with self._opening:
            if self._process != os.getpid():
                self._process = os.getpid()
                self._opened = open_client(self._protocol, self._patience)
            return self._opened

    def _do(self, operation: str, key: str, act: Callable[[Client], Result]) -> Result:
        """Try until it is done, or the patience is at its end; then say what is wrong."""
        limits = self._patience
        attempts = 0

        def once() -> Result:
            nonlocal attempts
            attempts += 1
            return act(self._client())

        def tell(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if error is not None:
                logger.debug("%s: %s %s again: %s", self.url, operation, key, told(error))

        retrying = Retrying(
            stop=stop_after_attempt(limits.attempts) | stop_after_delay(limits.give_up_seconds),
            wait=wait_random_exponential(
                multiplier=limits.first_wait_seconds, max=limits.longest_wait_seconds
            ),
            retry=retry_if_exception(lambda e: judge(_first(operation, e)) == "passing"),
            sleep=self._sleep,
            before_sleep=tell,
            reraise=True,
        )
        try:
            return retrying(once)
        except Exception as error:
            first = _first(operation, error)
            raise self._explained(first, operation, key, attempts) from error

    def _explained(
        self, error: BaseException, operation: str, key: str, attempts: int
    ) -> Exception:
        """What the caller gets to see of a client's error."""
        verdict = judge(error)
        if verdict == "exists" and operation == "create":
            return FileExistsError(key)
        if verdict == "absent" and operation in ("read", "look up", "delete"):
            return FileNotFoundError(key)
        if verdict == "past the end":
            return EOFError(key)
        if verdict in ("absent", "no bucket"):
            return ConfigurationError(
                f"{self.url}: its bucket does not exist; create it, or correct the URL"
            )
        if verdict == "refused":
            needed = self._client().permissions.get(operation, "what that needs")
            return StoreRefusedError(
                f"{self.url}: not allowed to {operation} {key or 'objects'}: {told(error)}. Grant "
                f"{needed} to the credentials in use, or give others"
            )
        if isinstance(error, ConfigurationError):
            return error
        if isinstance(error, NotImplementedError | TypeError | AttributeError):
            return ConfigurationError(f"{self.url} cannot hold objects: {told(error)}")
        tried = f", tried {attempts} times" if attempts > 1 else ""
        return StoreUnavailableError(f"{self.url}: cannot {operation} {key}: {told(error)}{tried}")


def _first(operation: str, error: BaseException) -> BaseException:
    """What went wrong first.

    After a part that failed gcsfs takes the upload back, and raises what goes wrong with that.
    """
    context = error.__context__
    taken_back = operation == "write" and context is not None and error.__cause__ is None
    return context if taken_back and context is not None else error
