"""Finds the client for a URL's protocol: gcsfs, s3fs, or whatever else fsspec knows."""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, Protocol, TypeVar

import fsspec

from storage.contract import ObjectInfo
from storage.errors import ConfigurationError
from storage.patience import Patience

_LOOP_SECONDS = 5.0
"""What the thread of fsspec's event loop may be late, before it counts as hung itself."""

Result = TypeVar("Result")


class Client(Protocol):
    """One attempt of each operation, in the paths of fsspec and with whatever errors it raises."""

    permissions: Mapping[str, str]
    """Operation to what must be granted for it."""

    def path(self, url: str) -> str:
        """The URL without its protocol."""

    def write(self, path: str, data: bytes | memoryview, *, create: bool) -> None:
        """The whole object; FileExistsError when `create` and there is one."""

    def read(self, path: str, start: int, end: int | None) -> bytes:
        """Bytes [start, end), where end > start if it is given."""

    def paths(self, folder: str, prefix: str, start_after: str) -> list[str]:
        """Of the objects in `folder` and below whose path below it begins with `prefix`.

        Paths that sort up to `start_after` may be left out.
        """

    def remove(self, path: str) -> None:
        """FileNotFoundError when there is none, or nothing."""

    def info(self, path: str) -> ObjectInfo:
        """Size and checksum."""

    def close(self) -> None:
        """Give connections back."""


def open_client(protocol: str, patience: Patience) -> Client:
    """A client of its own, shared with no other store. Raises ConfigurationError."""
    if protocol in ("gs", "gcs"):
        from storage.gcs_client import GcsClient

        return GcsClient(patience)
    if protocol in ("s3", "s3a"):
        from storage.s3_client import S3Client

        return S3Client(patience)
    return PlainClient(protocol)


class PlainClient:
    """Any file system of fsspec, by its common methods. It has the time-outs that it has."""

    permissions: Mapping[str, str] = {}

    def __init__(self, protocol: str) -> None:
        try:
            self._fs: Any = fsspec.filesystem(
                protocol, use_listings_cache=False, skip_instance_cache=True
            )
        except (ImportError, ValueError, TypeError, AttributeError, OSError) as error:
            raise ConfigurationError(f"no store for {protocol}:// URLs: {error}") from error

    def path(self, url: str) -> str:
        return str(self._fs._strip_protocol(url))

    def write(self, path: str, data: bytes | memoryview, *, create: bool) -> None:
        mode = {"mode": "create"} if create else {}
        self._fs.pipe_file(path, bytes(data), **mode)

    def read(self, path: str, start: int, end: int | None) -> bytes:
        return bytes(self._fs.cat_file(path, start=start, end=end))

    def paths(self, folder: str, prefix: str, start_after: str) -> list[str]:
        try:
            return [str(path) for path in self._fs.find(folder)]
        except FileNotFoundError:
            return []

    def remove(self, path: str) -> None:
        self._fs.rm_file(path)

    def info(self, path: str) -> ObjectInfo:
        return ObjectInfo(size_bytes=int(self._fs.info(path)["size"]))

    def close(self) -> None:
        """Nothing is open between two calls."""


def run_within(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Result], seconds: float
) -> Result:
    """The result of `coroutine` on the loop of another thread; TimeoutError after `seconds`.

    It is cancelled then, and when this thread is interrupted. The caller is let go even if the
    loop's thread hangs: gcsfs renews its credentials there with a blocking request.
    """

    async def limited() -> Result:
        return await asyncio.wait_for(coroutine, seconds)

    future = asyncio.run_coroutine_threadsafe(limited(), loop)
    try:
        return future.result(seconds + _LOOP_SECONDS)
    except BaseException:
        future.cancel()
        raise
