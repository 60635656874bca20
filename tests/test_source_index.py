"""The index: a round trip, and every way it can be wrong."""

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_service.source_index import check_shard_name, entry_from_json, read_index, write_index
from storage.errors import DataError, IntegrityError
from storage.store import Store, open_store
from tests.made_sources import write_source


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A source whose tables are mapped, and one whose tables are read."""
    place = str(tmp_path / "web") if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    return open_store(write_source(place))


def table_key(store: Store) -> str:
    return next(key for key in store.list("train-") if key.endswith(".table"))


def test_an_index_goes_through_a_store_unchanged(store: Store, tmp_path: Path) -> None:
    index = read_index(store, where="x")
    other = open_store(str(tmp_path / "other"))
    write_index(other, index)
    again = read_index(other, where="x")
    assert again == index
    assert again.fingerprint == index.fingerprint
    assert [entry.name for entry in again.train] == ["train-00000", "train-00001"]
    assert [entry.tokens for entry in again.shards("validation")] == [200]


def test_the_index_is_written_after_its_tables(tmp_path: Path) -> None:
    index = read_index(open_store(write_source(tmp_path / "a")), where="x")
    written: list[str] = []

    class Recording:
        def put(self, key: str, data: bytes) -> None:
            written.append(key)

    write_index(Recording(), index)  # type: ignore[arg-type]
    assert [key.partition("-")[0] for key in written] == ["train", "validation", "index.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.update(format="other"), "must say format 'rangeflow-source-2', found 'other'"),
        (
            lambda i: i.update(format="rangeflow-source-1"),
            "found 'rangeflow-source-1'; prepare the source with this version",
        ),
        (lambda i: i.pop("validation"), "has no validation stamp"),
        (lambda i: i.update(validation={}), "stamp must be an object with a permille"),
        (lambda i: i["validation"].update(rule="random"), "split was made by .*random"),
        (lambda i: i.update(dtype="int64"), "dtype must be uint16 or uint32, found 'int64'"),
        (lambda i: i.pop("tokenizer"), "must give 'tokenizer' as dict, found None"),
        (lambda i: i["splits"].update(train=[]), "must give 'train' as dict"),
        (lambda i: i["splits"]["train"].update(shards="9"), "'shards' as int, found '9'"),
        (lambda i: i["splits"]["train"].update(shards=-9), "'shards' of at least 0, found -9"),
        (lambda i: i["splits"]["train"].update(shards=3), "a table of 3 shards .* found 310"),
        (lambda i: i["splits"]["train"].update(name_bytes=0), "'name_bytes' from 1 to 200, found"),
        (lambda i: i["splits"]["train"].update(name_bytes=10**9), "from 1 to 200, found 10000000"),
        (lambda i: i["splits"]["train"].update(sha256="../../x"), "'sha256', found '../../x'"),
        (lambda i: i["splits"]["train"].update(sha256="0" * 64), r"train-0+\.table is missing"),
    ],
)
def test_a_bad_index_is_refused(
    store: Store, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    value = json.loads(store.get("index.json"))
    change(value)
    store.put("index.json", json.dumps(value).encode())
    with pytest.raises(DataError, match=message):
        read_index(store, where="source 'x'")


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"3", b"\xff", b"[" * 10**5])
def test_what_is_no_json_object_is_refused(store: Store, data: bytes) -> None:
    store.put("index.json", data)
    with pytest.raises(DataError, match=r"is not JSON|must say format"):
        read_index(store, where="source 'x'")


def test_a_changed_table_is_refused(store: Store) -> None:
    key = table_key(store)
    data = bytearray(store.get(key))
    data[40] ^= 1
    store.put(key, bytes(data))
    with pytest.raises(IntegrityError, match=r"source 'x'.*\.table has sha256 .* have changed"):
        read_index(store, where="source 'x'")


def test_an_empty_or_missing_table_is_refused(store: Store) -> None:
    key = table_key(store)
    store.put(key, b"")
    with pytest.raises((DataError, IntegrityError), match=r"cannot be read|has sha256"):
        read_index(store, where="source 'x'")
    store.delete(key)
    with pytest.raises(DataError, match=r"source 'x': the table train-.*\.table is missing; copy"):
        read_index(store, where="source 'x'")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "a shard must be an object, found int"),
        ({"name": "a", "tokens": "9"}, "'tokens' as int, found '9'"),
        ({"name": "a", "tokens": -9}, "'tokens' of at least 0, found -9"),
    ],
)
def test_an_entry_that_is_none_is_refused(value: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        entry_from_json(value, where="source 'x'")


@pytest.mark.parametrize("name", ["../x", "a/b", "", "..", ".hidden", "a..b", "a b", "é", "a\n"])
def test_a_shard_name_that_could_leave_the_source_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="a shard's name must be"):
        check_shard_name(name, where="source 'x'")
