"""Verification: a source that is right is proved; each thing that can be wrong is named."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_service.inputs import FileCorpus, MemoryCorpus
from data_service.preparation import prepare
from data_service.recipe import Recipe
from data_service.shard_format import npy_bytes
from data_service.shard_writer import encoded, write_shards
from data_service.source import open_source
from data_service.source_index import ShardEntry, SourceIndex, write_index
from data_service.tokenizer import make_tokenizer
from data_service.validation_split import ValidationStamp, split_document
from data_service.verify import main, verified
from storage.canonical import sha256_hex
from storage.errors import DataError
from storage.store import open_store
from tests.made_sources import change_first_shard
from tests.test_chat import write_conversations

WORDS = ["the", "of", "and", "to", "in", "was", "he", "for", "it", "with", "as", "his", "on"]


def prose(rng: random.Random, paragraphs: int, longest: int = 60) -> str:
    return "\n\n".join(
        " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, longest)))
        for _ in range(paragraphs)
    )


def lines_and_prose(seed: int) -> list[tuple[str, str]]:
    """Documents short and long, with long paragraphs of lines, and blank lines about."""
    rng = random.Random(seed)
    texts = [prose(rng, rng.choice([1, 3, 90])) for _ in range(30)]
    texts += [prose(rng, 300).replace("\n\n", "\n") + "\n\n\n" + prose(rng, 50) for _ in range(5)]
    texts += [prose(rng, 40) + "\n \n\n" + prose(rng, 200).replace("\n\n", "\n") for _ in range(5)]
    return [(f"{seed}-{n}", text) for n, text in enumerate(texts)]


@pytest.mark.parametrize("shuffle", [False, True])
def test_sources_that_are_right_are_proved(
    shuffle: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(tmp_path / name) for name in ("one", "two")]
    for seed, name in enumerate(names):
        prepare(
            MemoryCorpus(lines_and_prose(seed) + lines_and_prose(7)),
            open_store(name),
            make_tokenizer("bytes"),
            recipe=Recipe(shard_tokens=20_000, shuffle=shuffle),
            validation_permille=300,
        )
    assert main([*names, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["holds"] is True
    assert [proof["fingerprint"] for proof in said["sources"]] == [
        open_source("a", name).fingerprint for name in names
    ]
    index = open_source("a", names[0]).index
    entries = [*index.train, *index.validation]
    assert said["sources"][0]["tokens"] == sum(entry.tokens for entry in entries)
    assert said["sources"][0]["documents"] == sum(entry.documents for entry in entries)
    assert said["sources"][0]["objects"] == 2 * len(entries)
    assert main(names) == 0
    assert "no held-out text is trained on" in capsys.readouterr().out


def test_conversations_are_proved_with_their_masks(tmp_path: Path) -> None:
    prepare(
        FileCorpus([write_conversations(tmp_path)]),
        open_store(str(tmp_path / "out")),
        make_tokenizer("bytes-chat"),
        recipe=Recipe(shard_tokens=20_000, shuffle=True),
        validation_permille=200,
    )
    assert main([str(tmp_path / "out")]) == 0


def write_documents(
    folder: Path, train: list[str], held_out: list[str], stamp: ValidationStamp
) -> str:
    """A source with these documents, on the sides that they are given."""
    store, tokenizer = open_store(str(folder)), make_tokenizer("bytes")
    entries = {
        split: write_shards(
            store,
            f"{split}-00000",
            0,
            [encoded(text, tokenizer) for text in texts],
            shard_tokens=100_000,
            announce=lambda phase: None,
        )
        for split, texts in (("train", train), ("validation", held_out))
    }
    index = SourceIndex(
        tokenizer=tokenizer.spec(),
        tokenizer_fingerprint=tokenizer.fingerprint,
        dtype="uint16",
        train=entries["train"],
        validation=entries["validation"],
        stamp=stamp,
    )
    write_index(store, index)
    return str(folder)


def sides(stamp: ValidationStamp) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"train": [], "validation": []}
    for n in range(60):
        text = f"document number {n}"
        found[split_document(text, stamp)[0][0]].append(text)
    return found


def test_a_document_on_the_wrong_side_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stamp = ValidationStamp(permille=300)
    right = sides(stamp)
    train, held_out = right["train"], right["validation"]
    good = write_documents(tmp_path / "good", train, held_out, stamp)
    assert main([good]) == 0
    leak = write_documents(tmp_path / "leak", [*train, held_out[3]], held_out, stamp)
    assert main([leak]) == 78
    said = capsys.readouterr().err
    assert f"leak: shard train-00000-0, document {len(train)} is in train" in said
    assert held_out[3] in said


def test_a_duplicate_in_another_source_is_named_where_position_decided(tmp_path: Path) -> None:
    stamp = ValidationStamp.by_position(100)
    one = write_documents(tmp_path / "one", ["a", "b"], ["c", "d"], stamp)
    two = write_documents(tmp_path / "two", ["e", "D "], ["f"], stamp)
    assert main([one]) == main([two]) == 0
    sources = [open_source(url, url) for url in (one, two)]
    with pytest.raises(
        DataError, match=r"two: shard train-00000-0, document 1 is .*held out in .*one: shard valid"
    ):
        verified(sources)


def test_sources_of_two_rules_are_refused(tmp_path: Path) -> None:
    one = write_documents(tmp_path / "one", ["a"], ["c"], ValidationStamp.by_position(100))
    two = write_documents(tmp_path / "two", ["e"], ["f"], ValidationStamp.by_position(200))
    with pytest.raises(DataError, match="were split by different rules"):
        verified([open_source(url, url) for url in (one, two)])


@pytest.mark.parametrize("key", ["train-00000-0.npy", "validation-00000-0.ends.npy"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damage_is_named(
    key: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = write_documents(tmp_path / "s", ["a", "b"], ["c"], ValidationStamp.by_position(100))
    path = tmp_path / "s" / key
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[-1] ^= 1
        path.write_bytes(data if damage == "flipped" else data[:-2])
    assert main([url, "--json"]) == 78
    said = json.loads(capsys.readouterr().out)
    assert said["holds"] is False
    assert key.partition(".")[0] in said["violation"]


def test_ends_that_are_not_where_documents_end_are_named(tmp_path: Path) -> None:
    url = write_documents(tmp_path / "s", ["abc", "b"], ["c"], ValidationStamp.by_position(100))
    source = open_source("s", url)
    entry = source.index.train[0]
    wrong = npy_bytes(np.array([3, 6], dtype="<i8"))
    assert len(wrong) == entry.ends_bytes
    open_store(url).put(entry.ends_key, wrong)
    change_first_shard(url, ends_sha256=sha256_hex(wrong))
    with pytest.raises(DataError, match="the documents' ends is not what the index says"):
        verified([open_source("s", url)])


def with_object(url: str, key: str, array: np.ndarray, **changes: object) -> None:
    """Another object of the first training shard, named by the index."""
    kind = {"ends": "ends_", "mask": "mask_"}.get(key.split(".")[-2], "")
    data = npy_bytes(array)
    open_store(url).put(key, data)
    changes |= {f"{kind}bytes": len(data), f"{kind}sha256": sha256_hex(data)}
    change_first_shard(url, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda url, e: change_first_shard(url, documents=3), "the number of documents is not"),
        (
            lambda url, e: with_object(url, e.tokens_key, np.array([97, 256, 300, 256], "<u2")),
            "an id is not what the index says",
        ),
        (
            lambda url, e: with_object(url, e.mask_key, np.zeros(2, "u1")),
            "the length of the mask is not",
        ),
    ],
)
def test_what_the_index_says_wrongly_is_named(
    change: Callable[[str, ShardEntry], None], message: str, tmp_path: Path
) -> None:
    url = write_documents(tmp_path / "s", ["a", "b"], ["c"], ValidationStamp.by_position(100))
    change(url, open_source("s", url).index.train[0])
    with pytest.raises(DataError, match=message):
        verified([open_source("s", url)])


@pytest.mark.parametrize("is_last", [False, True])
def test_a_document_without_an_end_is_named(is_last: bool, tmp_path: Path) -> None:
    """The end may lie in the next shard of the same unit, and nowhere else."""
    url = write_documents(tmp_path / "s", ["a"], ["c"], ValidationStamp.by_position(100))
    index, document = open_source("s", url).index, encoded("abcdef", make_tokenizer("bytes"))
    begins, ends = write_shards(
        open_store(url), "train-00001", 0, [document], shard_tokens=4, announce=lambda phase: None
    )
    other = replace(index.train[0], name="train-00002-0")
    for end in (".npy", ".ends.npy"):
        shutil.copy(tmp_path / "s" / f"train-00000-0{end}", tmp_path / "s" / f"{other.name}{end}")
    train = [index.train[0], begins] if is_last else [begins, other]
    write_index(open_store(url), replace(index, train=train))
    message = "last document of train has no end" if is_last else "00002-0: the document before it"
    with pytest.raises(DataError, match=message):
        verified([open_source("s", url)])
    write_index(open_store(url), replace(index, train=[begins, ends, other]))
    assert verified([open_source("s", url)])[0].documents == 3


def test_a_place_that_holds_no_source_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "nothing")]) == 78
    assert "there is no data here" in capsys.readouterr().err
    assert main([]) == 78
    assert "name the sources to verify" in capsys.readouterr().err
