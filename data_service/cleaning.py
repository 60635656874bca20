"""Cleaning of text, as an option: one form for line ends and letters, and no book's licence.

`clean` gives Unicode's composed form (NFC), `\\n` for each line end, no white space at line ends,
no Project Gutenberg header, licence or production notes, and at most one blank line in a row.
"""

import re
import unicodedata

_LINE_END = re.compile(r"\r\n|[\r\x85\u2028\u2029]")
_TRAILING = re.compile(r"(?<![^\S\n])[^\S\n]+$", re.MULTILINE)  # else quadratic in long white space
_BLANK_LINES = re.compile(r"\n{3,}")
_MARK = re.compile(
    r"^.*(?:(?P<start>\*\*\* ?START OF (THE|THIS) PROJECT GUTENBERG|\*END\*? ?THE SMALL PRINT)"
    r"|\*\*\* ?END OF (THE|THIS) PROJECT GUTENBERG|END OF (THE |THIS )?PROJECT GUTENBERG).*$",
    re.MULTILINE | re.IGNORECASE,
)
_NOTES = re.compile(
    r"^(Produced by .*|E-?text prepared by .*|\[Transcriber'?s? Notes?:?.*\]|\[Illustration\])$\n?",
    re.MULTILINE | re.IGNORECASE,
)


def clean(text: str) -> str:
    """The text cleaned; "" when nothing is left. Cleaning again changes nothing."""
    while True:
        cleaned = _once(text)
        if cleaned == text:
            return cleaned
        text = cleaned


def words_in(text: str) -> int:
    return len(text.split())


def _once(text: str) -> str:
    text = unicodedata.normalize("NFC", _LINE_END.sub("\n", text))
    text = _TRAILING.sub("", _NOTES.sub("", _books(text)))
    return _BLANK_LINES.sub("\n\n", text).strip("\n")


def _books(text: str) -> str:
    """What lies between the marks of Project Gutenberg: of one book, or of several in a row."""
    books: list[str] = []
    begin: int | None = 0
    for mark in _MARK.finditer(text):
        if mark["start"] is not None:  # what lay before was a header
            begin = mark.end()
        elif begin is not None:
            books.append(text[begin : mark.start()])
            begin = None
    return "".join(books) + ("" if begin is None else text[begin:])
