"""Trains a byte-pair encoding on one's own text, with Hugging Face's `tokenizers` (an extra).

Only the training needs the extra: what comes out is a `BpeTokenizer`, which its source's index
holds whole. The same text gives the same tokenizer.
"""

import importlib
from collections.abc import Iterable, Iterator

from data_service.tokenizer import BpeTokenizer
from storage.errors import ConfigurationError

_SPECIALS = 3
_LEAST = 256 + _SPECIALS
_PIECE_CHARACTERS = 1 << 20
_SAMPLE_CHARACTERS = 1 << 28
"""Beyond this many, text adds nothing that one can measure to a vocabulary of ten thousands."""


def trained_bpe(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
    """A tokenizer of at most `vocab_size` ids, its bytes and specials included.

    Trained on the first 2^28 characters of `texts`, which the caller spreads if there are more.
    """
    if not _LEAST <= vocab_size <= 1 << 20:
        raise ConfigurationError(
            f"bpe:SIZE must be from {_LEAST} (all bytes and three special tokens) to {1 << 20}, "
            f"got {vocab_size}"
        )
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ImportError:
        raise ConfigurationError(
            'training a tokenizer needs tokenizers; install it with `pip install "rangeflow[bpe]"`'
        ) from None
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - _SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_sample(texts), trainer)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    byte_of = _byte_of_letter()
    in_order = sorted(vocabulary, key=vocabulary.__getitem__)
    return BpeTokenizer(
        [bytes(byte_of[letter] for letter in token) for token in in_order if len(token) > 1]
    )


def _sample(texts: Iterable[str]) -> Iterator[str]:
    taken = 0
    for text in texts:
        for at in range(0, len(text), _PIECE_CHARACTERS):
            if taken >= _SAMPLE_CHARACTERS:
                return
            piece = text[at : at + _PIECE_CHARACTERS]
            taken += len(piece)
            yield piece


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's letters for bytes: github.com/openai/gpt-2/blob/master/src/encoder.py."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + number): byte for number, byte in enumerate(others)}
