"""Asks Google Cloud Storage through gcsfs: one attempt, with time-outs, and no cache.

Facts of gcsfs that are worked around here (2026.10; the same in 2024.10 where not said):

- It repeats each request up to six times, waits up to 31 s, repeats no time-out, and logs a
  traceback each time it gives up: its `_request` is taken from below its decorator.
- `gcsfs.GCSFileSystem` (since 2025) asks by gRPC, before every operation, of what kind the bucket
  is, and waits up to 60 s for an answer that no emulator gives: `gcsfs.core` has the class that
  does not. (Buckets of the Rapid class therefore need another client.)
- It frames a small upload with line feeds and a fixed boundary, so data that end in a carriage
  return, or hold the boundary, may be stored short: small objects go as a bare body.
- `info` sends two requests, a listing beside the metadata: the metadata alone are asked for.
- `find` cannot begin in the middle of a listing, and lists twice when it finds nothing.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from storage.checksum import of_gcs
from storage.clients import run_within
from storage.contract import ObjectInfo
from storage.errors import ConfigurationError
from storage.patience import Patience

_PART_BYTES = 16 * 2**20
"""Larger objects go in parts of this size, by a resumable upload; but never what is to be created,
since that would be conditional in two requests. aiohttp copies a request's body once, so a part
also bounds what is held. Google advises at least 8 MiB, in multiples of 256 KiB:
https://cloud.google.com/storage/docs/performing-resumable-uploads#chunked-upload"""


class GcsClient:
    """gcsfs with one attempt for each call."""

    permissions: Mapping[str, str] = {
        "create": "storage.objects.create",
        "write": "storage.objects.create and storage.objects.delete",
        "read": "storage.objects.get",
        "list": "storage.objects.list",
        "delete": "storage.objects.delete",
        "look up": "storage.objects.get",
    }

    def __init__(self, patience: Patience) -> None:
        from aiohttp import ClientTimeout
        from gcsfs.core import GCSFileSystem

        once = getattr(GCSFileSystem._request, "__wrapped__", GCSFileSystem._request)
        single = type("SingleAttempt", (GCSFileSystem,), {"_request": once})
        limits = ClientTimeout(
            total=None,
            sock_connect=patience.connect_seconds,
            sock_read=patience.silence_seconds,
        )
        self._patience = patience
        try:
            self._fs: Any = single(
                use_listings_cache=False, skip_instance_cache=True, requests_timeout=limits
            )
        except (ValueError, TypeError, OSError) as error:
            raise ConfigurationError(
                f"the credentials for gs:// cannot be read: {error}. Correct them, or make new "
                "ones with: gcloud auth application-default login"
            ) from error

    def path(self, url: str) -> str:
        return str(self._fs._strip_protocol(url))

    def write(self, path: str, data: bytes | memoryview, *, create: bool) -> None:
        view = memoryview(data).cast("B")
        if create or len(view) < _PART_BYTES:
            self._run(self._in_one_request(path, view, create), len(view))
        else:
            self._run(self._fs._pipe_file(path, view, chunksize=_PART_BYTES), len(view))

    def read(self, path: str, start: int, end: int | None) -> bytes:
        whole = start == 0 and end is None
        coroutine = self._fs._cat_file(path, start=None if whole else start, end=end)
        size = _UNKNOWN_BYTES if end is None else end - start
        return bytes(self._run(coroutine, size))

    def paths(self, folder: str, prefix: str, start_after: str) -> list[str]:
        found: list[str] = self._run(self._paths(folder, prefix, start_after))
        return found

    def remove(self, path: str) -> None:
        self._run(self._fs._rm_file(path))

    def info(self, path: str) -> ObjectInfo:
        bucket, name, _ = self._fs.split_path(path)
        coroutine = self._fs._call("GET", "b/{}/o/{}", bucket, name, json_out=True)
        found: dict[str, Any] = self._run(coroutine)
        updated = found.get("updated")
        return ObjectInfo(
            size_bytes=int(found["size"]),
            checksum=of_gcs(found.get("crc32c")),
            modified_at=datetime.fromisoformat(updated).timestamp() if updated else None,
        )

    def close(self) -> None:
        session, self._fs._session = self._fs._session, None
        if session is not None:
            self._run(session.close())

    async def _in_one_request(self, path: str, view: memoryview, create: bool) -> None:
        """https://cloud.google.com/storage/docs/uploading-objects#uploading-an-object (media)"""
        bucket, name, _ = self._fs.split_path(path)
        await self._fs._call(
            "POST",
            f"{self._fs._location}/upload/storage/v1/b/{bucket}/o",
            uploadType="media",
            name=name,
            ifGenerationMatch="0" if create else None,
            headers={"Content-Type": "application/octet-stream"},
            data=view,
        )

    async def _paths(self, folder: str, prefix: str, start_after: str) -> list[str]:
        bucket, below, _ = self._fs.split_path(f"{folder.rstrip('/')}/")
        found: list[str] = []
        page: dict[str, Any] = {"nextPageToken": None}
        while "nextPageToken" in page:
            page = await self._fs._call(
                "GET",
                "b/{}/o",
                bucket,
                prefix=below + prefix,
                startOffset=below + start_after if start_after else None,
                pageToken=page["nextPageToken"],
                fields="nextPageToken,items(name)",
                json_out=True,
            )
            found += [f"{bucket}/{item['name']}" for item in page.get("items", ())]
        return found

    def _run(self, coroutine: Any, size_bytes: int = 0) -> Any:
        return run_within(self._fs.loop, coroutine, self._patience.seconds_for(size_bytes))


_UNKNOWN_BYTES = 2**30
"""What a read without an end is given time for."""
