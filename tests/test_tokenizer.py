"""Tokenizers: round trips, ordinary encoding, specs, and clear refusals."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_service.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    Gpt2Tokenizer,
    Tokenizer,
    make_tokenizer,
    tokenizer_from_spec,
)
from storage.errors import ConfigurationError, DataError, StoreUnavailableError

TIKTOKEN_FILES = Path(__file__).resolve().parents[2] / "shared" / "tiktoken"
SPECIAL_LOOKING = "a<|im_start|>b<|endoftext|>"


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tokenizer]:
    if not TIKTOKEN_FILES.is_dir():
        pytest.skip(f"GPT-2's vocabulary is not at {TIKTOKEN_FILES}")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN_FILES))
    yield make_tokenizer("gpt2")


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip_every_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_bytes_end_of_text_is_the_last_id() -> None:
    tokenizer = make_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)
    assert tokenizer.decode([97, 256, 255]) == "a<|endoftext|>\ufffd"


def test_characters_are_sorted_and_round_trip() -> None:
    tokenizer = CharacterTokenizer.of_texts(["banana", "né"])
    assert tokenizer.spec()["characters"] == "abené" or tokenizer.vocab_size == 5
    assert tokenizer.decode(tokenizer.encode("ébaba")) == "ébaba"
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1


def test_an_unknown_character_is_refused() -> None:
    with pytest.raises(DataError, match="character 'z' is not among the 2 characters"):
        CharacterTokenizer("ab").encode("abz")


def test_special_looking_text_stays_text(gpt2: Tokenizer) -> None:
    for tokenizer in (ByteTokenizer(), CharacterTokenizer.of_texts([SPECIAL_LOOKING]), gpt2):
        ids = tokenizer.encode(SPECIAL_LOOKING).tolist()
        assert len(ids) > 5
        assert tokenizer.end_of_text not in ids
        assert max(ids) < tokenizer.vocab_size
        assert tokenizer.decode(ids) == SPECIAL_LOOKING


def test_gpt2_is_the_gpt2_encoding(gpt2: Tokenizer) -> None:
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.decode([15496, 995, 50256]) == "Hello world<|endoftext|>"
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50_257, 50_256)


def test_a_tokenizer_comes_back_from_its_spec() -> None:
    tokenizers = [ByteTokenizer(), CharacterTokenizer("abc"), Gpt2Tokenizer()]
    for tokenizer in tokenizers:
        again = tokenizer_from_spec(tokenizer.spec())
        assert type(again) is type(tokenizer)
        assert again.fingerprint == tokenizer.fingerprint
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == 3
    assert CharacterTokenizer("abc").fingerprint != CharacterTokenizer("abd").fingerprint


def test_fingerprints_are_frozen() -> None:
    assert ByteTokenizer().fingerprint[:16] == "2834157e68046421"
    assert Gpt2Tokenizer().fingerprint[:16] == "89d538bb9f70eaf8"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "words"}, "must be one of bytes, characters, gpt2, bpe; the spec says 'words'"),
        ({"kind": "characters"}, "must hold its `characters`"),
        ({"kind": "characters", "characters": "ba"}, "must be sorted, without repeats"),
        ({"kind": "gpt2", "vocabulary_sha256": "00"}, "the data was made with"),
    ],
)
def test_a_bad_spec_is_refused(spec: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenizer_from_spec(spec)


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"must be one of .* got 'words'"):
        make_tokenizer("words")
    with pytest.raises(ConfigurationError, match="made from a corpus"):
        make_tokenizer("chars")


@pytest.mark.parametrize("token", [257, -1])
def test_an_id_outside_the_vocabulary_is_not_decoded(token: int) -> None:
    with pytest.raises(DataError, match=f"token id {token} at place 1 is not in the bytes"):
        ByteTokenizer().decode([1, token])


def test_a_network_failure_names_the_cache_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiktoken_registry = pytest.importorskip("tiktoken.registry")
    monkeypatch.setattr(tiktoken_registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(StoreUnavailableError, match=r"could not be loaded.*TIKTOKEN_CACHE_DIR"):
        make_tokenizer("gpt2").encode("a")
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path)


@pytest.mark.parametrize("name", ["bytes-chat", "gpt2-chat"])
def test_chat_tokenizers_have_two_more_ids_and_the_same_others(
    name: str, request: pytest.FixtureRequest
) -> None:
    if name.startswith("gpt2"):
        request.getfixturevalue("gpt2")
    chat, plain = make_tokenizer(name), make_tokenizer(name.removesuffix("-chat"))
    start = plain.vocab_size
    assert chat.chat_ids == (start, start + 1)
    assert (chat.vocab_size, chat.end_of_text) == (start + 2, plain.end_of_text)
    assert chat.encode(SPECIAL_LOOKING).tolist() == plain.encode(SPECIAL_LOOKING).tolist()
    assert chat.decode([start, *chat.encode("user")]) == "<|im_start|>user"
    assert chat.decode([start + 1, chat.end_of_text]) == "<|im_end|><|endoftext|>"
    assert chat.fingerprint != plain.fingerprint
    assert tokenizer_from_spec(chat.spec()).fingerprint == chat.fingerprint
    assert plain.chat_ids is None


@pytest.mark.parametrize("space", [" ", "\n"])
def test_white_space_longer_than_its_expressions_can_match_is_encoded(space: str) -> None:
    text = "a" + space * 1_100_000 + "b"
    tokenizer = BpeTokenizer([])
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.encode(text[:900]).tolist() == list(text[:900].encode())


def test_gpt2_with_chat_fits_the_padded_vocabulary() -> None:
    tokenizer = make_tokenizer("gpt2-chat")
    assert tokenizer.chat_ids == (50_257, 50_258)
    assert tokenizer.vocab_size <= 50_304


@pytest.mark.parametrize("name", ["gpt2-", "bytes-chats", "chat", "gpt2-chat-chat"])
def test_a_name_that_is_nearly_one_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="tokenizer must be one of"):
        make_tokenizer(name)
