"""What a preparation reads: documents from files, folders and memory, in parts of bounded size.

A part is a byte range of one input. The cut between two parts of a file depends on the file and
the position only, so the parts together give each document once, whichever are read.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Protocol

from storage.canonical import sha256_hex
from storage.errors import DataError

_PROSE = (".txt", ".md", ".markdown", ".rst", ".tex", ".html", ".htm", ".xml", ".log")
_TABLES = (".csv", ".tsv", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".sql")
_CODE = (
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cs", ".java", ".js", ".jsx", ".ts"),
    *(".tsx", ".go", ".rs", ".rb", ".php", ".sh", ".lua", ".pl", ".r", ".jl", ".scala", ".kt"),
)
TEXT_SUFFIXES = frozenset((*_PROSE, *_TABLES, *_CODE))
JSONL_SUFFIXES = frozenset((".jsonl", ".ndjson"))

_LOOK_AHEAD = 1 << 20  # a blank line is sought this far, then a line end, then a character's end
_BLANK_LINE = re.compile(rb"\n(?:[ \t\r]*\n)+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Bytes [lo, hi) of one input, up to the cut that follows each."""

    input: int
    lo: int
    hi: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """One input as a ledger is bound to it."""

    path: str
    size_bytes: int
    sha256: str

    def to_json(self) -> dict[str, object]:
        return {"path": self.path, "size_bytes": self.size_bytes, "sha256": self.sha256}


class Corpus(Protocol):
    """Documents to prepare, in an order that never changes."""

    @property
    def inputs(self) -> Sequence[Input]: ...

    def units(self, unit_bytes: int) -> list[list[Part]]:
        """Units of work of about `unit_bytes`, in order."""

    def documents(self, part: Part) -> Iterator[str]: ...


class MemoryCorpus:
    """Named texts that are at hand; each is one document."""

    def __init__(self, texts: Sequence[tuple[str, str]]) -> None:
        encoded = [(name, text.encode("utf-8")) for name, text in texts]
        self._texts = [text for _, text in texts]
        self.inputs: Sequence[Input] = tuple(
            Input(path=name, size_bytes=len(data), sha256=sha256_hex(data))
            for name, data in encoded
        )

    def units(self, unit_bytes: int) -> list[list[Part]]:
        whole = [Part(input=i, lo=0, hi=item.size_bytes) for i, item in enumerate(self.inputs)]
        return _grouped(whole, unit_bytes)

    def documents(self, part: Part) -> Iterator[str]:
        yield self._texts[part.input]


class FileCorpus:
    """Text files, JSON lines, and folders of them (recursive, by suffix, hidden ones left out)."""

    def __init__(self, paths: Sequence[str | Path], *, text_field: str = "text") -> None:
        self._files = [file for path in paths for file in _files_of(Path(path))]
        if not self._files:
            raise DataError("nothing to prepare: name a text file, a .jsonl file or a folder")
        self._text_field = text_field
        self.inputs: Sequence[Input] = tuple(_described(path) for path in self._files)

    def units(self, unit_bytes: int) -> list[list[Part]]:
        parts = [
            Part(input=number, lo=lo, hi=min(lo + unit_bytes, item.size_bytes))
            for number, item in enumerate(self.inputs)
            for lo in range(0, item.size_bytes, unit_bytes)
        ]
        return _grouped(parts, unit_bytes)

    def documents(self, part: Part) -> Iterator[str]:
        path, size = self._files[part.input], self.inputs[part.input].size_bytes
        is_lines = path.suffix.lower() in JSONL_SUFFIXES
        cut = _line_cut if is_lines else _text_cut
        with _opened(path) as file:
            lo, hi = cut(file, part.lo, size), cut(file, part.hi, size)
            file.seek(lo)
            if is_lines:
                while file.tell() < hi:
                    at = file.tell()
                    line = file.readline()
                    if line.strip():
                        yield self._text_of(line, path, at)
            elif lo < hi:
                yield _decoded(file.read(hi - lo), path, lo)

    def _text_of(self, line: bytes, path: Path, at: int) -> str:
        try:
            value = json.loads(_decoded(line, path, at))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: the line at byte {at} is not JSON ({error})") from None
        text = value.get(self._text_field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            found = ", ".join(sorted(value)) if isinstance(value, dict) else type(value).__name__
            raise DataError(
                f"{path}: the line at byte {at} has no text in field {self._text_field!r} (found: "
                f"{found:.200}); name the field with --text_field"
            )
        # JSON may hold half a surrogate pair (\ud83d), which is no text in any encoding.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix.lower() in (".parquet", ".gz", ".zst", ".zip"):
            raise DataError(f"{path}: {path.suffix} is not read; unpack it to text or .jsonl first")
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: there is no such file or folder")
    found = [
        file
        for file in sorted(path.rglob("*"), key=lambda file: file.relative_to(path).as_posix())
        if file.suffix.lower() in TEXT_SUFFIXES | JSONL_SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.is_file()
    ]
    if not found:
        raise DataError(
            f"{path}: no text in this folder (looked for .txt, .md, .py, .jsonl and such); name "
            "the files themselves if they end otherwise"
        )
    return found


def _described(path: Path) -> Input:
    with _opened(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
    return Input(path=path.resolve().as_posix(), size_bytes=size, sha256=digest)


def _opened(path: Path) -> BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); leave it out") from error


def _grouped(parts: Sequence[Part], unit_bytes: int) -> list[list[Part]]:
    units: list[list[Part]] = []
    size = 0
    for part in parts:
        if not units or size + part.hi - part.lo > unit_bytes:
            units.append([])
            size = 0
        units[-1].append(part)
        size += part.hi - part.lo
    return units


def _line_cut(file: BinaryIO, at: int, size: int) -> int:
    """The start of the first line at `at` or later."""
    if at <= 0 or at >= size:
        return max(0, min(at, size))
    file.seek(at - 1)
    file.readline()
    return file.tell()


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
    starts = (place for place, byte in enumerate(ahead[:4]) if byte & 0xC0 != 0x80)
    return at + next(starts, len(ahead[:4]))


def _decoded(data: bytes, path: Path, at: int) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 at byte {at + error.start} ({error.reason}); convert it, or leave "
            "it out"
        ) from None
