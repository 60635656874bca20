"""Inputs: each document once however the work is cut, and clear words for what cannot be read."""

import errno
import gzip
import json
import os
import random
from pathlib import Path

import pytest

from data_service.chat import Turn
from data_service.inputs import Document, FileCorpus, MemoryCorpus
from storage.errors import ConfigurationError, DataError


def texts(corpus: FileCorpus | MemoryCorpus, unit_bytes: int) -> list[Document]:
    units = corpus.units(unit_bytes)
    return [text for unit in units for part in unit for text in corpus.documents(part)]


@pytest.mark.parametrize("separator", ["\n\n", "\n", " ", "\r\n \r\n"])
@pytest.mark.parametrize("unit_bytes", [1, 7, 64, 1000, 10**6])
def test_a_text_cut_in_units_is_whole(tmp_path: Path, separator: str, unit_bytes: int) -> None:
    rng = random.Random(1)
    text = separator.join("naïve 世界" * rng.randint(0, 9) for _ in range(40))
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert "".join(map(str, texts(FileCorpus([tmp_path / "a.txt"]), unit_bytes))) == text


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
    assert [sum(part.size_bytes for part in unit) for unit in units] == [
        *(80, 80, 80, 80, 80, 100, 100, 50)
    ]


def test_a_folder_is_read_in_order_of_names_and_by_suffix(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b.txt", "a/z.md", "a/.hidden.txt", ".git/x.txt", "c.png", "a.JSONL"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "json"}' if name.endswith("L") else name)
    assert texts(FileCorpus([tmp_path]), 10) == ["json", "a/z.md", "b.txt"]
    assert f"left out 1 files of other kinds, as {tmp_path / 'c.png'}" in caplog.text


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
        ("a.jsonl", b"[1]", r"no text in any field \(found: list\)"),
        ("a.jsonl", b'{"text": 3}', r"no text in field 'text'"),
        ("a.parquet", b"PAR1", r"a\.parquet: cannot be read"),
        ("a.txt.gz", b"", r"\.gz is not read here .*unpack it"),
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
    with pytest.raises(DataError, match=r"cannot be read \(File name too long"):
        FileCorpus(["x" * 300])
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


def sides(corpus: FileCorpus, unit_bytes: int) -> dict[str, str]:
    found = {"train": "", "validation": ""}
    for unit in corpus.units(unit_bytes):
        for part in unit:
            found[part.split] += "".join(map(str, corpus.documents(part)))
    return found


@pytest.mark.parametrize("separator", ["\n\n", "\n", " "])
@pytest.mark.parametrize("unit_bytes", [1, 50, 333, 10**6])
def test_the_tail_of_a_text_is_cut_exactly(tmp_path: Path, separator: str, unit_bytes: int) -> None:
    text = separator.join(f"line {n}" for n in range(100))
    (tmp_path / "a.txt").write_text(text)
    at = len(text) - len(text) * 100 // 1000
    found = sides(FileCorpus([tmp_path], tail_permille=100), unit_bytes)
    assert found == {"train": text[:at], "validation": text[at:]}


@pytest.mark.parametrize("unit_bytes", [1, 64, 10**6])
@pytest.mark.parametrize("permille", [1, 250, 333, 500])
def test_the_tail_goes_over_files_and_no_character_is_broken(
    tmp_path: Path, unit_bytes: int, permille: int
) -> None:
    texts_of_files = ["naïve 世界\n" * n for n in (3, 17, 1, 9)]
    for number, text in enumerate(texts_of_files):
        (tmp_path / f"{number}.txt").write_text(text)
    found = sides(FileCorpus([tmp_path], tail_permille=permille), unit_bytes)
    whole = "".join(texts_of_files)
    assert found["train"] + found["validation"] == whole
    tail = len(whole.encode()) * permille // 1000
    assert 0 <= tail - len(found["validation"].encode()) < 4


@pytest.mark.parametrize("unit_bytes", [1, 64, 10**6])
def test_the_tail_of_records_is_whole_records(tmp_path: Path, unit_bytes: int) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{n:03d}"}}\n' for n in range(50)))
    found = sides(FileCorpus([tmp_path], tail_permille=200), unit_bytes)
    assert found["validation"] == "".join(f"{n:03d}" for n in range(40, 50))


def test_a_tail_inside_a_compressed_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 50))
    corpus = FileCorpus([tmp_path], tail_permille=200)
    with pytest.raises(ConfigurationError, match="the validation tail begins inside this file"):
        corpus.units(10)
    (tmp_path / "b.txt").write_text("x" * 5000)
    found = sides(FileCorpus([tmp_path], tail_permille=200), 10**6)
    whole = 5000 + (tmp_path / "a.jsonl.gz").stat().st_size
    assert found["validation"] == "x" * (whole * 200 // 1000)


CHAT = {"instruction": "Add 2 and 3", "input": "", "output": "5"}
TURNS = (Turn("user", "Add 2 and 3"), Turn("assistant", "5"))


def test_the_format_is_seen_by_the_fields(tmp_path: Path) -> None:
    lines = [json.dumps(CHAT), json.dumps({"text": "prose"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert texts(FileCorpus([tmp_path]), 10**6) == [TURNS, "prose"]


def test_records_of_both_kinds_of_fields_need_a_word(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({**CHAT, "text": "Below is an instruction"}))
    with pytest.raises(DataError, match="say --format text or --format chat"):
        texts(FileCorpus([tmp_path]), 10**6)
    assert texts(FileCorpus([tmp_path], format="chat"), 10**6) == [TURNS]
    assert texts(FileCorpus([tmp_path], format="text"), 10**6) == ["Below is an instruction"]


def test_a_record_that_is_no_conversation_is_refused_where_all_must_be(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "prose"}')
    with pytest.raises(DataError, match=r"is no conversation \(found: text\); expected"):
        texts(FileCorpus([tmp_path], format="chat"), 10**6)


def test_half_a_surrogate_pair_in_a_conversation_becomes_a_replacement(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "a\\ud83db", "output": "c"}')
    ((question, _),) = texts(FileCorpus([tmp_path]), 10**6)
    assert question == Turn("user", "a\ufffdb")


def test_links_to_folders_are_folders_and_those_that_lead_back_end(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.txt").write_text("b")
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "link").symlink_to("../other")
    (tmp_path / "in" / "back").symlink_to(".")
    assert texts(FileCorpus([tmp_path / "in"]), 1) == ["a", "b"]


def test_what_cannot_be_read_in_a_folder_is_said_and_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"b\.txt: cannot be read \(No such file"):
        FileCorpus([tmp_path])
    (tmp_path / "b.txt").unlink()
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("c")
    with pytest.raises(DataError, match=r"the name of this file is not UTF-8; rename it"):
        FileCorpus([tmp_path])

    def refuse(path: Path) -> None:  # root may read what it has forbidden
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\); leave it out"):
        FileCorpus([tmp_path])


def test_a_link_is_read_as_its_own_name_says_by_workers_too(tmp_path: Path) -> None:
    """Hugging Face's hub keeps files as links to blobs without a suffix."""
    (tmp_path / "blob").write_text('{"text": "x"}\n')
    (tmp_path / "a.jsonl").symlink_to("blob")
    corpus = FileCorpus([tmp_path / "a.jsonl"])
    for same in (corpus, FileCorpus.from_spec(json.loads(json.dumps(corpus.spec())))):
        assert texts(same, 10**6) == ["x"]


def test_a_corpus_comes_back_from_its_spec(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 50)
    corpus = FileCorpus([tmp_path], text_field="body", tail_permille=100)
    spec = json.loads(json.dumps(corpus.spec()))
    again = FileCorpus.from_spec(spec)
    assert again.inputs == corpus.inputs
    assert sides(again, 40) == sides(corpus, 40)
    assert MemoryCorpus([("a", "x")]).spec() is None
