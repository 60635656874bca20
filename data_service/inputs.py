"""What a preparation reads: documents from files, folders and memory, in parts of bounded size.

A part is a range of one input, or the whole of an input that cannot be cut. A document is a text
or a conversation.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from data_service.chat import CHAT_FIELDS, Conversation, conversation_of, is_chat
from data_service.formats import (
    EXPANSION,
    RECORD_SUFFIXES,
    TEXT_SUFFIXES,
    kind_of,
    opened,
    records_between,
    row_groups,
    text_between,
)
from storage.canonical import sha256_hex
from storage.errors import ConfigurationError, DataError

logger = logging.getLogger(__name__)

Document = str | Conversation
Format = Literal["auto", "text", "chat"]


class Part(NamedTuple):
    """A range of one input: bytes, row groups, or all of it.

    `size_bytes` is about how much text it holds. `split` is "" where the text itself decides what
    is held out, else the split that all of the part belongs to.
    """

    input: int
    lo: int
    hi: int
    size_bytes: int
    split: str = ""


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

    @property
    def tail_permille(self) -> int:
        """How much of the end is held out by position, in thousandths; 0: the text decides."""

    def units(self, unit_bytes: int) -> list[list[Part]]:
        """Units of work of about `unit_bytes`, in order; longer where an input cannot be cut."""

    def documents(self, part: Part) -> Iterator[Document]:
        """Those of a part, in order; () for a conversation that teaches nothing."""

    def spec(self) -> dict[str, object] | None:
        """JSON from which another process makes the same corpus; None when it cannot."""

    def check_unchanged(self) -> None:
        """Refuse an input that somebody wrote to since it was described in `inputs`."""


class MemoryCorpus:
    """Named texts that are at hand; each is one document."""

    tail_permille = 0

    def __init__(self, texts: Sequence[tuple[str, str]]) -> None:
        encoded = [(name, text.encode("utf-8")) for name, text in texts]
        self._texts = [text for _, text in texts]
        self.inputs: Sequence[Input] = tuple(
            Input(path=name, size_bytes=len(data), sha256=sha256_hex(data))
            for name, data in encoded
        )

    def units(self, unit_bytes: int) -> list[list[Part]]:
        sizes = [item.size_bytes for item in self.inputs]
        return _grouped([Part(i, 0, size, size) for i, size in enumerate(sizes)], unit_bytes)

    def documents(self, part: Part) -> Iterator[Document]:
        yield self._texts[part.input]

    def spec(self) -> dict[str, object] | None:
        return None

    def check_unchanged(self) -> None:
        pass


class FileCorpus:
    """Files of text and of records, folders of them (by suffix, hidden ones left out), data sets.

    A folder that Hugging Face's `save_to_disk` made is read as the data set that it is.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        text_field: str = "text",
        format: Format = "auto",
        tail_permille: int = 0,
    ) -> None:
        self._files = [file for path in paths for file in _files_of(Path(path))]
        if not self._files:
            raise DataError("nothing to prepare: name a text file, a .jsonl file or a folder")
        self._kinds = [kind_of(path) for path in self._files]
        self._text_field = text_field
        self._format = format
        self.tail_permille = tail_permille
        self._states = [_state(path) for path in self._files]
        with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to others
            self.inputs: Sequence[Input] = tuple(pool.map(_described, self._files))

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "FileCorpus":
        """The corpus that has this `spec()`; its files are not read again to describe them."""
        corpus = cls.__new__(cls)
        corpus.inputs = tuple(Input(**item) for item in spec["inputs"])
        corpus._files = [Path(item.path) for item in corpus.inputs]
        corpus._kinds = [kind_of(path) for path in corpus._files]
        corpus._text_field = spec["text_field"]
        corpus._format = spec["format"]
        corpus.tail_permille = spec["tail_permille"]
        return corpus

    def spec(self) -> dict[str, object] | None:
        return {
            "inputs": [item.to_json() for item in self.inputs],
            "text_field": self._text_field,
            "format": self._format,
            "tail_permille": self.tail_permille,
        }

    def check_unchanged(self) -> None:
        for path, state in zip(self._files, self._states, strict=True):
            if _state(path) != state:
                raise DataError(
                    f"{path}: was written to while it was prepared; run the same command again "
                    "when that is over, and it sees whether the text is another"
                )

    def units(self, unit_bytes: int) -> list[list[Part]]:
        tail = self._tail()
        parts = [
            part
            for number in range(len(self._files))
            for part in self._parts(number, unit_bytes, tail)
        ]
        return _grouped(parts, unit_bytes)

    def documents(self, part: Part) -> Iterator[Document]:
        path, kind = self._files[part.input], self._kinds[part.input]
        if kind == "text":
            number, at = self._tail()
            exact = at if number == part.input else None
            size = self.inputs[part.input].size_bytes
            text = text_between(path, part.lo, part.hi, size, exact)
            if text:
                yield text
            return
        fields = CHAT_FIELDS | {self._text_field}
        for place, record in records_between(path, kind, part.lo, part.hi, fields):
            yield self._document(record, f"{path}: {place}")

    def _parts(self, number: int, unit_bytes: int, tail: tuple[int, int]) -> Iterator[Part]:
        size = self.inputs[number].size_bytes
        cuttable = self._kinds[number] in ("text", "lines")
        cut = tail[1] if tail[0] == number else None
        split = "" if not self.tail_permille else "validation" if number > tail[0] else "train"
        if cut is not None and cut < size and not cuttable:
            raise ConfigurationError(
                f"{self._files[number]}: the validation tail begins inside this file, and only "
                "text and .jsonl can be cut by position; unpack it, or put it elsewhere in order"
            )
        if self._kinds[number] == "parquet":
            yield from self._row_group_parts(number, split)
        elif not cuttable:
            yield Part(number, 0, size, size * EXPANSION.get(self._kinds[number], 1), split)
        else:
            for lo in range(0, size, unit_bytes):
                hi = min(lo + unit_bytes, size)
                if cut is None or not lo < cut < hi:
                    late = cut is not None and lo >= cut
                    yield Part(number, lo, hi, hi - lo, "validation" if late else split)
                else:
                    yield Part(number, lo, cut, cut - lo, "train")
                    yield Part(number, cut, hi, hi - cut, "validation")

    def _row_group_parts(self, number: int, split: str) -> Iterator[Part]:
        """The file's size is shared out among its row groups."""
        groups = row_groups(self._files[number])
        size = self.inputs[number].size_bytes * EXPANSION["parquet"]
        whole, before = max(1, sum(groups)), 0
        for group, group_bytes in enumerate(groups):
            after = before + group_bytes
            share = size * after // whole - size * before // whole
            yield Part(number, group, group + 1, share, split)
            before = after

    def _tail(self) -> tuple[int, int]:
        """The file and the byte in it where the held-out tail begins; behind all without one."""
        left = sum(item.size_bytes for item in self.inputs)
        left -= left * self.tail_permille // 1000
        for number, item in enumerate(self.inputs):
            if self.tail_permille and left < item.size_bytes:
                return (number, left) if left else (number - 1, self.inputs[number - 1].size_bytes)
            left -= item.size_bytes
        return len(self._files), 0

    def _document(self, record: Mapping[str, object], where: str) -> Document:
        has_text = isinstance(record.get(self._text_field), str)
        has_chat = is_chat(record)
        if self._format == "auto" and has_text and has_chat:
            raise DataError(
                f"{where} has text in {self._text_field!r} and the fields of a conversation; say "
                "--format text or --format chat"
            )
        if has_chat and self._format != "text":
            turns = conversation_of(record, where)
            return tuple(turn._replace(content=_whole(turn.content)) for turn in turns)
        if has_text and self._format != "chat":
            return _whole(str(record[self._text_field]))
        found = ", ".join(sorted(map(str, record)))
        if self._format == "chat":
            raise DataError(
                f"{where} is no conversation (found: {found:.200}); expected {{instruction, input, "
                "output}, {conversations} or {messages}"
            )
        raise DataError(
            f"{where} has no text in field {self._text_field!r} (found: {found:.200}); name the "
            "field with --text_field"
        )


def _whole(text: str) -> str:
    """JSON may hold half a surrogate pair (\\ud83d), which is no text in any encoding."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _files_of(path: Path) -> list[Path]:
    try:
        if path.is_file():
            return [path]
        if not path.is_dir():
            raise DataError(f"{path}: there is no such file or folder")
        if (path / "dataset_dict.json").is_file():
            raise DataError(
                f"{path}: holds several splits; name the folder of one, such as {path}/train"
            )
        if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
            return _files_of_data_set(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    found, others = list[Path](), list[Path]()
    for file in sorted(_files_below(path), key=lambda file: file.relative_to(path).as_posix()):
        is_read = file.name.lower().endswith((*TEXT_SUFFIXES, *RECORD_SUFFIXES))
        (found if is_read else others).append(file)
    if not found:
        raise DataError(
            f"{path}: no text in this folder (looked for .txt, .md, .py, .jsonl, .parquet and "
            "such); name the files themselves if they end otherwise"
        )
    if others:
        logger.warning("%s: left out %d files of other kinds, as %s", path, len(others), others[0])
    return found


def _files_below(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Files and links, hidden ones left out; a link to a folder is one, unless it leads back."""
    try:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        entries = [(entry, entry.is_dir()) for entry in folder.iterdir() if here not in above]
    except OSError as error:
        raise _unreadable(folder, error) from error
    for entry, is_folder in entries:
        if entry.name.startswith("."):
            continue
        if is_folder:
            yield from _files_below(entry, above | {here})
        elif entry.is_file() or entry.is_symlink():  # one that leads nowhere fails when opened
            yield entry


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror}); leave it out")


def _files_of_data_set(path: Path) -> list[Path]:
    """The Arrow files of a data set, in its order."""
    try:
        state = json.loads((path / "state.json").read_bytes())
        names = [item["filename"] for item in state["_data_files"]]
        chosen = state.get("_indices_data_files")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: state.json does not list the data set's files") from None
    if chosen:
        raise DataError(
            f"{path}: some rows were chosen or moved without writing them; call "
            "`flatten_indices()` before `save_to_disk`"
        )
    files = [path / str(name) for name in names]
    for file in files:
        if file.parent != path or not file.is_file():
            raise DataError(f"{path}: state.json names {file.name}, which is not in this folder")
    return files


def _state(path: Path) -> tuple[int, int]:
    """What a file's system says of its last change."""
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return status.st_size, status.st_mtime_ns


def _described(path: Path) -> Input:
    with opened(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
    # Of a link its own name, not that of what it leads to: the suffix says how a file is read.
    named = (path.parent.resolve() / path.name).as_posix()
    try:
        named.encode()
    except UnicodeEncodeError:
        raise DataError(f"{named!r}: the name of this file is not UTF-8; rename it") from None
    return Input(path=named, size_bytes=size, sha256=digest)


def _grouped(parts: Sequence[Part], unit_bytes: int) -> list[list[Part]]:
    units: list[list[Part]] = []
    size = 0
    for part in parts:
        if not units or size + part.size_bytes > unit_bytes:
            units.append([])
            size = 0
        units[-1].append(part)
        size += part.size_bytes
    return units
