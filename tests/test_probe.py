import errno
import logging
import os
import socket
import uuid
from pathlib import Path

import pytest
from gcp_storage_emulator.server import create_server

from storage.contract import ObjectInfo
from storage.errors import ConfigurationError, StoreUnavailableError
from storage.fsspec_store import FsspecStore
from storage.probe import examine, probe
from storage.store import LocalStore
from tests.faulty_store import Fault, FaultyStore, FlipByte, LoseResponse, Refuse
from tests.places import drive, opened, reached

NAMES = [
    "conditional create",
    "whole creation",
    "listing",
    "latency",
    "upload bandwidth",
    "download bandwidth",
    "read back",
    "checksum",
    "delete",
]


def test_stores_that_fence_pass_and_are_left_as_they_were(tmp_path: Path) -> None:
    for store in (LocalStore(tmp_path / "run"), FsspecStore(f"memory://{uuid.uuid4().hex}")):
        probe(store)
        assert store.list("") == []


class Overwrites(LocalStore):
    """A place that ignores the condition, as PyPI's gcp-storage-emulator does."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True


class Lies(LocalStore):
    """A place that says "exists", and overwrites all the same."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        created = super().put_if_absent(key, data)
        self.put(key, data)
        return created


class Forgets(LocalStore):
    """A place whose listing is stale."""

    def list(self, prefix: str, start_after: str = "") -> list[str]:
        return []


class Keeps(LocalStore):
    """A place that does not delete."""

    def delete(self, key: str) -> None:
        return


class Miscounts(LocalStore):
    """A place that has changed what it got."""

    def stat(self, key: str) -> ObjectInfo:
        return ObjectInfo(size_bytes=1, checksum="crc32c:00000000")


@pytest.mark.parametrize("kind", [Overwrites, Lies, Forgets])
def test_a_store_that_cannot_fence_is_refused(kind: type[LocalStore], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot fence"):
        probe(kind(tmp_path))


def test_a_creation_whose_response_is_lost_is_ours(tmp_path: Path) -> None:
    """The second attempt says "exists"; the content tells that it exists by us."""

    class SaysExists(LocalStore):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            super().put_if_absent(key, data)
            return False

    probe(SaysExists(tmp_path))


def test_the_emulator_from_pypi_is_refused() -> None:
    """gcp-storage-emulator takes no notice of `ifGenerationMatch`, so it cannot fence."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        with (
            reached("gs", f"http://127.0.0.1:{port}"),
            opened("gs://bucket/run") as store,
        ):
            with pytest.raises(ConfigurationError, match="creating a key twice must fail"):
                probe(store)
            findings = {finding.name: finding for finding in examine(store, megabytes=1)}
            assert not findings["conditional create"].ok
            assert "both believe that they own the run" in findings["conditional create"].detail
            assert findings["read back"].ok
            assert store.list("") == []
    finally:
        server.stop()


def test_a_place_that_permits_no_writing_is_a_matter_of_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as root, whom no mode of a folder keeps out."""

    def refuse(path: Path, *arguments: object, **more: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(ConfigurationError, match=r"Read-only .* Give this user the permission"):
        probe(LocalStore(tmp_path / "run"))


def test_drive_passes_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with drive(), caplog.at_level(logging.WARNING):
        store = LocalStore(tmp_path)
        probe(store)
        store.put_if_absent("a", b"x")
        findings = {finding.name: finding for finding in examine(store, megabytes=1)}
    assert [name for name, finding in findings.items() if not finding.ok] == ["whole creation"]
    assert "train from one machine at a time" in findings["whole creation"].detail
    assert len(caplog.records) == 1
    assert "a crash can leave a torn object" in caplog.text
    assert "two machines can both believe that they own the run" in caplog.text


def test_an_examination_finds_everything_right_and_measures(tmp_path: Path) -> None:
    ticks = iter(range(1000))
    findings = examine(LocalStore(tmp_path), megabytes=2, clock=lambda: next(ticks) / 4)
    assert [finding.name for finding in findings] == NAMES
    assert all(finding.ok for finding in findings)
    told = {finding.name: finding.detail for finding in findings}
    assert told["latency"] == "a small put takes 250.0 ms (median of 5)"
    assert told["upload bandwidth"] == "8.0 MB/s for an object of 2 MB"
    assert told["download bandwidth"] == "8.0 MB/s for an object of 2 MB"
    assert told["checksum"] == "the store gives none: objects are verified by reading them back"
    assert LocalStore(tmp_path).list("") == []


@pytest.mark.parametrize(
    ("kind", "wrong", "detail"),
    [
        (Overwrites, ["conditional create"], "keep runs elsewhere"),
        (Lies, ["conditional create"], "keep runs elsewhere"),
        (Forgets, ["listing"], "could miss the newest checkpoint"),
        (Keeps, ["delete"], "retention policy"),
        (Miscounts, ["checksum"], "a proxy that changes what passes"),
    ],
)
def test_an_examination_names_what_is_wrong_and_what_to_do(
    kind: type[LocalStore], wrong: list[str], detail: str, tmp_path: Path
) -> None:
    findings = examine(kind(tmp_path), megabytes=1)
    assert [finding.name for finding in findings] == NAMES
    assert [finding.name for finding in findings if not finding.ok] == wrong
    assert all(detail in finding.detail for finding in findings if not finding.ok)


def test_an_examination_finds_changed_bytes(tmp_path: Path) -> None:
    store = FaultyStore(
        LocalStore(tmp_path),
        lambda o: FlipByte() if o.name == "get" and "large" in o.key else None,
    )
    findings = examine(store, megabytes=1)
    assert [finding.name for finding in findings if not finding.ok] == ["read back"]


@pytest.mark.parametrize("fault", [Refuse("out of reach"), LoseResponse()])
@pytest.mark.parametrize("number", range(1, 14))
def test_an_examination_ends_with_what_fails_and_leaves_nothing(
    number: int, fault: Fault, tmp_path: Path
) -> None:
    inner = LocalStore(tmp_path)
    store = FaultyStore(inner, lambda o: fault if o.number == number else None)
    findings = examine(store, megabytes=1)
    assert [finding.name for finding in findings if not finding.ok] == ["access"]
    assert inner.list("") == []


def test_a_store_out_of_reach_fails_the_probe(tmp_path: Path) -> None:
    store = FaultyStore(LocalStore(tmp_path), lambda operation: Refuse("out of reach"))
    with pytest.raises(StoreUnavailableError, match="out of reach"):
        probe(store)
