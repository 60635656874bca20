"""Kinds of input files: where each may be cut, and the text or the records in a part of it.

Text and JSON lines are cut anywhere, parquet between row groups, and the others are read from
their beginning to their end. A cut depends on the file and the position only, so that the parts
together give each document once, whichever are read.
"""

import codecs
import gzip
import importlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from storage.errors import ConfigurationError, DataError

_PROSE = (".txt", ".md", ".markdown", ".rst", ".tex", ".html", ".htm", ".xml", ".log")
_TABLES = (".csv", ".tsv", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".sql")
_CODE = (
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cs", ".java", ".js", ".jsx", ".ts"),
    *(".tsx", ".go", ".rs", ".rb", ".php", ".sh", ".lua", ".pl", ".r", ".jl", ".scala", ".kt"),
)
TEXT_SUFFIXES = (*_PROSE, *_TABLES, *_CODE)
RECORD_SUFFIXES = {
    **dict.fromkeys((".jsonl", ".ndjson"), "lines"),
    **dict.fromkeys((".jsonl.gz", ".ndjson.gz", ".json.gz"), "gzip"),
    **dict.fromkeys((".jsonl.zst", ".ndjson.zst", ".json.zst"), "zstd"),
    **dict.fromkeys((".parquet",), "parquet"),
    **dict.fromkeys((".arrow",), "arrow"),
    **dict.fromkeys((".json",), "json"),
}
"""How a file of records ends, and its kind. Compressed files hold JSON lines, `.json.gz` too;
`.json` is an array of records, as Alpaca's and ShareGPT's are."""

EXPANSION = {"gzip": 4, "zstd": 4, "parquet": 3}
"""About how much longer the text is than the file; shards and progress are planned by it."""

_EXTRAS = {"pyarrow": "parquet", "zstandard": "zstd"}
_UNREAD = (".gz", ".zst", ".zip", ".bz2", ".xz", ".tar", ".tgz", ".7z")
_LOOK_AHEAD = 1 << 20  # a blank line is sought this far, then a line end, then a character's end
_JSON_SPACE = re.compile(r"[ \t\r\n]*")
_LONGEST_RECORD = 1 << 28
_BLANK_LINE = re.compile(rb"\n(?:[ \t\r]*\n)+")
_ROWS_AT_ONCE = 1000
_READ_BYTES = 1 << 16
_END_OF_ARROW = b"\xff\xff\xff\xff\0\0\0\0"

Record = tuple[str, Mapping[str, object]]
"""Where it is in its file, for errors, and its fields."""


def kind_of(path: Path) -> str:
    """`text` for all that is no file of records. DataError for what is compressed otherwise."""
    name = path.name.lower()
    for suffix, kind in RECORD_SUFFIXES.items():
        if name.endswith(suffix):
            return kind
    if name.endswith(_UNREAD):
        raise DataError(
            f"{path}: {path.suffix} is not read here (only .jsonl.gz and .jsonl.zst are); unpack it"
        )
    return "text"


def opened(path: Path) -> BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); leave it out") from error


def row_groups(path: Path) -> list[int]:
    """The sizes in bytes of a parquet file's row groups, unpacked."""
    with _refused_if_damaged(path), _parquet_file(path) as file:
        metadata = file.metadata
        return [metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups)]


def text_between(path: Path, lo: int, hi: int, size: int, exact: int | None) -> str:
    """The text from the cut at `lo` to the cut at `hi`; no cut lies beyond one made at `exact`."""
    with opened(path) as file:
        start, end = (_exact_cut(file, at, size, exact) for at in (lo, hi))
        if start >= end:
            return ""
        file.seek(start)
        return _decoded(file.read(end - start), path, start)


def records_between(
    path: Path, kind: str, lo: int, hi: int, fields: frozenset[str]
) -> Iterator[Record]:
    """The records of a part; lo and hi are bytes of `lines`, row groups of `parquet`.

    Only `fields` are read where the format allows that.
    """
    if kind == "lines":
        yield from _lines_between(path, lo, hi)
    elif kind == "parquet":
        yield from _rows_of_parquet(path, range(lo, hi), fields)
    elif kind == "arrow":
        yield from _rows_of_arrow(path, fields)
    elif kind == "json":
        yield from _array_of_records(path)
    else:
        yield from _compressed_lines(path, kind)


def _lines_between(path: Path, lo: int, hi: int) -> Iterator[Record]:
    with opened(path) as file:
        size = file.seek(0, io.SEEK_END)
        start, end = _line_cut(file, lo, size), _line_cut(file, hi, size)
        file.seek(start)
        at = start
        while at < end:
            line = _line(file, path, at)
            if line.strip():
                yield _record(line, path, at)
            at += len(line)


def _compressed_lines(path: Path, kind: str) -> Iterator[Record]:
    failures: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if kind == "zstd":
        failures = (*failures, _extra("zstandard", path).ZstdError)
    at = 0
    with opened(path) as file, _unpacked(file, path, kind) as lines:
        while True:
            try:
                line = _line(lines, path, at)
            except failures as error:
                raise DataError(
                    f"{path}: damaged after {at} unpacked bytes ({error}); copy it here again"
                ) from error
            if not line:
                break
            if line.strip():
                yield _record(line, path, at)
            at += len(line)
        if not file.tell():  # packed, even nothing has some bytes
            raise DataError(f"{path}: is empty; copy it here again")


def _unpacked(file: BinaryIO, path: Path, kind: str) -> io.BufferedIOBase:
    if kind == "gzip":
        return gzip.GzipFile(fileobj=file)
    return io.BufferedReader(_ZstdFrames(file, _extra("zstandard", path)), _READ_BYTES)


class _ZstdFrames(io.RawIOBase):
    """The frames of a file, unpacked. The library's own reader takes a cut file for a whole one."""

    def __init__(self, file: BinaryIO, zstandard: ModuleType) -> None:
        self._file = file
        self._unpacker = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._packed = self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            self._packed = self._packed or self._file.read(_READ_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._unpacker.decompressobj()
            self._left = self._frame.decompress(self._packed)
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def _array_of_records(path: Path) -> Iterator[Record]:
    """The items of one JSON array, a piece of the file at a time."""
    decoder = json.JSONDecoder()
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    text, number, is_open = "", 0, False

    def refusal() -> DataError:
        return DataError(
            f"{path}: expected an array of JSON objects, and it is not one from record {number} "
            "on; name JSON lines .jsonl"
        )

    with opened(path) as file:
        while len(text) <= _LONGEST_RECORD:
            data = file.read(max(_READ_BYTES, len(text)))  # as much again for what was cut
            try:
                text += utf8.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: not UTF-8 ({error.reason}); convert it") from None
            at = _after_space(text, 0)
            if not is_open and at < len(text):
                if text[at] != "[":
                    raise refusal()
                is_open, at = True, _after_space(text, at + 1)
            while at < len(text):
                if text[at] == "]":
                    rest = text[at + 1 :].encode() + file.read(_READ_BYTES)
                    if rest.strip():
                        raise refusal()
                    return
                if number and text[at] != ",":
                    raise refusal()
                try:
                    begin = _after_space(text, at + 1) if number else at
                    value, end = decoder.raw_decode(text, begin)
                except (ValueError, RecursionError):
                    break  # the piece ends in it, or it is no JSON
                if not isinstance(value, dict):
                    raise DataError(
                        f"{path}: record {number} is no JSON object (found: {type(value).__name__})"
                    )
                yield f"record {number}", value
                number, at = number + 1, _after_space(text, end)
            text = text[at:]
            if not data:
                break
    raise refusal()


def _after_space(text: str, at: int) -> int:
    found = _JSON_SPACE.match(text, at)
    return found.end() if found else at


def _rows_of_parquet(path: Path, groups: range, fields: frozenset[str]) -> Iterator[Record]:
    with _refused_if_damaged(path), _parquet_file(path) as file:
        columns = [name for name in file.schema_arrow.names if name in fields]
        names = ", ".join(file.schema_arrow.names)
        if not columns:
            raise DataError(_no_column(path, names))
        for group in groups:
            batches = file.iter_batches(
                batch_size=_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False
            )
            row = 0
            for batch in batches:
                for value in batch.to_pylist():
                    yield f"row {row} of row group {group}", value
                    row += 1


def _rows_of_arrow(path: Path, fields: frozenset[str]) -> Iterator[Record]:
    arrow = _extra("pyarrow", path)
    ipc = importlib.import_module("pyarrow.ipc")
    row = 0
    with (
        _refused_if_damaged(path),
        arrow.memory_map(str(path)) as file,
        ipc.open_stream(file) as rows,
    ):
        columns = [name for name in rows.schema.names if name in fields]
        if not columns:
            raise DataError(_no_column(path, ", ".join(rows.schema.names)))
        for batch in rows:
            chosen = batch.select(columns)
            for lo in range(0, len(chosen), _ROWS_AT_ONCE):
                for value in chosen.slice(lo, _ROWS_AT_ONCE).to_pylist():
                    yield f"row {row}", value
                    row += 1
        file.seek(-len(_END_OF_ARROW), io.SEEK_END)
        if file.read() != _END_OF_ARROW:  # the library takes a file cut between batches for whole
            raise DataError(
                f"{path}: ends after row {row} without its end mark; copy it here again"
            )


def _no_column(path: Path, names: str) -> str:
    return f"{path}: no column holds text (found: {names:.200}); name it with --text_field"


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    _extra("pyarrow", path)
    with importlib.import_module("pyarrow.parquet").ParquetFile(path) as file:
        yield file


@contextmanager
def _refused_if_damaged(path: Path) -> Iterator[None]:
    arrow = _extra("pyarrow", path)
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: holds text that is not UTF-8 ({error.reason}); convert it"
        ) from None
    except (arrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(f"{path}: cannot be read ({reason:.200}); copy it here again") from error


def _extra(module: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigurationError(
            f"{path}: reading it needs {module}; "
            f'install it with `pip install "rangeflow[{_EXTRAS[module]}]"`'
        ) from None


def _line(file: BinaryIO | io.BufferedIOBase, path: Path, at: int) -> bytes:
    line = file.readline(_LONGEST_RECORD + 1)
    if len(line) > _LONGEST_RECORD:
        raise DataError(
            f"{path}: the line at byte {at} is longer than {_LONGEST_RECORD} bytes; divide it, or "
            "leave it out"
        )
    return line


def _record(line: bytes, path: Path, at: int) -> Record:
    try:
        value = json.loads(_decoded(line, path, at))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: the line at byte {at} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(
            f"{path}: the line at byte {at} has no text in any field (found: "
            f"{type(value).__name__}); each line must be a JSON object"
        )
    return f"the line at byte {at}", value


def _line_cut(file: BinaryIO, at: int, size: int) -> int:
    """The start of the first line at `at` or later."""
    if at <= 0 or at >= size:
        return max(0, min(at, size))
    file.seek(at - 1)
    file.readline(_LONGEST_RECORD)  # a longer one is refused by the part that it begins in
    return file.tell()


def _exact_cut(file: BinaryIO, at: int, size: int, exact: int | None) -> int:
    """As `_text_cut`; at `exact` right there, and on the same side of it everywhere else."""
    if exact is None:
        return _text_cut(file, at, size)
    border = _character_cut(file, exact, size)
    if at == exact:
        return border
    cut = _text_cut(file, at, size)
    return min(cut, border) if at < exact else max(cut, border)


def _text_cut(file: BinaryIO, at: int, size: int) -> int:
    """The end of the first blank line from `at` on; failing that of a line, or of a character."""
    if at <= 0 or at >= size:
        return max(0, min(at, size))
    file.seek(at)
    ahead = file.read(_LOOK_AHEAD)
    blank = _BLANK_LINE.search(ahead)
    if blank is not None:
        return at + blank.end()
    if b"\n" in ahead:
        return at + ahead.index(b"\n") + 1
    return _character_cut(file, at, size)


def _character_cut(file: BinaryIO, at: int, size: int) -> int:
    """The end of the character that `at` lies in."""
    if at <= 0 or at >= size:
        return max(0, min(at, size))
    file.seek(at)
    ahead = file.read(4)
    starts = (place for place, byte in enumerate(ahead) if byte & 0xC0 != 0x80)
    return at + next(starts, len(ahead))


def _decoded(data: bytes, path: Path, at: int) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 at byte {at + error.start} ({error.reason}); convert it, or leave "
            "it out"
        ) from None
