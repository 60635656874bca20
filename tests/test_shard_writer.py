"""Shards: names that sort as their numbers, masks only where they say something."""

from pathlib import Path

import numpy as np

from data_service.shard_format import npy_array
from data_service.shard_writer import Encoded, are_there, encoded, sortable, write_shards
from data_service.tokenizer import make_tokenizer
from storage.store import open_store

BYTES = make_tokenizer("bytes-chat")


def test_names_sort_in_the_order_of_numbers() -> None:
    numbers = [0, 1, 9, 10, 11, 99, 100, 12345, 99999, 100000, 999999, 1000000]
    for digits in (1, 5):
        names = [sortable(number, digits) for number in numbers]
        assert sorted(names) == names
    assert sortable(7, 5) == "00007"


def test_shards_are_cut_evenly_and_ends_are_theirs(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    documents = [encoded("x" * n, BYTES) for n in (5, 30, 2, 60)]
    entries = write_shards(
        store, "train-00000", 3, documents, shard_tokens=40, announce=lambda phase: None
    )
    assert [entry.name for entry in entries] == ["train-00000-3", "train-00000-4", "train-00000-5"]
    assert sum(entry.tokens for entry in entries) == 101
    assert max(entry.tokens for entry in entries) <= 40
    tokens = np.concatenate([npy_array(store.get(entry.tokens_key)) for entry in entries])
    at = np.cumsum([0, *(entry.tokens for entry in entries)])
    ends = [npy_array(store.get(e.ends_key)) + lo for e, lo in zip(entries, at, strict=False)]
    assert np.concatenate(ends).tolist() == (np.flatnonzero(tokens == 256) + 1).tolist()
    assert are_there(store, entries)
    store.delete(entries[1].ends_key)
    assert not are_there(store, entries)


def test_a_mask_is_written_where_something_is_not_learnt(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    ids = np.arange(20, dtype="<u2")
    documents = [
        Encoded(ids, None),
        Encoded(ids, np.arange(20) % 3 == 0),
        Encoded(ids, np.ones(20, dtype=bool)),
    ]
    entries = write_shards(store, "a", 0, documents, shard_tokens=20, announce=lambda phase: None)
    assert [entry.mask_bytes > 0 for entry in entries] == [False, True, False]
    bits = npy_array(store.get(entries[1].mask_key))
    assert bits.dtype == np.uint8
    learn = np.unpackbits(bits, bitorder="little", count=20)
    assert learn.tolist() == (np.arange(20) % 3 == 0).astype(int).tolist()


def test_nothing_gives_no_shard(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert write_shards(store, "a", 0, [], shard_tokens=9, announce=lambda phase: None) == []
