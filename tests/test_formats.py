"""Formats: the same records come out of every kind of file, and damage is named."""

import gzip
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

import data_service.formats
from data_service.formats import kind_of, records_between, row_groups
from data_service.inputs import Document, FileCorpus
from storage.errors import ConfigurationError, DataError

RECORDS = [{"text": f"text {n} é\n" * (n % 7), "id": n, "more": None} for n in range(2500)]
WANTED = [record["text"] for record in RECORDS]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
FIELDS = frozenset({"text"})


def texts(corpus: FileCorpus, unit_bytes: int) -> list[Document]:
    units = corpus.units(unit_bytes)
    return [text for unit in units for part in unit for text in corpus.documents(part)]


def write(folder: Path, name: str) -> Path:
    """The records, in a file or a folder of that name."""
    path = folder / name
    if name.endswith(".gz"):
        half = len(LINES) // 2  # two members, as `cat a.gz b.gz` gives
        path.write_bytes(gzip.compress(LINES[:half]) + gzip.compress(LINES[half:]))
    elif name.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        half = len(LINES) // 2
        pack = zstandard.ZstdCompressor().compress
        path.write_bytes(pack(LINES[:half]) + pack(LINES[half:]))
    elif name.endswith(".parquet"):
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(RECORDS), path, row_group_size=700)
    elif name == "saved":
        data_sets = pytest.importorskip("datasets")
        data_sets.Dataset.from_list(RECORDS).save_to_disk(str(path), num_shards=3)
    elif name.endswith(".json"):
        path.write_text(" " + json.dumps(RECORDS, indent=1) + "\n")
    else:
        path.write_bytes(LINES)
    return path


KINDS = ["a.jsonl", "a.json", "a.jsonl.gz", "c4.json.gz", "a.jsonl.zst", "a.parquet", "saved"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("unit_bytes", [500, 10**9])
def test_every_kind_of_file_gives_the_same_texts(
    name: str, unit_bytes: int, tmp_path: Path
) -> None:
    assert texts(FileCorpus([write(tmp_path, name)]), unit_bytes) == WANTED


def test_a_parquet_file_is_cut_between_row_groups(tmp_path: Path) -> None:
    path = write(tmp_path, "a.parquet")
    assert len(row_groups(path)) == 4
    units = FileCorpus([path]).units(1)
    assert [[part[:3] for part in unit] for unit in units] == [[(0, n, n + 1)] for n in range(4)]
    whole = sum(part.size_bytes for unit in units for part in unit)
    assert whole == 3 * path.stat().st_size


def test_a_compressed_file_is_one_part(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl.gz")
    ((part,),) = FileCorpus([tmp_path]).units(10)
    assert part.size_bytes == 4 * (tmp_path / "a.jsonl.gz").stat().st_size


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_cut_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=rf"{name}: .*copy it here again"):
        texts(FileCorpus([path]), 10**6)


@pytest.mark.parametrize("name", ["a.parquet", "saved"])
def test_a_column_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name)
    with pytest.raises(DataError, match=r"no column holds text \(found: .*id.*\).*--text_field"):
        texts(FileCorpus([path], text_field="body"), 10**6)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("a.jsonl.zst", "zstandard", "zstd"), ("a.parquet", "pyarrow", "parquet")],
)
def test_a_missing_extra_is_named(
    name: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, name)
    there = importlib.import_module

    def without(wanted: str, package: str | None = None) -> Any:
        if wanted.startswith(module):
            raise ImportError(wanted)
        return there(wanted, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ConfigurationError, match=rf'pip install "rangeflow\[{extra}\]"'):
        texts(FileCorpus([path]), 10**6)


def test_a_data_set_of_several_splits_or_with_chosen_rows_is_refused(tmp_path: Path) -> None:
    data_sets = pytest.importorskip("datasets")
    data = data_sets.Dataset.from_list(RECORDS)
    data_sets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match=r"several splits; name the folder of one"):
        FileCorpus([tmp_path / "splits"])
    data.select([5, 3, 99]).save_to_disk(str(tmp_path / "chosen"))
    try:
        found = texts(FileCorpus([tmp_path / "chosen"]), 10**6)
    except DataError as error:
        assert "flatten_indices" in str(error)
    else:
        assert found == [WANTED[5], WANTED[3], WANTED[99]]


def test_state_that_leads_out_of_the_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    for files in ([{"filename": "../a.arrow"}], [{"filename": "missing.arrow"}]):
        (tmp_path / "state.json").write_text(json.dumps({"_data_files": files}))
        with pytest.raises(DataError, match="which is not in this folder"):
            FileCorpus([tmp_path])
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(DataError, match=r"state\.json does not list"):
        FileCorpus([tmp_path])


def test_lines_say_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n\n{"text": "y"}\n')
    found = list(records_between(tmp_path / "a.jsonl", "lines", 0, 30, FIELDS))
    assert found == [
        ("the line at byte 0", {"text": "x"}),
        ("the line at byte 15", {"text": "y"}),
    ]
    assert kind_of(Path("A.JSON.GZ")) == "gzip"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('[{"text": "x"}, {"text": "y"', "is not one from record 1 on"),
        ('{"text": "x"}', "is not one from record 0 on; name JSON lines .jsonl"),
        ('[{"text": "x"} {"text": "y"}]', "is not one from record 1 on"),
        ('[{"text": "x"}, 5]', "record 1 is no JSON object .found: int"),
        ("", "is not one from record 0 on"),
        ('["\xff"]', "not UTF-8"),
    ],
)
def test_an_array_that_is_none_is_refused(data: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(data.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        texts(FileCorpus([tmp_path / "a.json"]), 10**6)


@pytest.mark.parametrize("data", ["[]", " [ ] "])
def test_an_empty_array_has_no_records(data: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(data)
    assert texts(FileCorpus([tmp_path / "a.json"]), 10**6) == []


@pytest.mark.parametrize("rest", ['[{"text": "y"}]', "junk", "\n]", '\n\n{"text": "y"}'])
def test_what_comes_behind_an_array_is_refused_and_not_left_out(rest: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "x"}]' + rest)
    with pytest.raises(DataError, match="is not one from record 1 on"):
        texts(FileCorpus([tmp_path / "a.json"]), 10**6)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_packed_file_of_no_bytes_is_refused(name: str, tmp_path: Path) -> None:
    if name.endswith("zst"):
        pytest.importorskip("zstandard")
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="is empty; copy it here again"):
        texts(FileCorpus([tmp_path]), 10**6)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_longer_than_a_record_may_be_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_service.formats, "_LONGEST_RECORD", 200)
    lines = b'{"text": "x"}\n' * 9 + b'{"text": "%s"}\n' % (b"y" * 300) + b'{"text": "z"}\n'
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    for unit_bytes in (20, 10**6):
        with pytest.raises(DataError, match="the line at byte 126 is longer than 200 bytes"):
            texts(FileCorpus([tmp_path / name]), unit_bytes)


def write_arrow(path: Path, values: Any) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"text": values})
    with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def test_an_arrow_file_cut_between_its_batches_is_refused(tmp_path: Path) -> None:
    path, shorter = tmp_path / "a.arrow", tmp_path / "b.arrow"
    chunks = pytest.importorskip("pyarrow").chunked_array
    write_arrow(path, chunks([["x"] * 10] * 5))
    write_arrow(shorter, chunks([["x"] * 10] * 3))
    assert len(texts(FileCorpus([path]), 10**6)) == 50
    path.write_bytes(path.read_bytes()[: shorter.stat().st_size - 8])
    with pytest.raises(DataError, match=r"a\.arrow: ends after row 30 without its end mark"):
        texts(FileCorpus([path]), 10**6)


@pytest.mark.parametrize("name", ["a.arrow", "a.parquet"])
def test_a_column_that_is_not_utf8_is_refused(name: str, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    values = arrow.array([b"ok", b"\xff"]).view(arrow.binary())
    text = arrow.Array.from_buffers(arrow.string(), 2, values.buffers())
    if name.endswith("arrow"):
        write_arrow(tmp_path / name, text)
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"text": text}), tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: holds text that is not UTF-8"):
        texts(FileCorpus([tmp_path / name]), 10**6)
