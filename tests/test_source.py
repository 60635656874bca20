"""Opening a source: what is wrong is found, and named."""

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import data_service.source
from data_service.shard_format import npy_bytes
from data_service.source import open_source
from storage.canonical import canonical_json, sha256_hex
from storage.errors import DataError, IntegrityError
from storage.store import open_store
from tests.made_sources import change_first_shard, write_source

SHARD = "train-00000.npy"


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A source of both kinds: mapped, and read through the store."""
    place = str(tmp_path / "web") if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    return write_source(place)


def edit_index(url: str, change: Callable[[dict[str, Any]], object]) -> None:
    store = open_store(url)
    value = json.loads(store.get("index.json"))
    change(value)
    store.put("index.json", canonical_json(value))


def replace_shard(url: str, data: bytes) -> None:
    """Another shard under an index that names it: only its content can be wrong."""
    open_store(url).put(SHARD, data)
    change_first_shard(url, bytes=len(data), sha256=sha256_hex(data))


def test_tokens_are_what_was_written(url: str) -> None:
    source = open_source("web", url)
    assert source.tokens("train-00001", 3, 9).tolist() == [20, 21, 22, 23, 24, 25]
    assert source.tokens("train-00000", 0, 400).dtype == np.uint16
    assert source.ends("train-00000").tolist() == [400]
    assert source.vocab_size == 257
    assert [entry.tokens for entry in source.shards("train")] == [400, 300]


def test_tokens_outside_a_shard_are_refused(url: str) -> None:
    with pytest.raises(IndexError, match="shard train-00000 has no tokens"):
        open_source("web", url).tokens("train-00000", 390, 401)


def test_many_shards_are_read_with_few_open(tmp_path: Path) -> None:
    source = open_source("web", write_source(tmp_path, train=[50] * 80))
    for number in (*range(80), *range(80)):
        assert source.tokens(f"train-{number:05d}", 0, 1)[0] == 17 * number % 251
    assert len(source._tokens) <= 32


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source 'web' at .*there is no data here; make it with"):
        open_source("web", str(tmp_path / "nowhere"))


def test_shards_without_an_index_are_said(url: str) -> None:
    open_store(url).delete("index.json")
    with pytest.raises(DataError, match=r"there is no index\.json \(it is written last"):
        open_source("web", url)


def test_an_index_without_the_stamp_is_refused(url: str) -> None:
    edit_index(url, lambda index: index.pop("validation"))
    with pytest.raises(DataError, match="has no validation stamp"):
        open_source("web", url)


def test_a_missing_shard_is_named(url: str) -> None:
    open_store(url).delete(SHARD)
    with pytest.raises(DataError, match=r"source 'web'.* shard train-00000\.npy is missing"):
        open_source("web", url)


def test_another_tokenizer_here_is_refused(url: str) -> None:
    edit_index(url, lambda index: index.update(tokenizer_fingerprint="0" * 64))
    with pytest.raises(DataError, match="made with a bytes tokenizer of fingerprint 0000"):
        open_source("web", url)


def read_all(url: str) -> None:
    source = open_source("web", url)
    for entry in source.shards("train"):
        source.tokens(entry.name, 0, entry.tokens)


def test_a_truncated_shard_is_refused(url: str) -> None:
    store = open_store(url)
    store.put(SHARD, store.get(SHARD)[:-10])
    with pytest.raises(DataError, match=r"shard train-00000\.npy is truncated: 918 bytes, .* 928"):
        read_all(url)


def test_a_shard_of_another_size_is_refused(url: str) -> None:
    store = open_store(url)
    store.put(SHARD, store.get(SHARD) + b"xx")
    with pytest.raises(DataError, match=r"train-00000\.npy is larger than it was: 930 bytes"):
        read_all(url)


def test_a_shard_of_another_dtype_is_refused(url: str) -> None:
    replace_shard(url, npy_bytes(np.zeros(400, dtype="<i8")))
    with pytest.raises(DataError, match="has dtype int64, the index says uint16"):
        read_all(url)


def test_a_shard_of_another_shape_is_refused(url: str) -> None:
    replace_shard(url, npy_bytes(np.zeros(399, dtype="<u2")))
    with pytest.raises(DataError, match=r"has shape \(399,\), the index says 400 tokens"):
        read_all(url)


def test_a_shard_that_is_no_npy_is_refused(url: str) -> None:
    replace_shard(url, b"tokens, surely" * 100)
    with pytest.raises(DataError, match=r"train-00000\.npy is no \.npy file"):
        read_all(url)


def test_an_id_beyond_the_vocabulary_is_named_with_its_place(url: str) -> None:
    tokens = np.zeros(400, dtype="<u2")
    tokens[123] = 257
    replace_shard(url, npy_bytes(tokens))
    source = open_source("web", url)
    for _ in range(2):  # whatever part is read, and also when it is read again
        with pytest.raises(
            DataError, match=r"source 'web'.*train-00000 holds token id 257 at position 123, beyond"
        ):
            source.tokens("train-00000", 0, 9)


def test_a_flipped_bit_is_found_at_the_first_read(url: str) -> None:
    store = open_store(url)
    data = bytearray(store.get(SHARD))
    data[-300] ^= 1
    store.put(SHARD, bytes(data))
    with pytest.raises(IntegrityError, match=r"train-00000\.npy has sha256 .* have changed"):
        read_all(url)


def test_a_flipped_bit_in_the_ends_is_found(url: str) -> None:
    open_store(url).put("train-00000.ends.npy", npy_bytes(np.array([399], dtype="<i8")))
    with pytest.raises(IntegrityError, match=r"train-00000\.ends\.npy is not what the index"):
        open_source("web", url).ends("train-00000")


def test_a_mask_is_read_bit_for_bit_and_a_shard_without_one_has_none(tmp_path: Path) -> None:
    for place in (str(tmp_path), f"memory://{uuid.uuid4().hex}"):
        source = open_source("chat", write_source(place, train=(100, 50), masked=True))
        assert source.has_masks
        for row in range(2):
            mask = source.shard_mask(row)
            assert mask is not None
            learned = np.unpackbits(mask, bitorder="little")[: (100, 50)[row]].astype(bool)
            assert learned.tolist() == (source.shard_tokens(row) % 3 == 0).tolist()
    plain = open_source("web", write_source(tmp_path / "plain"))
    assert not plain.has_masks
    assert plain.shard_mask(0) is None


def test_a_damaged_mask_is_refused(tmp_path: Path) -> None:
    url = write_source(tmp_path, masked=True)
    good = (tmp_path / "train-00000.mask.npy").read_bytes()
    (tmp_path / "train-00000.mask.npy").write_bytes(good[:-1] + b"x")
    with pytest.raises(IntegrityError, match=r"train-00000\.mask\.npy has sha256 .* have changed"):
        open_source("chat", url).shard_mask(0)
    (tmp_path / "train-00000.mask.npy").unlink()
    with pytest.raises(DataError, match=r"train-00000\.mask\.npy is missing"):
        open_source("chat", url).shard_mask(0)
    for wrong, found in (
        (npy_bytes(np.zeros(49, dtype=np.uint8)), r"must hold 50 bytes .* \(49,\) of uint8"),
        (npy_bytes(np.zeros(50, dtype="<u2")), r"must hold 50 bytes .* \(50,\) of uint16"),
        (b"no array", r"is no \.npy file"),
    ):
        (tmp_path / "train-00000.mask.npy").write_bytes(wrong)
        change_first_shard(url, mask_bytes=len(wrong), mask_sha256=sha256_hex(wrong))
        with pytest.raises(DataError, match=rf"train-00000\.mask\.npy {found}"):
            open_source("chat", url).shard_mask(0)


def test_of_many_shards_a_missing_one_is_found_when_it_is_read(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards of a large source are not listed, or a million would be at every start."""
    monkeypatch.setattr(data_service.source, "LISTED_SHARDS", 2)
    open_store(url).delete(SHARD)
    source = open_source("web", url)
    assert source.tokens("train-00001", 0, 1).tolist() == [17]
    with pytest.raises(DataError, match=r"'web'.* shard train-00000\.npy is missing; copy it"):
        source.tokens("train-00000", 0, 1)


def test_a_shard_that_the_index_has_not_is_refused(url: str) -> None:
    with pytest.raises(DataError, match=r"'web' at .*there is no shard 'train-7'"):
        open_source("web", url).tokens("train-7", 0, 1)


def test_a_shard_that_goes_away_later_is_named(url: str) -> None:
    source = open_source("web", url)
    open_store(url).delete(SHARD)
    with pytest.raises(DataError, match=r"train-00000\.npy (is missing|cannot be read)"):
        source.tokens("train-00000", 0, 1)


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    one, same, other = (
        open_source("web", write_source(tmp_path / name, start=start))
        for name, start in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint
