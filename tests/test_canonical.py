import pytest

from storage.canonical import canonical_json, sha256_hex


def test_equal_values_have_equal_bytes() -> None:
    assert canonical_json({"b": [1.5, "ä"], "a": None}) == '{"a":null,"b":[1.5,"ä"]}'.encode()
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1})


def test_what_json_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json(float("nan"))


def test_sha256_is_the_standard_one() -> None:
    assert sha256_hex(b"abc").startswith("ba7816bf8f01cfea414140de5dae2223")
