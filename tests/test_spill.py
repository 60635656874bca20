"""The shuffle: all that goes in comes out, in an order that the seed and the place decide."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from data_service.shard_writer import Encoded
from data_service.spill import Spilled, bucket_of, read_bucket, shuffle_key, spill_bytes
from storage.store import Store, open_store

DTYPE = np.dtype("<u2")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def spilled(number: int, buckets: int, seed: int = 0) -> Spilled:
    key = shuffle_key(seed, 0, number, 0)
    ids = np.arange(number, number + 1 + number % 5).astype(DTYPE)
    learn = ids % 2 == 0 if number % 3 == 0 else None
    return Spilled(bucket_of(key, buckets), key, Encoded(ids, learn))


def as_lists(documents: list[Encoded]) -> list[tuple[list[int], list[bool] | None]]:
    return [(d.ids.tolist(), None if d.learn is None else d.learn.tolist()) for d in documents]


def test_each_document_is_in_one_bucket_whole_with_its_mask(store: Store) -> None:
    documents = [spilled(number, 4) for number in range(200)]
    store.put("a", spill_bytes(documents[:120], 4))
    store.put("b", spill_bytes(documents[120:], 4))
    found = [d for bucket in range(4) for d in read_bucket(store, ["a", "b"], bucket, DTYPE)]
    wanted = sorted(documents, key=lambda spilled: spilled.key)
    assert as_lists(found) == as_lists([spilled.document for spilled in wanted])


def test_the_order_is_that_of_the_keys_whatever_the_batches(store: Store) -> None:
    documents = [spilled(number, 3) for number in range(90)]
    store.put("whole", spill_bytes(documents, 3))
    store.put("odd", spill_bytes(documents[1::2], 3))
    store.put("even", spill_bytes(documents[::2], 3))
    for bucket in range(3):
        one = read_bucket(store, ["whole"], bucket, DTYPE)
        other = read_bucket(store, ["odd", "even"], bucket, DTYPE)
        assert as_lists(one) == as_lists(other)


def test_buckets_share_documents_evenly_and_neighbours_part() -> None:
    keys = [shuffle_key(0, unit, n, 0) for unit in range(10) for n in range(1000)]
    counts = np.bincount([bucket_of(key, 8) for key in keys], minlength=8)
    assert counts.sum() == 10_000
    assert abs(counts - 1250).max() < 150  # 4.5 sigma of a binomial
    together = sum(bucket_of(a, 8) == bucket_of(b, 8) for a, b in itertools.pairwise(keys))
    assert abs(together - 1250) < 150


def test_keys_are_frozen_and_of_the_named_tuple() -> None:
    assert shuffle_key(0, 0, 0, 0).hex() == "115f264b3b845c156615ba91a024f7c1"
    assert len({shuffle_key(*key) for key in ((0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 1, 0))}) == 3
    assert shuffle_key(1, 11, 1, 0) != shuffle_key(1, 1, 11, 0)


def test_an_empty_batch_is_an_object_too(store: Store) -> None:
    store.put("none", spill_bytes([], 5))
    assert read_bucket(store, ["none"], 4, DTYPE) == []
