"""Tokenizers: text to token ids and back, each with a fingerprint that sources are bound to.

A tokenizer's `spec()` is JSON from which `tokenizer_from_spec` makes the same tokenizer anywhere;
its fingerprint is the sha256 of what decides the ids. `encode` is always *ordinary*: `<|im_start|>`
or `<|endoftext|>` in a text stays text, and no special id comes out of it. The special ids come
after all others, the end of text first.
"""

import base64
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import tiktoken

from storage.canonical import canonical_json, sha256_hex
from storage.errors import ConfigurationError, DataError, StoreUnavailableError

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
TOKENIZER_NAMES = ("bytes", "bytes-chat", "characters", "gpt2", "gpt2-chat", "bpe:SIZE")

# How GPT-2 divides text before it merges: github.com/openai/gpt-2/blob/master/src/encoder.py
WORD_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)

_LONGEST_SPACE = 900_000
_LONG_SPACE = re.compile(rf"(?<!\s)\s{{{_LONGEST_SPACE},}}")
"""tiktoken's regular expressions give up in a million of white space, and end the process."""

Ids = npt.NDArray[np.int64]


class Tokenizer(Protocol):
    """What the rest of the data service asks of a tokenizer."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int:
        """The count of ids, specials included: every id is below it."""

    @property
    def end_of_text(self) -> int:
        """The id that closes a document; `encode` never gives it."""

    @property
    def chat_ids(self) -> tuple[int, int] | None:
        """The ids of `<|im_start|>` and `<|im_end|>`, for tokenizers that have them."""

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> Ids: ...

    def decode(self, ids: Sequence[int] | Ids) -> str: ...

    def spec(self) -> dict[str, object]: ...


def make_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`, for those that need no corpus ("bytes", "gpt2-chat", ...)."""
    kind, _, chat = name.partition("-")
    if kind in ("bytes", "gpt2") and chat in ("", "chat") and not name.endswith("-"):
        return (ByteTokenizer if kind == "bytes" else Gpt2Tokenizer)(chat=bool(chat))
    if name in ("characters", "chars") or name.startswith("bpe"):
        raise ConfigurationError(
            f"the {name} tokenizer is made from a corpus: use CharacterTokenizer.of_texts or "
            "bpe_training.trained_bpe"
        )
    raise ConfigurationError(f"tokenizer must be one of {', '.join(TOKENIZER_NAMES)}; got {name!r}")


def tokenizer_from_spec(spec: Mapping[str, object]) -> Tokenizer:
    """The tokenizer whose `spec()` this is; DataError for a spec that no tokenizer gives."""
    kind = spec.get("kind")
    if kind == "characters":
        characters = spec.get("characters")
        if not isinstance(characters, str):
            raise DataError("a characters tokenizer's spec must hold its `characters` as a string")
        return CharacterTokenizer(characters)
    if kind == "bpe":
        return BpeTokenizer(_merged(spec.get("merged")))
    if kind not in ("bytes", "gpt2"):
        raise DataError(
            f"tokenizer kind must be one of bytes, characters, gpt2, bpe; the spec says {kind!r}"
        )
    tokenizer = make_tokenizer(f"{kind}-chat" if spec.get("chat") is True else str(kind))
    if tokenizer.spec() != dict(spec):
        raise DataError(
            f"the {kind} tokenizer here is {tokenizer.spec()}, the data was made with {dict(spec)}"
        )
    return tokenizer


class ByteTokenizer:
    """UTF-8 bytes as ids 0-255, and 256 for the end of text. Needs no download."""

    end_of_text = 256

    def __init__(self, *, chat: bool = False) -> None:
        self.name = "bytes-chat" if chat else "bytes"
        self.chat_ids = (257, 258) if chat else None
        self.vocab_size = 259 if chat else 257

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self)

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD, since a model may sample them."""
        return _decoded(ids, self, bytes)

    def spec(self) -> dict[str, object]:
        return {"kind": "bytes", **_chat_of(self)}


class CharacterTokenizer:
    """One id per character of a sorted vocabulary, and one more for the end of text."""

    name = "characters"
    chat_ids = None

    def __init__(self, characters: str) -> None:
        if list(characters) != sorted(set(characters)):
            raise DataError("a characters tokenizer's vocabulary must be sorted, without repeats")
        self._characters = characters
        self._ids = {character: index for index, character in enumerate(characters)}

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> "CharacterTokenizer":
        """A tokenizer for exactly the characters that occur in `texts`."""
        seen: set[str] = set()
        for text in texts:
            seen.update(text)
        return cls("".join(sorted(seen)))

    @property
    def vocab_size(self) -> int:
        return len(self._characters) + 1

    @property
    def end_of_text(self) -> int:
        return len(self._characters)

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self)

    def encode(self, text: str) -> Ids:
        try:
            return np.array([self._ids[character] for character in text], dtype=np.int64)
        except KeyError as error:
            raise DataError(
                f"character {error.args[0]!r} is not among the {len(self._characters)} characters "
                "of this tokenizer; prepare the source again with the text that holds it"
            ) from None

    def decode(self, ids: Sequence[int] | Ids) -> str:
        _check_ids(ids, self)
        return "".join(
            END_OF_TEXT if token == self.end_of_text else self._characters[token]
            for token in map(int, ids)
        )

    def spec(self) -> dict[str, object]:
        return {"kind": "characters", "characters": self._characters}


class Gpt2Tokenizer:
    """GPT-2's byte-pair encoding by tiktoken; the vocabulary is loaded at the first use."""

    end_of_text = 50_256

    # The files' digests as tiktoken_ext/openai_public.py checks them after a download.
    _VOCABULARY_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    _ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbfe636dd"

    def __init__(self, *, chat: bool = False) -> None:
        self.name = "gpt2-chat" if chat else "gpt2"
        self.chat_ids = (50_257, 50_258) if chat else None
        self.vocab_size = 50_259 if chat else 50_257
        self._loaded: tiktoken.Encoding | None = None

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self)

    def encode(self, text: str) -> Ids:
        return _encoded(self._encoding(), text)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        return _decoded(ids, self, self._encoding().decode_bytes)

    def spec(self) -> dict[str, object]:
        return {
            "kind": "gpt2",
            "vocabulary_sha256": self._VOCABULARY_SHA256,
            "encoder_sha256": self._ENCODER_SHA256,
            **_chat_of(self),
        }

    def _encoding(self) -> tiktoken.Encoding:
        if self._loaded is None:
            try:
                self._loaded = tiktoken.get_encoding("gpt2")
            except Exception as error:  # requests' errors, OSError, a wrong digest: one way out
                raise StoreUnavailableError(
                    "GPT-2's vocabulary could not be loaded "
                    f"({type(error).__name__}: {_first_line(error)}); set TIKTOKEN_CACHE_DIR to a "
                    "folder that holds tiktoken's two GPT-2 files, or use the bytes tokenizer, "
                    "which needs no download"
                ) from error
        return self._loaded


class BpeTokenizer:
    """A byte-pair encoding of one's own: all bytes, then what was merged, in order of merging.

    It is run by tiktoken; `bpe_training` makes it. The specials of conversations are always there.
    """

    name = "bpe"

    def __init__(self, merged: Sequence[bytes]) -> None:
        ranks = {bytes((byte,)): byte for byte in range(256)}
        for token in merged:
            ranks.setdefault(token, len(ranks))
        if len(ranks) != 256 + len(merged) or b"" in ranks:
            raise DataError("a bpe tokenizer's tokens must be longer than a byte, without repeats")
        self._merged = tuple(merged)
        self.end_of_text = len(ranks)
        self.chat_ids = (len(ranks) + 1, len(ranks) + 2)
        self.vocab_size = len(ranks) + 3
        self._encoding = tiktoken.Encoding(
            "bpe", pat_str=WORD_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self)

    def encode(self, text: str) -> Ids:
        return _encoded(self._encoding, text)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        return _decoded(ids, self, self._encoding.decode_bytes)

    def spec(self) -> dict[str, object]:
        return {
            "kind": "bpe",
            "end_of_text": self.end_of_text,
            "merged": " ".join(base64.b64encode(token).decode() for token in self._merged),
        }


def _merged(written: object) -> list[bytes]:
    try:
        if isinstance(written, str):
            return [base64.b64decode(token, validate=True) for token in written.split()]
    except ValueError:  # binascii's error, or a letter that is not ASCII
        pass
    raise DataError("a bpe tokenizer's spec must hold its `merged` tokens in base64")


def _encoded(encoding: tiktoken.Encoding, text: str) -> Ids:
    if len(text) < _LONGEST_SPACE:
        return np.array(encoding.encode_ordinary(text), dtype=np.int64)
    ids: list[int] = []
    at = 0
    for run in _LONG_SPACE.finditer(text):
        for cut in range(run.start() + _LONGEST_SPACE, run.end(), _LONGEST_SPACE):
            ids += encoding.encode_ordinary(text[at:cut])
            at = cut
    return np.array(ids + encoding.encode_ordinary(text[at:]), dtype=np.int64)


def _decoded(
    ids: Sequence[int] | Ids, tokenizer: Tokenizer, to_bytes: Callable[[list[int]], bytes]
) -> str:
    _check_ids(ids, tokenizer)
    specials = {token: text.encode() for text, token in _specials(tokenizer).items()}
    array = np.asarray(ids, dtype=np.int64)
    at, pieces = 0, list[bytes]()
    for place in np.flatnonzero(array >= tokenizer.end_of_text).tolist():
        pieces += [to_bytes(array[at:place].tolist()), specials[int(array[place])]]
        at = place + 1
    pieces.append(to_bytes(array[at:].tolist()))
    return b"".join(pieces).decode("utf-8", errors="replace")


def _specials(tokenizer: Tokenizer) -> dict[str, int]:
    start, end = tokenizer.chat_ids or (-1, -1)
    return {END_OF_TEXT: tokenizer.end_of_text, IM_START: start, IM_END: end}


def _chat_of(tokenizer: Tokenizer) -> dict[str, object]:
    """What a spec says of it; nothing without, as before there were conversations."""
    return {"chat": True} if tokenizer.chat_ids else {}


def _fingerprint(tokenizer: Tokenizer) -> str:
    definition = {**tokenizer.spec(), "end_of_text": tokenizer.end_of_text}
    return sha256_hex(canonical_json(definition))


def _check_ids(ids: Sequence[int] | Ids, tokenizer: Tokenizer) -> None:
    array = np.asarray(ids, dtype=np.int64)
    outside = np.flatnonzero((array < 0) | (array >= tokenizer.vocab_size))
    if outside.size:
        place = int(outside[0])
        raise DataError(
            f"token id {int(array[place])} at place {place} is not in the {tokenizer.name} "
            f"vocabulary of {tokenizer.vocab_size}"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
