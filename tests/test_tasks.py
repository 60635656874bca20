"""Tasks: an input that cannot be cut comes in batches, and each batch is done once."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from data_service.inputs import FileCorpus
from data_service.preparation import prepare
from data_service.recipe import Recipe
from data_service.source import open_source
from data_service.tokenizer import make_tokenizer
from storage.store import open_store

BYTES = make_tokenizer("bytes")


class KilledError(Exception):
    """Raised by an announcement, in place of a kill."""


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    rng = random.Random(1)
    lines = [json.dumps({"text": f"{n} " * rng.randint(1, 99)}) for n in range(900)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return tmp_path / "a.jsonl.gz"


def objects(folder: Path) -> dict[str, bytes]:
    store = open_store(str(folder))
    return {key: store.get(key) for key in store.list("")}


def prepared(path: Path, out: Path, recipe: Recipe, **more: Any) -> None:
    prepare(
        FileCorpus([path]),
        open_store(str(out)),
        BYTES,
        recipe=recipe,
        validation_permille=100,
        **more,
    )


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_compressed_file_is_done_in_batches_and_goes_on_after_any(
    shuffle: bool, packed: Path, tmp_path: Path
) -> None:
    recipe = Recipe(shard_tokens=9_000, shuffle=shuffle, deduplicate=True)
    heard: list[str] = []
    prepared(packed, tmp_path / "whole", recipe, announce=heard.append)
    assert heard.count("prepare:unit-done") > 10
    left = 0

    def stop(phase: str) -> None:
        if phase == "prepare:unit-done":
            raise KilledError

    while True:
        try:
            prepared(packed, tmp_path / "killed", recipe, announce=stop)
        except KilledError:
            left += 1
        else:
            break
    assert left == heard.count("prepare:unit-done")
    assert objects(tmp_path / "killed") == objects(tmp_path / "whole")


def test_batches_lose_nothing_and_names_keep_the_order(packed: Path, tmp_path: Path) -> None:
    prepared(packed, tmp_path / "out", Recipe(shard_tokens=3_000))
    source = open_source("a", str(tmp_path / "out"))
    assert len(source.shards("train")) > 20
    whole: list[int] = []
    for entry in source.shards("train"):
        whole += source.tokens(entry.name, 0, entry.tokens).tolist()
    texts = source.tokenizer.decode(whole).split("<|endoftext|>")
    numbers = [int(text.split()[0]) for text in texts if text]
    assert numbers == sorted(numbers)
    corpus = FileCorpus([packed])
    ((part,),) = corpus.units(1)
    held_out = {int(str(text).split()[0]) for text in corpus.documents(part)} - set(numbers)
    assert len(held_out) == 900 - len(numbers) > 40
