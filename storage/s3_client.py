"""Asks S3 and what speaks its language through s3fs: one attempt, with time-outs, and no cache.

Facts of s3fs that are worked around here (2026.9):

- It repeats some errors up to five times, and botocore below it up to five times each: both are
  told to try once. Neither repeats 409, which S3 answers to a conditional write that met another:
  https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
- `pipe_file` splits from 100 MiB on, and then the ETag is no MD5: `put_object` itself takes every
  object up to S3's 5 GiB in one part.
- botocore takes no memoryview as a body: a reader over it saves the copy.
- `cat_file` asks for the size first, and reads large objects in pieces that it does not check:
  with `max_concurrency=1` there is one request, whose checksum botocore compares.
- `info` drops the encryption, without which an ETag cannot be told from an MD5, and lists when
  there is no such object: the metadata alone are asked for. `find` cannot begin in the middle.
"""

import io
from collections.abc import Mapping
from typing import Any

import fsspec.config

from storage.checksum import of_s3
from storage.clients import run_within
from storage.contract import ObjectInfo
from storage.errors import ConfigurationError
from storage.patience import Patience


class S3Client:
    """s3fs with one attempt for each call."""

    permissions: Mapping[str, str] = {
        "create": "s3:PutObject",
        "write": "s3:PutObject",
        "read": "s3:GetObject and s3:ListBucket",
        "list": "s3:ListBucket",
        "delete": "s3:DeleteObject",
        "look up": "s3:GetObject and s3:ListBucket",
    }

    def __init__(self, patience: Patience) -> None:
        try:
            from s3fs import S3FileSystem
        except ImportError as error:
            raise ConfigurationError(
                "s3:// needs s3fs, which is not installed: pip install 'rangeflow[s3]'"
            ) from error
        self._patience = patience
        limits = {
            "connect_timeout": patience.connect_seconds,
            "read_timeout": patience.silence_seconds,
            "retries": {"total_max_attempts": 1},
        }
        given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        self._fs: Any = S3FileSystem(
            config_kwargs={**given, **limits},
            max_concurrency=1,
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        self._fs.retries = 1

    def path(self, url: str) -> str:
        return str(self._fs._strip_protocol(url))

    def write(self, path: str, data: bytes | memoryview, *, create: bool) -> None:
        view = memoryview(data).cast("B")
        bucket, key, _ = self._fs.split_path(path)
        body = data if isinstance(data, bytes) else _Body(view)
        condition = {"IfNoneMatch": "*"} if create else {}
        put = self._fs._call_s3("put_object", Bucket=bucket, Key=key, Body=body, **condition)
        self._run(put, len(view))

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
        bucket, key, _ = self._fs.split_path(path)
        found: dict[str, Any] = self._run(self._fs._call_s3("head_object", Bucket=bucket, Key=key))
        plain = found.get("ServerSideEncryption", "AES256") == "AES256"
        plain = plain and "SSECustomerAlgorithm" not in found
        modified = found.get("LastModified")
        return ObjectInfo(
            size_bytes=int(found["ContentLength"]),
            checksum=of_s3(found["ETag"]) if plain else "",
            modified_at=modified.timestamp() if modified else None,
        )

    def close(self) -> None:
        client, self._fs._s3 = self._fs._s3, None
        if client is not None:
            self._run(client.close())

    async def _paths(self, folder: str, prefix: str, start_after: str) -> list[str]:
        bucket, below, _ = self._fs.split_path(f"{folder.rstrip('/')}/")
        where = {"Bucket": bucket, "Prefix": below + prefix}
        if start_after:
            where["StartAfter"] = below + start_after
        found: list[str] = []
        while True:
            page = await self._fs._call_s3("list_objects_v2", **where)
            found += [f"{bucket}/{item['Key']}" for item in page.get("Contents", ())]
            if not page.get("IsTruncated"):
                return found
            where["ContinuationToken"] = page["NextContinuationToken"]

    def _run(self, coroutine: Any, size_bytes: int = 0) -> Any:
        return run_within(self._fs.loop, coroutine, self._patience.seconds_for(size_bytes))


class _Body(io.RawIOBase):
    """Reads a buffer without copying it."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        piece = self._view[self._at : self._at + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


_UNKNOWN_BYTES = 2**30
"""What a read without an end is given time for."""
