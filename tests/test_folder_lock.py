"""The lock of a folder: one holder, every wait ends, and it goes with its process."""

import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_service.cache_folder import CacheFolder
from data_service.folder_lock import FolderLock, abandoned
from storage.errors import StoreUnavailableError
from tests.cache_users import LIMIT, other_process


def test_a_stopped_process_that_has_the_lock_is_waited_for_in_vain(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, limit_bytes=LIMIT, lock_seconds=0.05)
    with (
        other_process(folder, "lock = folder._lock.held()", "lock.__enter__()"),
        pytest.raises(StoreUnavailableError, match=r"has been locked for 0\.05 s by another"),
    ):
        folder.used_bytes()


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, limit_bytes=LIMIT)
    begin = ("lock = folder._lock.held()", "lock.__enter__()")
    with other_process(folder, *begin) as process:
        assert not abandoned(tmp_path / "lock")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert folder.used_bytes() == 0


def test_a_folder_removed_in_the_middle_is_made_again(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "cache", inside=("a", "b"))
    for _ in range(2):
        with lock.held():
            assert (tmp_path / "cache" / "b").is_dir()
        shutil.rmtree(tmp_path / "cache")


def test_two_threads_do_not_hold_it_at_once(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, inside=("a",), seconds=0.05)
    with (
        lock.held(),
        ThreadPoolExecutor(1) as other,
        pytest.raises(StoreUnavailableError, match="has been locked"),
    ):
        other.submit(lock.held().__enter__).result()
