"""The index: a round trip, and every way it can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_service.source_index import check_shard_name, parse_index
from storage.errors import DataError
from tests.made_sources import write_source


@pytest.fixture
def index(tmp_path: Path) -> dict[str, Any]:
    write_source(tmp_path)
    value: dict[str, Any] = json.loads((tmp_path / "index.json").read_bytes())
    return value


def test_an_index_goes_through_bytes_unchanged(index: dict[str, Any]) -> None:
    parsed = parse_index(json.dumps(index).encode(), where="x")
    again = parse_index(parsed.to_bytes(), where="x")
    assert again == parsed
    assert again.fingerprint == parsed.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.update(format="other"), "must say format 'rangeflow-source-1', found 'other'"),
        (lambda i: i.pop("validation"), "has no validation stamp"),
        (lambda i: i.update(validation={}), "stamp must be an object with a permille"),
        (lambda i: i["validation"].update(rule="random"), "split was made by .*random"),
        (lambda i: i.update(dtype="int64"), "dtype must be uint16 or uint32, found 'int64'"),
        (lambda i: i.pop("tokenizer"), "must give 'tokenizer' as dict, found None"),
        (lambda i: i["splits"].update(train={}), "must give 'train' as list"),
        (lambda i: i["splits"].update(train=[3]), "a shard must be an object, found int"),
        (lambda i: i["splits"]["train"][0].update(tokens="9"), "'tokens' as int, found '9'"),
        (lambda i: i["splits"]["train"][0].update(tokens=-9), "'tokens' of at least 0, found -9"),
        (lambda i: i["splits"]["train"].append(i["splits"]["train"][0]), "names a shard twice"),
    ],
)
def test_a_bad_index_is_refused(
    index: dict[str, Any], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    change(index)
    with pytest.raises(DataError, match=message):
        parse_index(json.dumps(index).encode(), where="source 'x'")


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"3", b"\xff"])
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"is not JSON|must say format"):
        parse_index(data, where="source 'x'")


@pytest.mark.parametrize("name", ["../x", "a/b", "", "..", ".hidden", "a..b", "a b", "é", "a\n"])
def test_a_shard_name_that_could_leave_the_source_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="a shard's name must be"):
        check_shard_name(name, where="source 'x'")
