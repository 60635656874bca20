"""A copy goes to an empty place or on with its own, and overwrites nobody else's."""

from pathlib import Path

import pytest

from checkpointing.copying import copy_run
from checkpointing.destination import put_once
from storage.errors import ConfigurationError
from storage.log import Log
from storage.store import LocalStore
from tests.made_runs import contents, go_on, make_run


@pytest.fixture
def source(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "source")
    make_run(store, 1, 2)
    return store


def test_a_destination_that_holds_something_else_is_refused_and_left_alone(
    source: LocalStore, tmp_path: Path
) -> None:
    other, notes, gone_on = (LocalStore(tmp_path / name) for name in ("other", "notes", "on"))
    make_run(other, 1)
    other.put("run.json", b'{"format":1,"run":"other","identity":{}}')
    notes.put("notes.txt", b"mine")
    copy_run(source, gone_on)
    go_on(gone_on, 5)
    half = LocalStore(tmp_path / "half")
    make_run(half, 1)
    half.delete("run.json")
    for place, message in (
        (other, "other holds another run; give a new or empty place"),
        (notes, r"notes holds something that is no copy of the run \(notes.txt\); give a new"),
        (gone_on, "on has gone on by itself since it was copied: its log is not a beginning"),
        (half, "half holds another run"),
    ):
        before = contents(place)
        with pytest.raises(ConfigurationError, match=message):
            copy_run(source, place)
        assert contents(place) == before
    go_on(source, 7)
    with pytest.raises(ConfigurationError, match="on has gone on by itself"):
        copy_run(source, gone_on)


@pytest.mark.parametrize("place", ["source", "source/backup", ".", "source/../source"])
def test_a_destination_inside_the_source_is_refused(
    place: str, source: LocalStore, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match="lie in each other; give another place"):
        copy_run(source, LocalStore(tmp_path / place))


@pytest.mark.parametrize("kept_bytes", [0, 10])
@pytest.mark.parametrize("which", ["first", "last", "run.json"])
def test_what_a_killed_copy_left_torn_is_written_again(
    which: str, kept_bytes: int, source: LocalStore, tmp_path: Path
) -> None:
    """Where creation is not atomic, as on a mounted Google Drive."""
    destination = LocalStore(tmp_path / "copy")
    copy_run(source, destination)
    logged = destination.list("log/")
    left = {"first": logged[:1], "last": logged, "run.json": [*logged, "run.json"]}[which]
    for key in [*logged, "run.json"]:
        if key not in left:
            destination.delete(key)
    destination.put(left[-1], destination.get(left[-1])[:kept_bytes])
    copy_run(source, destination)
    assert contents(destination) == contents(source)
    assert Log(destination).refresh() == Log(source).refresh()
    assert destination.get("run.json") == source.get("run.json")


def test_a_run_begun_there_while_it_is_copied_is_not_touched(
    source: LocalStore, tmp_path: Path
) -> None:
    class Taken(LocalStore):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            if key == taken:
                super().put_if_absent(key, b"another's")
            return super().put_if_absent(key, data)

    last = source.list("log/")[-1]
    for taken, message in ((last, "has gone on by itself"), ("run.json", "holds another run")):
        destination = Taken(tmp_path / taken.replace("/", "-"))
        with pytest.raises(ConfigurationError, match=message):
            copy_run(source, destination)
        assert destination.get(taken) == b"another's"


def test_an_object_is_put_once(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert put_once(store, "a", b"data")
    assert put_once(store, "a", b"data")
    assert not put_once(store, "a", b"other")
    assert not put_once(store, "a", b"dat"), "what is there is longer"
    assert store.get("a") == b"data"
