"""A tokenizer of one's own: the same every time, and kept whole in the source."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from data_service.bpe_training import trained_bpe
from data_service.chat import Turn, rendered
from data_service.prepare import main
from data_service.source import open_source
from data_service.tokenizer import BpeTokenizer, tokenizer_from_spec
from storage.canonical import canonical_json
from storage.errors import ConfigurationError, DataError

ROOT = Path(__file__).resolve().parents[1]
tokenizers = pytest.importorskip("tokenizers")


def texts() -> list[str]:
    rng = random.Random(5)
    syllables = ["ba", "né", "ti", "世", "ro", "lu", "sh", " ", ", ", "\n", "'s", "12", "  "]
    return ["".join(rng.choice(syllables) for _ in range(400)) for _ in range(50)]


def test_the_same_text_gives_the_same_tokenizer_in_another_process() -> None:
    program = "from tests.test_bpe_training import *; print(trained_bpe(texts(), 400).fingerprint)"
    one = trained_bpe(texts(), 400).fingerprint
    for _ in range(2):
        other = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert other.stdout.strip() == one


def test_it_has_the_size_asked_for_and_round_trips() -> None:
    tokenizer = trained_bpe(texts(), 400)
    assert tokenizer.vocab_size == 400
    assert (tokenizer.end_of_text, tokenizer.chat_ids) == (397, (398, 399))
    for text in (*texts(), "never seen: 🙂 <|endoftext|> <|im_start|>"):
        ids = tokenizer.encode(text)
        assert ids.max() < tokenizer.end_of_text
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode(texts()[0])) < 0.6 * len(texts()[0].encode())


def test_it_encodes_as_the_library_that_trained_it(tmp_path: Path) -> None:
    """Token by token: our ids are the library's, in the order of merging."""
    tokenizer = trained_bpe(texts(), 400)
    level = tokenizers.pre_tokenizers.ByteLevel
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = level(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=397, initial_alphabet=level.alphabet(), show_progress=False
    )
    theirs.train_from_iterator(texts(), trainer)
    for text in texts():
        pieces = [tokenizer.decode([i]) for i in tokenizer.encode(text).tolist()]
        assert pieces == [theirs.decode([i]) for i in theirs.encode(text).ids]


def test_it_comes_back_from_its_spec_without_the_library() -> None:
    tokenizer = trained_bpe(texts(), 300)
    again = tokenizer_from_spec(tokenizer.spec())
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(texts()[0]).tolist() == tokenizer.encode(texts()[0]).tolist()
    assert len(canonical_json(tokenizer.spec())) < 2000


def test_conversations_have_their_marks() -> None:
    tokenizer = trained_bpe(texts(), 300)
    ids, learn = rendered((Turn("user", "<|im_end|>"), Turn("assistant", "né")), tokenizer)
    assert tokenizer.chat_ids == (298, 299)
    assert (ids == 299).sum() == 2
    assert tokenizer.decode(ids[learn]) == "né<|im_end|>"


@pytest.mark.parametrize("size", [258, 5_000_000])
def test_a_size_that_makes_no_sense_is_refused(size: int) -> None:
    with pytest.raises(ConfigurationError, match=f"bpe:SIZE must be from 259 .* got {size}"):
        trained_bpe(["a"], size)


@pytest.mark.parametrize("merged", [None, "YWI= YWI=", "YQ==", "not base64!", "é", 5])
def test_a_damaged_spec_is_refused(merged: object) -> None:
    with pytest.raises(DataError, match="a bpe tokenizer's"):
        tokenizer_from_spec({"kind": "bpe", "merged": merged})


def test_prepare_trains_one_and_another_source_takes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(texts()))
    (tmp_path / "b.txt").write_text("\n\n".join(texts()[:20]) + " other words")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert main([str(tmp_path / "a.txt"), "--tokenizer", "bpe:500", "--out", a]) == 0
    assert main([str(tmp_path / "b.txt"), "--tokenizer_of", a, "--out", b]) == 0
    one, other = open_source("a", a).tokenizer, open_source("b", b).tokenizer
    assert isinstance(one, BpeTokenizer)
    assert one.vocab_size == 500
    assert one.fingerprint == other.fingerprint
    assert main([str(tmp_path / "a.txt"), "--tokenizer", "bpe:many", "--out", a]) == 78
    assert (
        "needs the size of its vocabulary, such as bpe:5000; got 'bpe:many'"
        in capsys.readouterr().err
    )
