"""The held-out split: decided by content, losing nothing, the same wherever a text occurs."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_service.validation_split import (
    PIECE_BYTES,
    ValidationStamp,
    normalise,
    pieces,
    readings,
    side_of,
    split_document,
)
from storage.errors import ConfigurationError, DataError

HALF = ValidationStamp(permille=500)
WORDS = (
    *("the", "of", "and", "a", "to", "in", "is", "was", "he", "for", "it", "with", "as", "his"),
    *("on", "be", "at", "by", "I", "this", "had", "not", "are", "but"),
)


def prose(rng: random.Random, paragraphs: int) -> str:
    return "\n\n".join(
        " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 80))) for _ in range(paragraphs)
    )


@given(st.text(alphabet="ab \n\r\tÉ", max_size=200), st.integers(1, 400))
def test_the_parts_joined_are_the_document(text: str, times: int) -> None:
    whole = text * times
    assert "".join(piece for piece, _ in pieces(whole)) == whole
    assert "".join(piece for _, piece in split_document(whole, HALF)) == whole


@given(st.integers(0, 10_000))
def test_neighbouring_parts_are_on_different_sides(seed: int) -> None:
    parts = split_document(prose(random.Random(seed), 60), HALF)
    sides = [side for side, _ in parts]
    assert all(a != b for a, b in itertools.pairwise(sides))


def test_case_composition_and_white_space_do_not_matter() -> None:
    text = prose(random.Random(1), 80) + "\n\nÉtude"
    variant = text.upper().replace(" ", "  ").replace("É", "E\u0301").replace("\n", "\r\n")
    assert [n for _, n in pieces(variant)] == [n for _, n in pieces(text)]
    assert normalise(" Straße\t\n É ") == normalise("STRASSE É")


def test_a_short_document_is_one_piece() -> None:
    assert len(pieces("a\n\n" * 600)) == 1
    assert pieces("") == []


def test_a_long_document_is_cut_at_blank_lines_only() -> None:
    text = prose(random.Random(2), 200)
    found = pieces(text)
    assert len(found) > 10
    assert all(piece.endswith("\n\n") for piece, _ in found[:-1])
    assert max(len(piece) for piece, _ in found) < 2 * PIECE_BYTES


def test_a_long_document_without_blank_lines_is_cut_at_lines() -> None:
    text = prose(random.Random(3), 200).replace("\n\n", "\n")
    found = pieces(text)
    assert len(found) > 10
    assert all(piece.endswith("\n") for piece, _ in found[:-1])


def test_another_head_changes_only_the_first_pieces() -> None:
    text = prose(random.Random(4), 300)
    plain = [normalised for _, normalised in pieces(text)]
    headed = [normalised for _, normalised in pieces("A licence, new.\n\nOf two parts.\n\n" + text)]
    assert len(set(plain) - set(headed)) <= 2


def test_about_the_asked_share_is_held_out() -> None:
    rng = random.Random(5)
    stamp = ValidationStamp(permille=100)
    sides = [split_document(prose(rng, 3), stamp)[0][0] for _ in range(3000)]
    assert abs(sides.count("validation") / 3000 - 0.1) < 0.022  # four sigma


def test_a_larger_share_holds_out_all_that_a_smaller_one_does() -> None:
    rng = random.Random(6)
    for _ in range(500):
        text = prose(rng, 2)
        small, large = (split_document(text, ValidationStamp(permille=p)) for p in (50, 200))
        assert small[0][0] == "train" or large[0][0] == "validation"


@pytest.mark.parametrize("permille", [0, 501, -3])
def test_a_share_that_makes_no_sense_is_refused(permille: int) -> None:
    with pytest.raises(ConfigurationError, match=f"must be from 1 to 500, got {permille}"):
        ValidationStamp(permille=permille)


def test_the_split_is_frozen() -> None:
    sides = [split_document(f"document {n}", HALF)[0][0][0] for n in range(24)]
    assert "".join(sides) == "vtvvtvtvvvttvttttvtvtvvt"
    text = prose(random.Random(7), 100)
    assert [len(piece) for piece, _ in pieces(text)][:6] == [534, 329, 703, 90, 3220, 544]


def test_every_part_that_is_stored_is_right_by_one_of_its_readings() -> None:
    """What `verify` asks of each stored document."""
    for seed in range(60):
        rng = random.Random(seed)
        text = prose(rng, rng.choice([1, 4, 60]))
        if seed % 3:
            text += rng.choice(["\n", "\n\n", "\n \n\n\n"])
            text += prose(rng, 150).replace("\n\n", "\n") + rng.choice(["\n\n\n", "\n", ""])
            text += prose(rng, rng.choice([1, 90]))
        for side, part in split_document(text, HALF):
            ways = list(readings(part))
            assert any(all(side_of(piece, HALF) == side for piece in way) for way in ways)


def test_a_part_on_the_other_side_is_seen() -> None:
    rng = random.Random(1)
    stamp = ValidationStamp(permille=100)
    unseen = 0
    texts = [prose(rng, 1) for _ in range(300)]
    for text in texts:
        ((side, part),) = split_document(text, stamp)
        other = "train" if side == "validation" else "validation"
        ways = readings(part)
        unseen += any(all(side_of(piece, stamp) == other for piece in way) for way in ways)
    assert unseen == 0


def test_a_stamp_by_position_says_so_and_is_another() -> None:
    stamp = ValidationStamp.by_position(100)
    assert stamp.is_by_position
    assert stamp.to_json()["rule"] == "position-1"
    assert ValidationStamp.from_json(stamp.to_json(), where="x") == stamp
    assert stamp != ValidationStamp(permille=100)
    with pytest.raises(DataError, match="the validation split was made by"):
        ValidationStamp.from_json({**stamp.to_json(), "hash": "sha256"}, where="x")
