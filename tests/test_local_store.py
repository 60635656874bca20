"""A folder as a store: interrupted writes, full and read-only disks, Google Drive."""

import errno
import logging
import mmap
import os
import random
from pathlib import Path

import pytest

from storage.errors import ConfigurationError, StoreRefusedError, StoreUnavailableError
from storage.log import Draft, Log
from storage.store import LocalStore, open_store
from tests.places import drive


def test_an_interrupted_write_leaves_the_old_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreUnavailableError, match="no space left; free some"):
        store.put("a", b"new")
    with pytest.raises(StoreUnavailableError, match="no space left"):
        store.put_if_absent("b", b"new")
    monkeypatch.undo()
    assert store.get("a") == b"old"
    assert store.list("") == ["a"]
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_temporaries_of_killed_writers_are_swept(tmp_path: Path) -> None:
    folder = tmp_path / ".tmp"
    folder.mkdir()
    (folder / "old").write_bytes(b"x")
    (folder / "young").write_bytes(b"x")
    os.utime(folder / "old", (0, 0))
    LocalStore(tmp_path).put("a", b"x")
    assert [path.name for path in folder.iterdir()] == ["young"]


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_hard_links_creation_still_excludes_and_warns_once(
    refusal: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with drive(refusal), caplog.at_level(logging.WARNING):
        store = LocalStore(tmp_path)
        assert store.put_if_absent("a", b"first")
        assert not store.put_if_absent("a", b"second")
        assert store.put_if_absent("b", b"x")
        store.put("c", b"x")
        assert store.get("a") == b"first"
        assert not store.creates_atomically
    assert len(caplog.records) == 1
    assert "Google Drive" in caplog.text and "train from one machine at a time" in caplog.text


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_rename_objects_are_written_in_place(
    refusal: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "replace", refuse)
    store = LocalStore(tmp_path)
    store.put("a/b", b"a long first content")
    store.put("a/b", memoryview(b"short"))
    assert store.get("a/b") == b"short"
    assert not store.creates_atomically
    assert len(caplog.records) == 1


def test_a_restart_knows_that_creation_is_not_atomic_before_it_creates(tmp_path: Path) -> None:
    """Else it would declare void at once what a slow writer has not finished."""
    with drive():
        Log(LocalStore(tmp_path)).append(lambda _: Draft(kind="NOTE", generation=1, body={}))
        (tmp_path / "log/0000000002.json").write_bytes(b'{"half":')
        waits: list[float] = []
        log = Log(LocalStore(tmp_path), sleep=waits.append)
        record = log.append(lambda _: Draft(kind="NOTE", generation=1, body={}))
    assert waits == [30.0]
    assert record is not None and record.voids == (2,)
    assert LocalStore(tmp_path / "other").creates_atomically
    assert LocalStore(tmp_path / "other").list("") == []


def test_a_full_disk_leaves_nothing_where_creation_is_not_atomic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:  # the temporary file is the first
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with drive():
        store = LocalStore(tmp_path)
        assert not store.creates_atomically
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StoreUnavailableError, match="no space left"):
            store.put_if_absent("a", b"new")
        assert store.list("") == []
        assert store.put_if_absent("a", b"new")


@pytest.mark.parametrize("refusal", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_permission_that_is_taken_away_may_come_back(
    refusal: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"x")

    def refuse(*arguments: object, **more: object) -> None:
        raise OSError(refusal, os.strerror(refusal))

    for name in ("open", "unlink", "link"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr("builtins.open", refuse)
    for act in (
        lambda: store.put("a", b"y"),
        lambda: store.put_if_absent("b", b"y"),
        lambda: store.get("a"),
        lambda: store.delete("a"),
    ):
        with pytest.raises(StoreRefusedError, match="Give this user the permission") as refused:
            act()
        assert refused.value.exit_code == 75
    monkeypatch.undo()
    store.put("a", b"y")
    assert store.put_if_absent("b", b"y") and store.creates_atomically
    assert caplog.records == [], "a refusal is not taken for Google Drive"


@pytest.mark.parametrize("below", ["", "/below", "/below/it"])
def test_a_place_that_is_a_file_or_lies_below_one_is_refused(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    url = f"{tmp_path}/file{below}"
    store = open_store(url)
    for act in (
        lambda: store.put("a/b", b"x"),
        lambda: store.put_if_absent("a/b", b"x"),
        lambda: store.get("a/b"),
        lambda: store.stat("a/b"),
        lambda: store.delete("a/b"),
    ):
        with pytest.raises(ConfigurationError) as refused:
            act()
        assert str(refused.value) == f"{url} is a file, expected a folder, or a new place"
    assert store.list("") == []
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_folder_that_a_deleter_takes_away_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, real = LocalStore(tmp_path), os.replace
    taken: list[Path] = []

    def replace(source: Path, target: Path) -> None:
        if not taken:
            taken.append(Path(target).parent)
            Path(target).parent.rmdir()
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    store.put("pins/a", b"x")
    assert taken and store.get("pins/a") == b"x"


@pytest.mark.parametrize("first", [0, 64, 1], ids=["aligned", "in a page", "odd"])
@pytest.mark.parametrize("size", [2**23 - 1, 2**23, 2**23 + 1, 2**24 + 4096, 2**24 + 5000])
def test_a_large_object_is_written_whole_from_any_memory(
    size: int, first: int, tmp_path: Path
) -> None:
    memory = mmap.mmap(-1, size + first)  # begins on a page, as arenas do
    memory[:] = random.Random(size).randbytes(size + first)
    data = memoryview(memory)[first:]
    store = LocalStore(tmp_path)
    store.put("a", data)
    assert store.get("a") == data


def test_links_to_folders_are_folders_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    root = tmp_path / "place"
    store = LocalStore(root)
    store.put("a/b", b"1")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "back").symlink_to(root)
    (root / "nowhere").symlink_to("nowhere")
    store.put("linked/c", b"2")
    assert store.list("") == ["a/b", "linked/c", "nowhere"]
    assert store.get("linked/c") == b"2"


def test_a_place_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="/proc/here cannot be made"):
        LocalStore(Path("/proc/here")).put("a", b"1")
