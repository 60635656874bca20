"""Places that tests keep objects in: on real servers, and on a disk without hard links."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec.config
import pytest

from storage.fsspec_store import FsspecStore
from storage.patience import Patience
from tests.s3_server import ENVIRONMENT

HASTY = Patience(
    connect_seconds=5.0,
    silence_seconds=0.2,
    attempt_seconds=3.0,
    attempts=5,
    first_wait_seconds=0.0,
    longest_wait_seconds=0.0,
)
"""Gives up a silent server at once. Whoever uses it counts on servers of the same process."""


@contextmanager
def reached(protocol: str, url: str) -> Iterator[None]:
    """Leads gs:// or s3:// there, as an operator would: by environment and fsspec's settings."""
    with pytest.MonkeyPatch.context() as patch:
        if protocol == "gs":
            patch.setenv("STORAGE_EMULATOR_HOST", url)
            patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        else:
            patch.setenv("AWS_ENDPOINT_URL", url)
            for name, value in ENVIRONMENT.items():
                patch.setenv(name, value)
        yield


@contextmanager
def opened(url: str, patience: Patience | None = None) -> Iterator[FsspecStore]:
    """A store, closed at the end, that does not sleep between attempts."""
    store = FsspecStore(url, patience=patience, sleep=lambda seconds: None)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def drive(refusal: int = errno.EPERM) -> Iterator[None]:
    """Every disk is as Google Drive is by FUSE: no hard links, and a rename in three steps."""

    def link(source: Path, target: Path) -> None:
        raise OSError(refusal, os.strerror(refusal))

    def replace(source: Path, target: Path) -> None:
        if not Path(target).parent.is_dir():
            raise FileNotFoundError(target)
        Path(target).unlink(missing_ok=True)
        shutil.copyfile(source, target)
        Path(source).unlink()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "link", link)
        patch.setattr(os, "replace", replace)
        yield
