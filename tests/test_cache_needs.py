"""What processes that share a cache tell each other, and that it ends with them."""

import signal
from pathlib import Path

import pytest

from data_service.cache_folder import CacheFolder
from tests.cache_users import LIMIT, other_process


@pytest.fixture
def folder(tmp_path: Path) -> CacheFolder:
    return CacheFolder(tmp_path / "cache", limit_bytes=LIMIT)


def test_needs_of_other_groups_are_added_and_end_with_their_processes(folder: CacheFolder) -> None:
    other, third = (CacheFolder(folder.folder, limit_bytes=LIMIT) for _ in range(2))
    folder.needs.register("run a", 300)
    assert folder.needs.of_others("run a") == 0
    other.needs.register("run b", 500)
    third.needs.register("run b", 400)
    assert other.needs.of_others("run b") == 300
    assert folder.needs.of_others("run a") == 500
    with other_process(folder, "folder.needs.register('run c', 70)") as process:
        assert folder.needs.of_others("run a") == 570
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert folder.needs.of_others("run a") == 500
    other.needs.unregister()
    assert folder.needs.of_others("run a") == 400
    third.needs.register("run a", 400)
    assert folder.needs.of_others("run a") == 0


def test_asking_is_heard_by_all_and_ends_with_the_process(folder: CacheFolder) -> None:
    assert folder.needs.asked() == ""
    with folder.needs.asking("ahead"):
        assert folder.needs.asked() == "ahead"
        with folder.needs.asking("all"):
            assert folder.needs.asked() == "all"
        assert folder.needs.asked() == "ahead"
    assert folder.needs.asked() == ""
    with other_process(folder, "ask = folder.needs.asking('all')", "ask.__enter__()") as process:
        assert folder.needs.asked()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not folder.needs.asked()
