"""A folder of downloaded objects that the processes of a host share, never over its size.

An object is named by its sha256. On its way it is `<sha256>.part`, of its full size from the
beginning, under an exclusive lock of whoever writes it; who reads an object maps it, and the
mapping holds a shared lock for as long as it lives. So only what nobody reads can be evicted, and
what a killed process leaves is told by its missing lock. What is used is summed from the folder
itself each time: no count can be wrong after a crash. Every change is made under the folder's lock.

Covers: processes of one run and of several, killed at any instant; a full disk; other sizes given
by other processes.
Does not cover: folders on network file systems, whose locks other hosts do not see; what others
write into the folder.
"""

import fcntl
import mmap
import os
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from data_service import cache_needs
from data_service.cache_needs import CacheNeeds
from data_service.folder_lock import LOCK_SECONDS, FolderLock, abandoned, exclusive, told
from storage.errors import ConfigurationError, StoreUnavailableError
from storage.local_store import expanded

_PART = ".part"
_SHA256 = re.compile("[0-9a-f]{64}")


class Mapped(NamedTuple):
    """The bytes of an object, which is not evicted as long as they, or an array of them, live.

    `identity` tells the file from another of its name: its inode, and when it was written.
    """

    data: mmap.mmap | bytes
    identity: tuple[int, int]


class NoRoomError(StoreUnavailableError):
    """Nothing more may be evicted for an object. `others`: other processes may make room."""

    def __init__(self, message: str, *, others: bool) -> None:
        super().__init__(message)
        self.others = others


class CacheFolder:
    """The objects in `folder`, together at most `limit_bytes`. Any thread may use it."""

    def __init__(
        self, folder: Path, *, limit_bytes: int, lock_seconds: float = LOCK_SECONDS
    ) -> None:
        self.folder = expanded(folder).absolute()
        self.limit_bytes = limit_bytes
        self._objects = self.folder / "objects"
        self._lock = FolderLock(
            self.folder, inside=(self._objects.name, *cache_needs.FOLDERS), seconds=lock_seconds
        )
        self.needs = CacheNeeds(self._lock)
        try:
            with self._lock.held():
                self._sweep()
        except StoreUnavailableError as error:
            raise ConfigurationError(f"{error}; give the cache another folder") from error

    def open(self, sha256: str) -> Mapped | None:
        """An object, mapped, or None when it is not there. It is as it was found: not verified."""
        with self._lock.held():
            try:
                descriptor = os.open(self._objects / sha256, os.O_RDONLY)
            except FileNotFoundError:
                return None
            try:
                return _mapped(descriptor)
            finally:
                os.close(descriptor)

    def reserve(
        self,
        sha256: str,
        size_bytes: int,
        victims: Iterable[str] = (),
        release: Callable[[str], object] = lambda sha256: None,
    ) -> "Part | None":
        """Room for an object, or None when it is there by now or another process fetches it.

        Objects are evicted in the order of `victims`, as far as needed, and none if that does not
        suffice; `release` is called for each first, so that this process can give up its mapping.
        Raises NoRoomError.
        """
        with self._lock.held():
            alive = self._sweep()
            if (self._objects / sha256).exists() or self._part(sha256).name in alive:
                return None
            self._make_room(size_bytes, victims, release, others=bool(alive))
            path = self._part(sha256)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(descriptor, size_bytes)
            except OSError:
                path.unlink()
                os.close(descriptor)
                raise
            return Part(self, sha256, size_bytes, descriptor, path)

    def discard(self, sha256: str, damaged: Mapped) -> None:
        """Remove an object that is not what its name says, unless it is another one by now."""
        with self._lock.held():
            path = self._objects / sha256
            if path.exists() and path.stat().st_ino == damaged.identity[0]:
                path.unlink()

    def objects(self) -> dict[str, int]:
        """The objects that are there: sha256 to the time of the last use, in nanoseconds."""
        with self._lock.held():
            found = ((path, path.stat()) for path in self._objects.iterdir())
            return {p.name: stat.st_atime_ns for p, stat in found if _SHA256.fullmatch(p.name)}

    def used_bytes(self) -> int:
        """What all objects take up, those on their way in full."""
        with self._lock.held():
            return self._used()

    def finish(self, part: "Part") -> Mapped:
        """The object of a part that is written, in its place, and mapped."""
        with self._lock.held():
            os.replace(part.path, self._objects / part.sha256)
            fcntl.flock(part.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            mapped = _mapped(part.descriptor)
        os.close(part.descriptor)
        return mapped

    def drop(self, part: "Part") -> None:
        """Remove a part."""
        try:
            with self._lock.held():
                part.path.unlink(missing_ok=True)
        finally:
            os.close(part.descriptor)

    def _part(self, sha256: str) -> Path:
        return self._objects / f"{sha256}{_PART}"

    def _used(self) -> int:
        return sum(path.stat().st_size for path in self._objects.iterdir())

    def _sweep(self) -> set[str]:
        """Remove the parts of dead writers; the names of the others."""
        alive = set()
        for path in list(self._objects.glob(f"*{_PART}")):
            if abandoned(path):
                path.unlink()
            else:
                alive.add(path.name)
        return alive

    def _make_room(
        self,
        size_bytes: int,
        victims: Iterable[str],
        release: Callable[[str], object],
        *,
        others: bool,
    ) -> None:
        """Evict until `size_bytes` more fit into the limit and on the disk, or not at all."""
        used, free = self._used(), self._free()
        room = min(self.limit_bytes - used, free)
        taken: list[tuple[Path, int]] = []
        try:
            for name in victims:
                if room >= size_bytes:
                    break
                release(name)
                path = self._objects / name
                descriptor = exclusive(path)
                if descriptor is None:
                    others = others or path.exists()
                    continue
                taken.append((path, descriptor))
                room += os.fstat(descriptor).st_size
            if room < size_bytes:
                raise NoRoomError(self._why(size_bytes, used, free), others=others)
            for path, _ in taken:
                path.unlink()
        finally:
            for _, descriptor in taken:
                os.close(descriptor)

    def _free(self) -> int:
        """Free bytes of the disk, less what parts have reserved and not written yet."""
        disk = os.statvfs(self._objects)
        parts = [path.stat() for path in self._objects.glob(f"*{_PART}")]
        unwritten = sum(max(0, part.st_size - part.st_blocks * 512) for part in parts)
        return disk.f_bavail * disk.f_frsize - unwritten

    def _why(self, size_bytes: int, used: int, free: int) -> str:
        if free < self.limit_bytes - used:
            return (
                f"the disk of the cache {self.folder} has {free:,} bytes free, and "
                f"{size_bytes:,} are needed; free some, or give the cache another folder"
            )
        return (
            f"the cache {self.folder} holds {used:,} of {self.limit_bytes:,} bytes, all of it in "
            f"use, and {size_bytes:,} more are needed; give it more"
        )


class Part:
    """An object on its way, written from one thread; `finish` or `drop` it."""

    def __init__(
        self, folder: CacheFolder, sha256: str, size_bytes: int, descriptor: int, path: Path
    ) -> None:
        self.sha256 = sha256
        self.size_bytes = size_bytes
        self.descriptor = descriptor
        self.path = path
        self._folder = folder

    def write(self, start: int, data: bytes) -> None:
        """Bytes from `start` on. Raises StoreUnavailableError when the disk is full."""
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self.descriptor, view, start)
                view, start = view[written:], start + written
        except OSError as error:
            raise StoreUnavailableError(f"the cache {self.path.parent}: {told(error)}") from error

    def finish(self) -> Mapped:
        """Give the object its name, and map it."""
        return self._folder.finish(self)

    def drop(self) -> None:
        """Remove it."""
        self._folder.drop(self)


def _mapped(descriptor: int) -> Mapped:
    """The file mapped, with a shared lock of its own: mmap keeps a duplicate of the descriptor."""
    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    stat = os.fstat(descriptor)
    with suppress(PermissionError):  # another user's
        os.utime(descriptor, ns=(time.time_ns(), stat.st_mtime_ns))
    data = mmap.mmap(descriptor, stat.st_size, access=mmap.ACCESS_READ) if stat.st_size else b""
    return Mapped(data, (stat.st_ino, stat.st_mtime_ns))
