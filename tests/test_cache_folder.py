"""The cache's folder: never over its size, whatever its processes do, and however they end."""

import errno
import fcntl
import gc
import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from data_service.cache_folder import CacheFolder, Mapped, NoRoomError, Part
from storage.errors import ConfigurationError, StoreUnavailableError
from tests.cache_users import LIMIT, other_process
from tests.test_bad_input import fill, small_disk

__all__ = ["small_disk"]


@pytest.fixture
def folder(tmp_path: Path) -> CacheFolder:
    return CacheFolder(tmp_path / "cache", limit_bytes=LIMIT)


def named(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def added(folder: CacheFolder, data: bytes, victims: list[str] | None = None) -> Mapped:
    part = folder.reserve(named(data), len(data), victims or [])
    assert part is not None
    part.write(0, data)
    return part.finish()


def content(number: int, size: int = 400) -> bytes:
    return bytes([number]) * size


def test_an_object_is_there_once_it_is_finished(folder: CacheFolder) -> None:
    part = folder.reserve(named(b"abc"), 3)
    assert part is not None
    part.write(0, b"a")
    assert folder.open(named(b"abc")) is None
    part.write(1, b"bc")
    part.finish()
    found = folder.open(named(b"abc"))
    assert found is not None and bytes(found.data) == b"abc"


def test_an_object_counts_in_full_from_the_moment_it_is_reserved(folder: CacheFolder) -> None:
    part = folder.reserve("a", 900)
    assert part is not None
    assert folder.used_bytes() == 900
    with pytest.raises(NoRoomError, match=r"holds 900 of 1,000 bytes.* 101 more are needed"):
        folder.reserve("b", 101)
    part.drop()
    assert folder.used_bytes() == 0


def test_one_object_is_fetched_by_one_at_a_time(folder: CacheFolder) -> None:
    part = folder.reserve("a", 10)
    assert part is not None
    assert folder.reserve("a", 10) is None
    part.drop()
    assert folder.reserve("a", 10) is not None


def test_what_is_there_is_not_fetched_again(folder: CacheFolder) -> None:
    added(folder, content(1))
    assert folder.reserve(named(content(1)), 400) is None


def test_victims_go_in_their_order_and_no_more_than_needed(folder: CacheFolder) -> None:
    names = [named(content(n, 300)) for n in range(3)]
    for number in range(3):
        added(folder, content(number, 300))
    added(folder, content(9, 400), [names[2], names[0], names[1]])
    assert set(folder.objects()) == {names[0], names[1], named(content(9, 400))}


def test_nothing_is_evicted_if_that_does_not_suffice(folder: CacheFolder) -> None:
    added(folder, content(1))
    held = added(folder, content(2))
    with pytest.raises(NoRoomError) as refused:
        added(folder, content(3, 700), [named(content(1)), named(content(2))])
    assert refused.value.others
    assert len(folder.objects()) == 2
    assert held.data


def test_what_is_mapped_is_not_evicted_until_the_mapping_is_gone(folder: CacheFolder) -> None:
    held: Mapped | None = added(folder, content(1, 800))
    with pytest.raises(NoRoomError):
        added(folder, content(2), [named(content(1, 800))])
    del held
    gc.collect()
    added(folder, content(2), [named(content(1, 800))])
    assert set(folder.objects()) == {named(content(2))}


def test_what_another_process_has_mapped_is_not_evicted_while_it_lives(
    folder: CacheFolder,
) -> None:
    name = named(content(1, 800))
    added(folder, content(1, 800))
    with other_process(folder, f"mapped = folder.open({name!r})") as process:
        with pytest.raises(NoRoomError) as refused:
            added(folder, content(2), [name])
        assert refused.value.others
        process.send_signal(signal.SIGKILL)
        process.wait()
        added(folder, content(2), [name])


def test_control_without_locks_what_is_mapped_would_be_evicted(
    folder: CacheFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, how: None)
    held = added(folder, content(1, 800))
    added(folder, content(2), [named(content(1, 800))])
    assert held.data[:1] == b"\1"  # 1,200 bytes of disk are in use


def test_what_this_process_can_give_up_it_is_asked_to(folder: CacheFolder) -> None:
    held = {named(content(1, 800)): added(folder, content(1, 800))}
    part = folder.reserve("b", 400, list(held), held.pop)
    assert part is not None
    assert not held


def test_a_killed_download_leaves_nothing_that_counts(folder: CacheFolder) -> None:
    begin = ("part = folder.reserve('a', 900)", "part.write(0, bytes(500))")
    with other_process(folder, *begin) as process:
        assert folder.used_bytes() == 900
        assert folder.reserve("a", 900) is None  # on its way
        with pytest.raises(NoRoomError):
            folder.reserve("b", 200)
        process.send_signal(signal.SIGKILL)
        process.wait()
    part = folder.reserve("b", 200)
    assert part is not None
    assert folder.used_bytes() == 200
    assert not list(folder.folder.glob("objects/a*"))


def test_a_new_start_sweeps_what_killed_downloads_left(folder: CacheFolder) -> None:
    (folder.folder / "objects" / "a.part").write_bytes(bytes(500))
    CacheFolder(folder.folder, limit_bytes=LIMIT)
    assert folder.used_bytes() == 0


def test_a_damaged_object_is_discarded_and_not_its_successor(folder: CacheFolder) -> None:
    name = named(content(1))
    damaged = added(folder, content(1))
    folder.discard(name, damaged)
    assert folder.open(name) is None
    added(folder, content(1))
    folder.discard(name, damaged)
    assert folder.open(name) is not None


def test_a_file_written_since_is_told_from_the_one_before(folder: CacheFolder) -> None:
    name = named(content(1))
    before = added(folder, content(1))
    again = folder.open(name)
    assert again is not None and again.identity == before.identity
    path = folder.folder / "objects" / name
    os.utime(path, ns=(0, 1))
    changed = folder.open(name)
    assert changed is not None and changed.identity != before.identity


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"Not a directory.*; give the cache another"):
        CacheFolder(tmp_path / "file" / "cache", limit_bytes=LIMIT)


def test_a_disk_without_room_is_said(small_disk: Path) -> None:
    folder = CacheFolder(small_disk / "cache", limit_bytes=2**30)
    with pytest.raises(NoRoomError, match=r"has [\d,]+ bytes free, and 5,242,880 are needed"):
        folder.reserve("a", 5 * 2**20)


def test_parts_that_are_not_yet_written_count_on_the_disk(small_disk: Path) -> None:
    folder = CacheFolder(small_disk / "parts", limit_bytes=2**30)
    part = folder.reserve("a", 2**21)
    with pytest.raises(NoRoomError, match="bytes free"):
        folder.reserve("b", 2**21 + 2**20)
    assert part is not None
    part.drop()


def test_a_disk_that_fills_up_during_a_download_leaves_no_half_object(small_disk: Path) -> None:
    folder = CacheFolder(small_disk / "half", limit_bytes=2**30)
    part = folder.reserve("a", 2**20)
    assert part is not None
    fill(small_disk)
    with pytest.raises(StoreUnavailableError, match="no space left; free some"):
        part.write(0, bytes(2**20))
    part.drop()
    (small_disk / "filler").unlink()
    assert not folder.objects() and not folder.used_bytes()


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "no space left; free some"),
        (errno.EROFS, "give this user the permission"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_what_a_disk_refuses_is_explained(
    folder: CacheFolder, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(StoreUnavailableError, match=said):
        folder.reserve("a", 10)
    monkeypatch.undo()
    assert folder.used_bytes() == 0


def test_writes_that_take_a_part_are_completed(
    folder: CacheFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite: Callable[..., int] = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda d, data, at: pwrite(d, bytes(data[:7]), at))
    part: Part | None = folder.reserve(named(b"0123456789"), 10)
    assert part is not None
    part.write(0, b"0123456789")
    assert bytes(part.finish().data) == b"0123456789"
