"""Cleaning of text, as an option: one form for line ends and letters, and no book's licence.

`clean` gives Unicode's composed form (NFC), `\\n` for each line end, no white space at line ends,
no Project Gutenberg header, licence or production notes, and at most one blank line in a row.
"""

import re
import unicodedata

_LINE_END = re.compile(r"\r\n|[\r\x85\u2028\u2029]")
_TRAILING = re.compile(r"[^\S\n]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")
_START = re.compile(
    r"^.*(\*\*\* ?START OF (THE|THIS) PROJECT GUTENBERG|\*END\*? ?THE SMALL PRINT).*$",
    re.MULTILINE | re.IGNORECASE,
)
_END = re.compile(
    r"^.*(\*\*\* ?END OF (THE|THIS) PROJECT GUTENBERG|END OF (THE |THIS )?PROJECT GUTENBERG).*$",
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
    start = _START.search(text)
    if start is not None:
        text = text[start.end() :]
    end = _END.search(text)
    if end is not None:
        text = text[: end.start()]
    text = _TRAILING.sub("", _NOTES.sub("", text))
    return _BLANK_LINES.sub("\n\n", text).strip("\n")
