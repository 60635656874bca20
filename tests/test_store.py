"""The store contract, over a local folder and an fsspec place alike."""

import errno
import os
import uuid
from pathlib import Path

import pytest

from storage.errors import ConfigurationError, StoreUnavailableError
from storage.store import LocalStore, Store, check_key, open_store


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "place"))
    return open_store(f"memory://{uuid.uuid4().hex}/place")


def test_the_first_creation_wins(store: Store) -> None:
    assert store.put_if_absent("log/1.json", b"first")
    assert not store.put_if_absent("log/1.json", b"second")
    assert store.get("log/1.json") == b"first"


def test_put_replaces_the_whole_object(store: Store) -> None:
    store.put("a/b", b"a long first content")
    store.put("a/b", memoryview(b"short"))
    assert store.get("a/b") == b"short"
    assert store.stat("a/b").size_bytes == 5


def test_ranges_are_half_open_and_may_reach_past_the_end(store: Store) -> None:
    store.put("a", b"0123456789")
    assert store.get("a", 2, 5) == b"234"
    assert store.get("a", 8) == b"89"
    assert store.get("a", 0, 99) == b"0123456789"


def test_what_is_not_there_is_said_so(store: Store) -> None:
    with pytest.raises(FileNotFoundError):
        store.get("nothing")
    with pytest.raises(FileNotFoundError):
        store.stat("nothing")
    store.delete("nothing")
    assert store.list("") == []


def test_listings_are_sorted_complete_and_begin_after(store: Store) -> None:
    for key in ("b/2", "b/10", "a", "b/c/1", "bb"):
        store.put(key, b"x")
    assert store.list("") == ["a", "b/10", "b/2", "b/c/1", "bb"]
    assert store.list("b/") == ["b/10", "b/2", "b/c/1"]
    assert store.list("b") == ["b/10", "b/2", "b/c/1", "bb"]
    assert store.list("b/", start_after="b/2") == ["b/c/1"]


def test_a_deleted_object_leaves_no_trace(store: Store) -> None:
    store.put("x/y/z", b"1")
    store.delete("x/y/z")
    assert store.list("") == []


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../up", "a/../b", "a//b", ".hidden", "a/", "a b", "ä"]
)
def test_a_key_cannot_leave_the_store(key: str, store: Store) -> None:
    with pytest.raises(ConfigurationError, match="is not a key"):
        check_key(key)
    with pytest.raises(ConfigurationError, match="is not a key"):
        store.put(key, b"x")


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


def test_without_hard_links_creation_still_excludes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = LocalStore(tmp_path)
    assert store.put_if_absent("a", b"first")
    assert not store.put_if_absent("a", b"second")
    assert store.get("a") == b"first"
    assert not store.creates_atomically


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


def test_a_url_with_credentials_or_of_no_known_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="holds credentials") as error:
        open_store("s3://me:secret@host/bucket")
    assert "secret" not in str(error.value)
    with pytest.raises(ConfigurationError, match="no store for nosuch:// URLs"):
        open_store("nosuch://place")
    with pytest.raises(ConfigurationError, match="is empty"):
        open_store("")


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


@pytest.mark.parametrize("url", ["zip://x.zip", "reference://x", "dir://x"])
def test_places_that_cannot_hold_a_run_are_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"no store for|cannot hold objects"):
        open_store(url).put("a", b"x")
