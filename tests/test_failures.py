"""What reaches a message of an error: one line, and no secret."""

import errno

import pytest

from storage.failures import judge, told

SECRETS = [
    "GET https://storage.googleapis.com/b/o?X-Goog-Signature=HIDDEN&x=1 failed",
    "Cannot connect to https://user:HIDDEN@proxy.example/path",
    "header Authorization: Bearer HIDDEN.x-y_z",
    "{'access_token': 'HIDDEN', 'scope': 'x'}",
    "aws_secret_access_key=HIDDEN",
    'X-Amz-Security-Token: "HIDDEN"',
    "refresh failed: ya29.HIDDEN-x",
    "InvalidAccessKeyId: AKIAHIDDENHIDDENHID does not exist",
    "https://bucket.s3.amazonaws.com/k?AWSAccessKeyId=HIDDEN&Signature=HIDDEN",
    "password = HIDDEN",
]


@pytest.mark.parametrize("text", SECRETS)
def test_no_secret_is_told(text: str) -> None:
    assert "HIDDEN" not in told(OSError(text))
    assert "..." in told(OSError(text)) or "@" not in told(OSError(text))


def test_the_rest_is_told_in_one_short_line() -> None:
    assert told(OSError("No such\n  host")) == "No such host"
    assert told(TimeoutError()) == "no answer in time"
    assert told(OSError(errno.ENOSPC, "x")).startswith("no space left; free some")
    assert told(ValueError()) == "ValueError"
    assert len(told(OSError("x" * 5000))) < 400
    assert told(OSError("https://storage.googleapis.com/b/o")).endswith("/b/o")


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (FileExistsError(), "exists"),
        (FileNotFoundError(), "absent"),
        (PermissionError(), "refused"),
        (OSError("Forbidden: b/o"), "refused"),
        (TimeoutError(), "passing"),
        (ConnectionResetError(), "passing"),
        (OSError(errno.EIO, "x"), "lasting"),
        (KeyboardInterrupt(), "lasting"),
        (ValueError("Bad Request"), "lasting"),
    ],
)
def test_what_an_error_means(error: BaseException, verdict: str) -> None:
    assert judge(error) == verdict
