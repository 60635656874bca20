import base64
import hashlib

import google_crc32c
import pytest

from storage import checksum
from storage.errors import ConfigurationError

NUMBERS = b"123456789"


def test_crc32c_is_that_of_the_standard() -> None:
    """The check value of CRC-32C: https://reveng.sourceforge.io/crc-catalogue/all.htm"""
    assert checksum.matches(NUMBERS, "crc32c:e3069283")
    assert not checksum.matches(NUMBERS, "crc32c:e3069284")


def test_md5_is_that_of_the_rfc() -> None:
    """RFC 1321, A.5."""
    assert checksum.matches(b"abc", "md5:900150983cd24fb0d6963f7d28e17f72")
    assert not checksum.matches(b"abd", "md5:900150983cd24fb0d6963f7d28e17f72")


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20 + 5])
def test_any_buffer_of_any_size_is_compared_in_pieces(size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    data = data[:size]
    expected = [f"crc32c:{google_crc32c.value(data):08x}", f"md5:{hashlib.md5(data).hexdigest()}"]
    for given in (data, bytearray(data), memoryview(data)):
        assert all(checksum.matches(given, one) for one in expected)


def test_what_google_and_amazon_say_is_read() -> None:
    big_endian = base64.b64encode(bytes.fromhex("e3069283")).decode()
    assert checksum.of_gcs(big_endian) == "crc32c:e3069283"
    assert checksum.of_gcs(None) == checksum.of_gcs("!") == checksum.of_gcs("AAAA") == ""
    assert checksum.of_s3('"900150983cd24fb0d6963f7d28e17f72"').startswith("md5:9001")
    assert checksum.of_s3('"900150983cd24fb0d6963f7d28e17f72-4"') == "", "of several parts"
    assert checksum.of_s3("") == ""


@pytest.mark.parametrize("wrong", ["", "sha1:00", "e3069283"])
def test_no_checksum_is_no_comparison(wrong: str) -> None:
    with pytest.raises(ConfigurationError, match=r"expected a checksum crc32c:\.\.\. or md5"):
        checksum.matches(b"x", wrong)
