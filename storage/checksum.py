"""Compares bytes with the checksum that an object store gives of them."""

import base64
import binascii
import hashlib
import re

import google_crc32c

from storage.errors import ConfigurationError

_PIECE_BYTES = 2**20


def matches(data: bytes | bytearray | memoryview, checksum: str) -> bool:
    """Whether `data` has this checksum, as `ObjectInfo.checksum` names it.

    Raises ConfigurationError for "", or a kind that is not known: that is no comparison.
    """
    kind, _, expected = checksum.partition(":")
    if kind == "crc32c":
        return f"{_crc32c(data):08x}" == expected
    if kind == "md5":
        return hashlib.md5(data, usedforsecurity=False).hexdigest() == expected
    raise ConfigurationError(f"expected a checksum crc32c:... or md5:..., got {checksum!r}")


def of_gcs(crc32c: object) -> str:
    """From the `crc32c` of an object resource: base64, in big-endian byte order.

    https://cloud.google.com/storage/docs/json_api/v1/objects#resource
    """
    try:
        value = base64.b64decode(str(crc32c), validate=True)
    except binascii.Error:
        return ""
    return f"crc32c:{value.hex()}" if len(value) == 4 else ""


def of_s3(etag: object) -> str:
    """From an ETag: the MD5 of an object uploaded in one part; "" for any other.

    An object under SSE-KMS or SSE-C has an ETag of the same form that is not its MD5
    (https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html), so whoever reads the
    encryption passes "" for those.
    """
    text = str(etag).strip('"')
    return f"md5:{text}" if re.fullmatch(r"[0-9a-f]{32}", text) else ""


def _crc32c(data: bytes | bytearray | memoryview) -> int:
    """In pieces, because google_crc32c takes nothing but bytes, and a copy of all is too much."""
    value, view = 0, memoryview(data).cast("B")
    for start in range(0, len(view), _PIECE_BYTES):
        value = google_crc32c.extend(value, bytes(view[start : start + _PIECE_BYTES]))
    return value
