"""The table of shards: what goes in comes out, and no bad name gets in, in a column or alone."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_service.shard_table import (
    ShardEntry,
    ShardTable,
    check_apart,
    check_shard_name,
    name_key,
)
from storage.canonical import sha256_hex
from storage.errors import DataError

names = st.text("aZ0._-", min_size=1, max_size=9)


def is_name(name: str) -> bool:
    try:
        check_shard_name(name, where="x")
    except DataError:
        return False
    return True


def entry(name: str, **changes: object) -> ShardEntry:
    digest = sha256_hex(name.encode())
    made = ShardEntry(
        name=name,
        tokens=len(name),
        bytes=10**10,
        sha256=digest,
        documents=0,
        ends_bytes=7,
        ends_sha256=digest[::-1],
    )
    return replace(made, **changes)  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(chosen=st.sets(names.filter(is_name)), masked=st.booleans())
def test_entries_come_back_sorted_by_name_from_memory_and_from_bytes(
    chosen: set[str], masked: bool
) -> None:
    mask: dict[str, object] = {"mask_bytes": 5, "mask_sha256": "ab" * 32} if masked else {}
    entries = [entry(name, **mask) for name in chosen]
    table = ShardTable.of(entries)
    data = table.to_bytes()
    again = ShardTable.from_bytes(
        data, rows=len(table), name_bytes=table.name_bytes, where="source 'x'"
    )
    for one in (table, again):
        assert list(one) == sorted(entries, key=lambda made: made.name)
        assert one.digest == sha256_hex(data)
        assert [one.row(made.name) for made in one] == list(range(len(one)))
        assert one.name_keys.tolist() == [name_key(made.name) for made in one]
    assert table == again
    assert table.row("not-there") is None
    assert table.row("a much longer name than any") is None


def test_the_bytes_are_frozen() -> None:
    table = ShardTable.of([entry("b"), entry("a-1", mask_bytes=3, mask_sha256="0f" * 32)])
    assert len(table.to_bytes()) == 2 * (6 * 8 + 3 * 32 + 3)
    assert table.digest == "c4a813360de16343e1e20579ddccfa28fbde93e5b1b5dd8e3d38312bf2b2b5f5"


@settings(max_examples=200, deadline=None)
@given(
    chosen=st.lists(
        st.text("aZ09-_./@[`{: \0\n\x80", max_size=4), min_size=1, max_size=4, unique=True
    )
)
def test_a_column_of_names_is_refused_when_one_of_them_would_be(chosen: list[str]) -> None:
    column = np.array(sorted(name.encode("latin-1") for name in chosen), dtype="S4")
    good = ShardTable.of([entry("x", sha256="0" * 64)] * 0)  # an empty one, for its columns
    columns = {
        name: np.zeros(len(column), dtype=kind.dtype) for name, kind in good._columns.items()
    }
    columns["name"] = column
    # numpy drops zeros at an end, so these are the names that a table can hold.
    held = [bytes(name).decode("latin-1") for name in column]
    if all(map(is_name, held)) and len(set(held)) == len(held):
        ShardTable(columns, where="source 'x'")
    else:
        with pytest.raises(DataError, match="source 'x'"):
            ShardTable(columns, where="source 'x'")


def test_names_twice_and_names_out_of_order_are_refused() -> None:
    with pytest.raises(DataError, match="shard 'a' is named twice"):
        ShardTable.of([entry("a"), entry("b"), entry("a")])
    table = ShardTable.of([entry("a"), entry("b")])
    data = table.to_bytes()
    with pytest.raises(DataError, match="source 'x': the table's names must ascend, found 'a'"):
        ShardTable.from_bytes(data[:-2] + b"ba", rows=2, name_bytes=1, where="source 'x'")


def test_a_size_below_zero_is_refused_with_its_shard() -> None:
    with pytest.raises(DataError, match="shard b must have 'tokens' of at least 0, found -4"):
        ShardTable.of([entry("a"), entry("b", tokens=-4)])


@pytest.mark.parametrize("digest", ["", "ab", "z" * 64, "AB" * 32])
def test_what_is_no_digest_is_refused(digest: str) -> None:
    with pytest.raises(DataError, match="shard a must have 'sha256' of 64 hexadecimal digits"):
        ShardTable.of([entry("a", sha256=digest)])
    with pytest.raises(DataError, match="shard a must have 'mask_sha256' of 64 hex"):
        ShardTable.of([entry("a", mask_bytes=1, mask_sha256=digest)])


def test_a_shard_of_both_splits_is_refused() -> None:
    everything = ["a", "b", "c", "d"]
    for size in range(5):
        for chosen in itertools.combinations(everything, size):
            rest = [name for name in everything if name not in chosen]
            one, other = (ShardTable.of(map(entry, some)) for some in (chosen, rest))
            check_apart(one, other, where="x")
            for name in chosen:
                with_it = ShardTable.of(map(entry, [*rest, name]))
                with pytest.raises(DataError, match=f"x: shard '{name}' is in train and in val"):
                    check_apart(one, with_it, where="x")
