"""Duplicates: all but the first of each are found, however the work is cut."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_service.chat import Turn
from data_service.duplicates import (
    document_hash,
    duplicates_in,
    find_duplicates,
    note_bytes,
    shares_for,
)
from data_service.inputs import MemoryCorpus
from data_service.preparation import prepare
from data_service.recipe import Recipe
from data_service.source import open_source
from data_service.tokenizer import make_tokenizer
from storage.store import open_store


def found(units: list[list[list[str]]], shares: int) -> list[set[int]]:
    """The ordinals to leave out of each unit; a unit is batches of texts."""
    store = open_store("memory://duplicates")
    notes, keys = [], []
    for number, batches in enumerate(units):
        ordinal = 0
        for batch, texts in enumerate(batches):
            hashes = [(*document_hash(text), ordinal + n) for n, text in enumerate(texts)]
            ordinal += len(texts)
            notes.append((number, f"notes-{number}-{batch}"))
            store.put(notes[-1][1], note_bytes(hashes, shares))
    for share in range(shares):
        keys.append(f"late-{share}")
        store.put(keys[-1], find_duplicates(store, notes, share, len(units)))
    return [set(duplicates_in(store, keys, unit)) for unit in range(len(units))]


TEXTS = st.lists(st.sampled_from([f"t{n}" for n in range(12)]), max_size=8)


@given(st.lists(st.lists(TEXTS, min_size=1, max_size=3), max_size=5), st.integers(1, 7))
def test_all_but_the_first_of_each_are_left_out(units: list[list[list[str]]], shares: int) -> None:
    seen: set[str] = set()
    wanted: list[set[int]] = []
    for batches in units:
        late = set()
        for ordinal, text in enumerate(text for batch in batches for text in batch):
            if text in seen:
                late.add(ordinal)
            seen.add(text)
        wanted.append(late)
    assert found(units, shares) == wanted


def test_case_and_white_space_make_no_other_document() -> None:
    assert document_hash("A  straße\n") == document_hash("a STRASSE")
    assert document_hash((Turn("user", "a"),)) != document_hash((Turn("assistant", "a"),))


def test_shares_grow_with_the_text() -> None:
    assert shares_for(0) == 1
    assert shares_for(10**12) > 3000


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_source_without_duplicates_is_that_of_the_first_ones(
    shuffle: bool, tmp_path: Path
) -> None:
    rng = random.Random(3)
    once = [f"document {n} " * rng.randint(1, 60) for n in range(200)]
    order = [*once, *rng.sample(once, 100)]
    rng.shuffle(order)
    first = list(dict.fromkeys(order))

    def prepared(texts: list[str], name: str, deduplicate: bool) -> set[str]:
        recipe = Recipe(shard_tokens=9_000, deduplicate=deduplicate, shuffle=shuffle)
        corpus = MemoryCorpus([(str(n), text) for n, text in enumerate(texts)])
        store = open_store(str(tmp_path / name))
        prepare(corpus, store, make_tokenizer("bytes"), recipe=recipe, validation_permille=200)
        assert not store.list("spill/")
        source = open_source("a", str(tmp_path / name))
        whole = []
        for split in ("train", "validation"):
            for entry in source.shards(split):
                whole += source.tokens(entry.name, 0, entry.tokens).tolist()
        texts = source.tokenizer.decode(whole).split("<|endoftext|>")
        assert len(texts) == len(set(texts)) or not deduplicate
        return set(texts) if deduplicate else {str(len(texts))}

    assert prepared(order, "out", True) == {*first, ""}
    assert prepared(order, "all", False) == {str(len(order) + 1)}
