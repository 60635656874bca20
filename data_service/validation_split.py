"""Which text is held out: decided by the hash of the normalised text, unless asked otherwise.

Covers: the same document (up to case, Unicode composition and white space) is on the same side in
every source with the same stamp, also in one added later. A document of more than 4 KB is cut at
blank lines into pieces that are decided one by one; the cuts depend on the text around them only,
so a long text with another head or tail is cut as before once the two agree.
A conversation is never cut: its whole rendered text decides.
Does not cover: a paragraph that occurs inside two otherwise different pieces; a text of more than
4 KB that is wrapped into other lines, or whose paragraphs of about 4 KB are so in one spelling and
longer in another; and, where the stamp says that the end of the inputs is held out (`position-1`),
what occurs in the end and before it.
"""

import hashlib
import itertools
import re
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from storage.errors import ConfigurationError, DataError

RULE = "content-hash-1"
POSITION_RULE = "position-1"
PIECE_BYTES = 4096

_PARAGRAPH_END = re.compile(r"\n(?:[ \t\r]*\n)+")
_LINE_END = re.compile(r"\n")
_LEADING_BLANK = re.compile(r"(?:[ \t\r]*\n)+")
_CUT_EVERY = 8  # a piece ends after one paragraph in eight, chosen by its own hash: about 2 KB


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationStamp:
    """How the split was made; sources of one plan must bear the same stamp."""

    permille: int
    rule: str = RULE
    normalisation: str = "nfc casefold whitespace"
    hash: str = "sha256"
    piece_bytes: int = PIECE_BYTES

    def __post_init__(self) -> None:
        if not 1 <= self.permille <= 500:
            raise ConfigurationError(
                f"{self.option} must be from 1 to 500, got {self.permille}; "
                "10 holds out one part in a hundred"
            )

    def to_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}

    @staticmethod
    def by_position(permille: int) -> "ValidationStamp":
        """The last thousandths of the inputs are held out, whatever they say."""
        return ValidationStamp(
            permille=permille, rule=POSITION_RULE, normalisation="", hash="", piece_bytes=0
        )

    @property
    def option(self) -> str:
        """What one tells `prepare` to have more or less of it."""
        return "validation_tail" if self.is_by_position else "validation_permille"

    @property
    def is_by_position(self) -> bool:
        return self.rule == POSITION_RULE

    @staticmethod
    def from_json(value: object, *, where: str) -> "ValidationStamp":
        if not isinstance(value, dict) or not isinstance(value.get("permille"), int):
            raise DataError(f"{where}: the validation stamp must be an object with a permille")
        stamp = ValidationStamp(permille=value["permille"])
        if value.get("rule") == POSITION_RULE:
            stamp = ValidationStamp.by_position(value["permille"])
        if stamp.to_json() != value:
            raise DataError(
                f"{where}: the validation split was made by {value}, this version makes it by "
                f"{stamp.to_json()}; prepare the source again"
            )
        return stamp


def split_document(text: str, stamp: ValidationStamp) -> list[tuple[str, str]]:
    """The parts of a document as (split, text), in order; joined they are the document.

    Neighbouring pieces on the same side stay together, so that training text is broken only where
    something was held out.
    """
    decided = ((side_of(normalised, stamp), piece) for piece, normalised in pieces(text))
    return [
        (side, "".join(piece for _, piece in group))
        for side, group in groupby(decided, key=lambda pair: pair[0])
    ]


def pieces(text: str) -> list[tuple[str, str]]:
    """The pieces of a document, each with its normalised text; joined they are the document."""
    whole: list[tuple[str, str]] = [(block, normalise(block)) for block in _blocks(text)]
    if sum(len(normalised.encode()) + 1 for _, normalised in whole) <= PIECE_BYTES:
        return [_joined(whole)] if text else []
    return _pieces_of_long(whole)


def readings(text: str) -> Iterator[list[str]]:
    """The normalised pieces of a stored text, in every way in which it may have been cut.

    It was a document, or the part of a longer one that is on one side; then its first and its last
    paragraph may be what is left of paragraphs that were cut line by line.
    """
    yield [normalised for _, normalised in pieces(text)]
    blank = _LEADING_BLANK.match(text)
    lead, body = (text[: blank.end()], text[blank.end() :]) if blank else ("", text)
    paragraphs = list(_cut_after(_PARAGRAPH_END, body))
    seen: list[list[str]] = []
    for first, last in itertools.product((False, True), repeat=2):
        blocks = list(_cut_after(_LINE_END, lead))
        for number, paragraph in enumerate(paragraphs):
            cut = (first and number == 0) or (last and number == len(paragraphs) - 1)
            if cut or len(paragraph) > PIECE_BYTES:
                blocks += _cut_after(_LINE_END, paragraph)
            else:
                blocks.append(paragraph)
        if blocks not in seen:
            seen.append(blocks)
            long = _pieces_of_long([(block, normalise(block)) for block in blocks])
            yield [normalised for _, normalised in long]


def _pieces_of_long(whole: list[tuple[str, str]]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    piece: list[tuple[str, str]] = []
    size = 0
    for block, normalised in whole:
        piece.append((block, normalised))
        encoded = normalised.encode()
        size += len(encoded) + 1
        if size >= PIECE_BYTES or (encoded and zlib.crc32(encoded) % _CUT_EVERY == 0):
            found.append(_joined(piece))
            piece, size = [], 0
    if any(normalised for _, normalised in piece) or not found:
        found.append(_joined(piece))
    elif piece:  # blank lines at the end belong to the last piece
        found[-1] = _joined([found[-1], *piece])
    return found


def normalise(text: str) -> str:
    """What the hash sees: NFC, case folded, white space collapsed."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    else:
        text = text.lower()
    return " ".join(text.split())


def side_of(normalised: str, stamp: ValidationStamp) -> str:
    """The split of a piece, by its normalised text."""
    digest = hashlib.sha256(normalised.encode()).digest()
    held_out = (int.from_bytes(digest[:8], "big") * 1000) >> 64 < stamp.permille
    return "validation" if held_out else "train"


def _blocks(text: str) -> Iterator[str]:
    """Paragraphs with the blank lines after them; a paragraph of over 4 KB, line by line."""
    for paragraph in _cut_after(_PARAGRAPH_END, text):
        if len(paragraph) > PIECE_BYTES:
            yield from _cut_after(_LINE_END, paragraph)
        else:
            yield paragraph


def _cut_after(boundary: re.Pattern[str], text: str) -> Iterator[str]:
    start = 0
    for match in boundary.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    if start < len(text):
        yield text[start:]


def _joined(blocks: list[tuple[str, str]]) -> tuple[str, str]:
    return (
        "".join(block for block, _ in blocks),
        " ".join(normalised for _, normalised in blocks if normalised),
    )
