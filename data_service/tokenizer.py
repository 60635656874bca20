"""Tokenizers: text to token ids and back, each with a fingerprint that sources are bound to.

A tokenizer's `spec()` is JSON from which `tokenizer_from_spec` makes the same tokenizer anywhere;
its fingerprint is the sha256 of what decides the ids. `encode` is always *ordinary*: `<|im_start|>`
or `<|endoftext|>` in a text stays text, and no special id comes out of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import tiktoken

from storage.canonical import canonical_json, sha256_hex
from storage.errors import ConfigurationError, DataError, StoreUnavailableError

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_NAMES = ("bytes", "characters", "gpt2")

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
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> Ids: ...

    def decode(self, ids: Sequence[int] | Ids) -> str: ...

    def spec(self) -> dict[str, object]: ...


def make_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`, for those that need no corpus ("bytes", "gpt2")."""
    if name == "bytes":
        return ByteTokenizer()
    if name == "gpt2":
        return Gpt2Tokenizer()
    if name in ("characters", "chars"):
        raise ConfigurationError(
            "the characters tokenizer is made from a corpus: use CharacterTokenizer.of_texts"
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
    if kind not in ("bytes", "gpt2"):
        raise DataError(
            f"tokenizer kind must be one of {', '.join(TOKENIZER_NAMES)}; the spec says {kind!r}"
        )
    tokenizer = make_tokenizer(str(kind))
    if tokenizer.spec() != dict(spec):
        raise DataError(
            f"the {kind} tokenizer here is {tokenizer.spec()}, the data was made with {dict(spec)}"
        )
    return tokenizer


class ByteTokenizer:
    """UTF-8 bytes as ids 0-255, and 256 for the end of text. Needs no download."""

    name = "bytes"
    vocab_size = 257
    end_of_text = 256

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self)

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD, since a model may sample them."""
        _check_ids(ids, self)
        pieces: list[bytes] = [
            END_OF_TEXT.encode() if token == self.end_of_text else bytes((token,))
            for token in map(int, ids)
        ]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def spec(self) -> dict[str, object]:
        return {"kind": "bytes"}


class CharacterTokenizer:
    """One id per character of a sorted vocabulary, and one more for the end of text."""

    name = "characters"

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

    name = "gpt2"
    vocab_size = 50_257
    end_of_text = 50_256

    # The files' digests as tiktoken_ext/openai_public.py checks them after a download.
    _VOCABULARY_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    _ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbfe636dd"

    def __init__(self) -> None:
        self._loaded: tiktoken.Encoding | None = None

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self)

    def encode(self, text: str) -> Ids:
        return np.array(self._encoding().encode_ordinary(text), dtype=np.int64)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        _check_ids(ids, self)
        return self._encoding().decode([int(token) for token in ids])

    def spec(self) -> dict[str, object]:
        return {
            "kind": "gpt2",
            "vocabulary_sha256": self._VOCABULARY_SHA256,
            "encoder_sha256": self._ENCODER_SHA256,
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


def _fingerprint(tokenizer: Tokenizer) -> str:
    definition = {**tokenizer.spec(), "end_of_text": tokenizer.end_of_text}
    return sha256_hex(canonical_json(definition))


def _check_ids(ids: Sequence[int] | Ids, tokenizer: Tokenizer) -> None:
    for place, token in enumerate(ids):
        if not 0 <= token < tokenizer.vocab_size:
            raise DataError(
                f"token id {int(token)} at place {place} is not in the {tokenizer.name} "
                f"vocabulary of {tokenizer.vocab_size}"
            )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
