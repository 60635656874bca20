"""Inputs: each document once however the work is cut, and clear words for what cannot be read."""

import json
import random
from pathlib import Path

import pytest

from data_service.inputs import FileCorpus, MemoryCorpus
from storage.errors import DataError


def texts(corpus: FileCorpus | MemoryCorpus, unit_bytes: int) -> list[str]:
    units = corpus.units(unit_bytes)
    return [text for unit in units for part in unit for text in corpus.documents(part)]


@pytest.mark.parametrize("separator", ["\n\n", "\n", " ", "\r\n \r\n"])
@pytest.mark.parametrize("unit_bytes", [1, 7, 64, 1000, 10**6])
def test_a_text_cut_in_units_is_whole(tmp_path: Path, separator: str, unit_bytes: int) -> None:
    rng = random.Random(1)
    text = separator.join("naïve 世界" * rng.randint(0, 9) for _ in range(40))
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert "".join(texts(FileCorpus([tmp_path / "a.txt"]), unit_bytes)) == text


@pytest.mark.parametrize("unit_bytes", [1, 20, 100, 10**6])
def test_each_json_line_comes_once(tmp_path: Path, unit_bytes: int) -> None:
    wanted = [f"text {number} é" * (number % 7) for number in range(50)]
    lines = [
        json.dumps({"text": text, "id": 1}, ensure_ascii=bool(i % 2))
        for i, text in enumerate(wanted)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    assert texts(FileCorpus([tmp_path / "a.jsonl"]), unit_bytes) == wanted


def test_units_are_of_about_the_asked_size(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("x" * 40)
    (tmp_path / "big.txt").write_text("y" * 250)
    units = FileCorpus([tmp_path]).units(100)
    assert [sum(part.hi - part.lo for part in unit) for unit in units] == [
        *(80, 80, 80, 80, 80, 100, 100, 50)
    ]


def test_a_folder_is_read_in_order_of_names_and_by_suffix(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/.hidden.txt", ".git/x.txt", "c.png", "a.JSONL"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "json"}' if name.endswith("L") else name)
    assert texts(FileCorpus([tmp_path]), 10) == ["json", "a/z.md", "b.txt"]


def test_a_file_named_itself_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("\ufeffhello", encoding="utf-8")
    assert texts(FileCorpus([tmp_path / "README"]), 10**6) == ["hello"]


def test_half_a_surrogate_pair_in_json_becomes_a_replacement(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83db"}\n{"text": "\\ud83d\\ude00"}')
    assert texts(FileCorpus([tmp_path / "a.jsonl"]), 10**6) == ["a\ufffdb", "\U0001f600"]


def test_another_field_can_hold_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "x"}')
    assert texts(FileCorpus([tmp_path / "a.jsonl"], text_field="content"), 10) == ["x"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"ok \xff", r"a\.txt: not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text":', r"a\.jsonl: the line at byte 14 is not JSON"),
        ("a.jsonl", b'{"body": "x"}', r"no text in field 'text' \(found: body\).*--text_field"),
        ("a.jsonl", b"[1]", r"no text in field 'text' \(found: list\)"),
        ("a.jsonl", b'{"text": 3}', r"no text in field 'text'"),
        ("a.parquet", b"PAR1", r"\.parquet is not read; unpack it"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        texts(FileCorpus([tmp_path / name]), 10**6)


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to prepare"):
        FileCorpus([])
    with pytest.raises(DataError, match="there is no such file or folder"):
        FileCorpus([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="no text in this folder"):
        FileCorpus([tmp_path])


def test_a_file_that_may_not_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    corpus = FileCorpus([tmp_path / "a.txt"])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt: cannot be read \(No such file"):
        texts(corpus, 10)


def test_texts_in_memory_are_documents_and_described_by_content() -> None:
    corpus = MemoryCorpus([("a", "one"), ("b", "zwölf")])
    assert texts(corpus, 4) == ["one", "zwölf"]
    assert [item.size_bytes for item in corpus.inputs] == [3, 6]
    assert [len(unit) for unit in corpus.units(100)] == [2]
