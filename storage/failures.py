"""Judges what the clients of object stores raise: what it means, and what to tell of it.

Nothing here imports a client: its errors are known by their names, as they are raised by gcsfs
2024.10 to 2026.10, s3fs 2024.10 to 2026.9, and aiohttp, requests, botocore, google-auth below them.
"""

import errno
import os
import re
from collections.abc import Iterator
from typing import Any, Literal

Verdict = Literal["exists", "absent", "no bucket", "past the end", "refused", "passing", "lasting"]

_PASSING_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
"""As Google and AWS say to repeat; 409 is S3's ConditionalRequestConflict.
https://cloud.google.com/storage/docs/retry-strategy
https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html"""

_PASSING_NAMES = {
    "aiohttp.client_exceptions.ClientError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.FlexibleChecksumError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.IncompleteReadError",
    "botocore.exceptions.ResponseStreamingError",
    "botocore.parsers.ResponseParserError",
    "gcsfs.retry.ChecksumError",
    "google.auth.exceptions.TransportError",
    "requests.exceptions.RequestException",
}

_REFUSED_NAMES = {
    "botocore.exceptions.NoCredentialsError",
    "botocore.exceptions.PartialCredentialsError",
    "botocore.exceptions.TokenRetrievalError",
    "botocore.exceptions.UnauthorizedSSOTokenError",
    "google.auth.exceptions.DefaultCredentialsError",
    "google.auth.exceptions.RefreshError",
}

_SECRETS = (
    (r"(https?://)[^/\s@]*@", r"\1"),
    (r"(https?://[^\s?\"'>)]*)\?[^\s\"'>)]*", r"\1?..."),
    (r"(?i)\b(bearer|basic)\s+[\w.~+/=-]+", r"\1 ..."),
    (r"\bya29\.[\w.-]+", "..."),
    (r"\b(AKIA|ASIA)[A-Z0-9]{12,}", "..."),
    (
        r"(?i)([\w-]*(?:signature|token|secret|credential|password|api_?key|accesskeyid|sig)"
        r"[\w-]*['\"]?\s*[=:]\s*)['\"]?[^\s,;&'\"<>)}]+",
        r"\1...",
    ),
)
"""What must reach no log: signed URLs, tokens and keys, wherever a client quotes them."""

_WIDE = 300


def judge(error: BaseException) -> Verdict:
    """What an error of a client means for the operation that raised it."""
    if isinstance(error, FileExistsError):
        return "exists"
    codes, status = _codes(error), _status(error)
    if status == 412:  # of S3's imitators, which name no condition: s3fs knows only AWS's answer
        return "exists"
    if "NoSuchBucket" in codes:
        return "no bucket"
    if isinstance(error, FileNotFoundError):
        return "absent"
    if status == 416 or "InvalidRange" in codes:
        return "past the end"
    if status == 401 and "Invalid Credentials" in str(error):
        return "passing"  # a token that has just expired; gcsfs renews it before the next request
    forbidden = isinstance(error, OSError) and str(error).startswith("Forbidden")  # gcsfs's 403
    if isinstance(error, PermissionError) or forbidden or status in (401, 403):
        return "refused"
    names = set(_names(error))
    if names & _REFUSED_NAMES:
        return "refused"
    if status in _PASSING_STATUS or names & _PASSING_NAMES:
        return "passing"
    if isinstance(error, TimeoutError | ConnectionError):
        return "passing"
    return "lasting"


def told(error: BaseException) -> str:
    """The error in one line for people, without what must stay secret."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left; free some or move the run, then start again"
    text = " ".join(str(error).split())
    if isinstance(error, TimeoutError) and not text:
        text = "no answer in time"
    for pattern, harmless in _SECRETS:
        text = re.sub(pattern, harmless, text)
    if len(text) > _WIDE:
        text = f"{text[:_WIDE]}..."
    if not text and isinstance(error, OSError) and error.errno:
        text = os.strerror(error.errno)
    return text or type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was made from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _names(error: BaseException) -> Iterator[str]:
    for cause in _chain(error):
        yield from (f"{kind.__module__}.{kind.__qualname__}" for kind in type(cause).__mro__)


def _status(error: BaseException) -> int | None:
    """The HTTP status of the server's answer, where there was one."""
    for cause in _chain(error):
        response: Any = getattr(cause, "response", None)  # botocore's ClientError
        candidates = [getattr(cause, "code", None), getattr(cause, "status", None)]
        if isinstance(response, dict):
            candidates.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        for status in candidates:
            if str(status).isdigit():
                return int(str(status))
    return None


def _codes(error: BaseException) -> set[str]:
    """S3's names of the error."""
    responses = [getattr(cause, "response", None) for cause in _chain(error)]
    return {r.get("Error", {}).get("Code", "") for r in responses if isinstance(r, dict)}
