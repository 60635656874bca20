"""Locks on files, which end with the process that has them: on a folder, and on files in it."""

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from storage.errors import StoreUnavailableError

LOCK_SECONDS = 60.0
_LONGEST_POLL_SECONDS = 0.02


class FolderLock:
    """A folder, and folders in it, that one thread of one process changes at a time."""

    def __init__(
        self, folder: Path, *, inside: Sequence[str], seconds: float = LOCK_SECONDS
    ) -> None:
        self.folder = folder
        self._inside = tuple(inside)
        self._seconds = seconds
        self._threads = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Alone with the folders, which are there; to be left after milliseconds.

        Raises StoreUnavailableError, also for what the disk refuses meanwhile.
        """
        deadline = time.monotonic() + self._seconds
        if not self._threads.acquire(timeout=self._seconds):
            raise StoreUnavailableError(self._busy())
        descriptor = -1
        try:
            try:
                descriptor = self._lock_file(deadline)
                yield
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
        except OSError as error:
            raise StoreUnavailableError(f"the cache {self.folder}: {told(error)}") from error
        finally:
            self._threads.release()

    def _lock_file(self, deadline: float) -> int:
        """The lock, until the descriptor is closed; not that of a folder that was removed."""
        path, poll = self.folder / "lock", 0.001
        while True:
            for name in self._inside:
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
            except BlockingIOError:
                pass
            except OSError:
                os.close(descriptor)
                raise
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise StoreUnavailableError(self._busy())
            time.sleep(poll)
            poll = min(2 * poll, _LONGEST_POLL_SECONDS)

    def _busy(self) -> str:
        return (
            f"the cache {self.folder} has been locked for {self._seconds:g} s by another "
            "process, which may hang or be stopped; end it, or give the cache another folder"
        )


def exclusive(path: Path) -> int | None:
    """A descriptor with an exclusive lock, or None: not there, or in use."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def abandoned(path: Path) -> bool:
    """Whether no process has a lock on the file."""
    descriptor = exclusive(path)
    if descriptor is None:
        return False
    os.close(descriptor)
    return True


def told(error: OSError) -> str:
    """What a disk refused, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left; free some, or give the cache another folder"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error.strerror}; give this user the permission to write there"
    return error.strerror or type(error).__name__
