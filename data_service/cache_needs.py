"""What processes that share a cache tell each other: how much each needs, and who lacks room."""

import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from data_service.folder_lock import FolderLock, abandoned

READERS, ASKING = "readers", "asking"
FOLDERS = (READERS, ASKING)
AHEAD, ALL = "ahead", "all"


class CacheNeeds:
    """Files below a cache's folder, locked by the processes that they speak for."""

    def __init__(self, lock: FolderLock) -> None:
        self._lock = lock
        self._folder = lock.folder / READERS
        self._asking = lock.folder / ASKING
        self._registered: int | None = None

    def register(self, group: str, minimum_bytes: int) -> None:
        """Tell other processes what this one cannot do without.

        Processes of one group read the same objects at about the same time, and count once. Holds
        until the process ends or registers again.
        """
        with self._lock.held():
            self.unregister()
            path = self._folder / uuid.uuid4().hex
            self._registered = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            fcntl.flock(self._registered, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                os.write(self._registered, json.dumps([group, minimum_bytes]).encode())
            except OSError:  # a full disk; what it left must not be taken for a need
                self.unregister()
                raise

    def of_others(self, group: str) -> int:
        """What the registered processes of other groups cannot do without, in bytes."""
        needed: dict[str, int] = {}
        with self._lock.held():
            for path in list(self._folder.iterdir()):
                if abandoned(path):
                    path.unlink()
                    continue
                other, minimum_bytes = json.loads(path.read_bytes())
                needed[other] = max(minimum_bytes, needed.get(other, 0))
        needed.pop(group, None)
        return sum(needed.values())

    def unregister(self) -> None:
        """Need nothing any more. The file is then one that nobody locks."""
        if self._registered is not None:
            os.close(self._registered)
            self._registered = None

    @contextmanager
    def asking(self, how_much: str) -> Iterator[None]:
        """Asks all processes to give up what they do not read yet (AHEAD), or everything (ALL)."""
        with self._lock.held():
            descriptor = os.open(self._asking / how_much, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        try:
            yield
        finally:
            os.close(descriptor)

    def asked(self) -> str:
        """What some process is `asking` for: ALL, AHEAD, or "" for nothing."""
        with self._lock.held():
            for how_much in (ALL, AHEAD):
                path = self._asking / how_much
                if path.exists() and not abandoned(path):
                    return how_much
        return ""
