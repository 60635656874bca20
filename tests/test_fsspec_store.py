"""Real gcsfs and s3fs against servers that fail, lie still, hang up, and refuse."""

import os
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec.config
import pytest

from storage.errors import ConfigurationError, StoreRefusedError, StoreUnavailableError
from storage.fsspec_store import FsspecStore
from storage.log import Draft, Log
from storage.patience import Patience
from storage.store import open_store
from tests import gcs_server, s3_server
from tests.gcs_server import GcsServer
from tests.places import HASTY, opened, reached
from tests.s3_server import S3Server
from tests.server_faults import Broken, Fault, Faults, First, Reset, Silence, Status

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, GcsServer | S3Server]]:
    with (
        gcs_server.running(GcsServer("faults")) as gcs,
        s3_server.running(S3Server()) as s3,
        reached("gs", gcs.url),
        reached("s3", s3.url),
    ):
        s3.make_bucket("faults")
        yield {"gs": gcs, "s3": s3}


@pytest.fixture(params=["gs", "s3"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def faults(protocol: str, servers: dict[str, GcsServer | S3Server]) -> Faults:
    found = servers[protocol].faults
    found.seen.clear()
    return found


@pytest.fixture
def store(protocol: str, faults: Faults) -> Iterator[FsspecStore]:
    with opened(f"{protocol}://faults/{uuid.uuid4().hex}") as place:
        place.put("old", b"0123456789")
        faults.seen.clear()
        yield place


@pytest.fixture
def hasty(protocol: str, faults: Faults) -> Iterator[FsspecStore]:
    """Gives up a silent server after a fifth of a second, five times."""
    with opened(f"{protocol}://faults/{uuid.uuid4().hex}", HASTY) as place:
        place.list("")  # to make s3fs's session takes longer than a silence
        faults.seen.clear()
        yield place


DEEDS = {
    "create": lambda store: store.put_if_absent("new", b"x"),
    "write": lambda store: store.put("new", b"x"),
    "read": lambda store: store.get("old"),
    "list": lambda store: store.list(""),
    "look up": lambda store: store.stat("old"),
    "delete": lambda store: store.delete("old"),
}
PASSING: list[Fault] = [
    *(Status(status) for status in (408, 429, 500, 502, 503, 504)),
    Status(409, "ConditionalRequestConflict"),
    Status(503, "SlowDown"),
    Reset(done=False),
]


@pytest.mark.parametrize("operation", DEEDS)
def test_what_passes_is_tried_again_until_it_is_done(
    operation: str, store: FsspecStore, faults: Faults
) -> None:
    for fault in PASSING:
        store.delete("new")
        store.put("old", b"0123456789")
        faults.seen.clear()
        faults.add(operation, fault, fault)
        assert DEEDS[operation](store) is not False
        assert faults.seen == [operation] * 3, fault


@pytest.mark.parametrize("operation", DEEDS)
def test_a_server_that_goes_on_failing_is_given_up(
    operation: str, hasty: FsspecStore, faults: Faults
) -> None:
    faults.add(operation, *[Status(503, "SlowDown")] * 5)
    with pytest.raises(
        StoreUnavailableError, match=rf"cannot {operation} .*tried 5 times"
    ) as error:
        DEEDS[operation](hasty)
    assert not isinstance(error.value, StoreRefusedError)
    assert faults.seen == [operation] * 5


@pytest.mark.parametrize("operation", DEEDS)
def test_a_silent_server_is_given_up(operation: str, hasty: FsspecStore, faults: Faults) -> None:
    until = threading.Event()
    faults.add(operation, *[Silence(until)] * 5)
    try:
        with pytest.raises(StoreUnavailableError, match=r"tried 5 times"):
            DEEDS[operation](hasty)
    finally:
        until.set()
    assert faults.seen == [operation] * 5


def test_a_server_that_stops_reading_is_given_up(protocol: str) -> None:
    """No silence is measured while a body is sent: the limit of the attempt ends it."""
    patience = Patience(attempt_seconds=0.3, bytes_per_second=1e12, attempts=2)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        with (
            reached(protocol, url),
            opened(f"{protocol}://bucket/run", patience) as store,
            pytest.raises(StoreUnavailableError, match=r"cannot create a: no answer in time"),
        ):
            store.put_if_absent("a", bytes(32_000_000))


def test_waits_grow_are_random_and_end(protocol: str, faults: Faults) -> None:
    waits: list[float] = []
    store = FsspecStore(f"{protocol}://faults/waits", sleep=waits.append)
    faults.add("list", *[Status(503)] * 6)
    with pytest.raises(StoreUnavailableError, match="tried 6 times"):
        store.list("")
    store.close()
    assert len(waits) == 5
    assert all(0 <= wait <= 0.5 * 2**n for n, wait in enumerate(waits))
    assert len(set(waits)) == 5


def test_a_broken_download_is_read_again(store: FsspecStore, faults: Faults) -> None:
    data = os.urandom(3_000_000)
    store.put("large", data)
    faults.seen.clear()
    faults.add("read", Broken(1_000_000), Broken(0))
    assert store.get("large") == data
    faults.add("read", Broken(500_000))
    assert store.get("large", 1_000_000, 2_000_000) == data[1_000_000:2_000_000]
    assert faults.seen == ["read"] * 5


def test_a_creation_whose_response_is_lost_says_exists_and_the_log_knows_its_own(
    store: FsspecStore, faults: Faults
) -> None:
    faults.add("create", Reset(done=True))
    assert not store.put_if_absent("key", b"mine"), "the second attempt met the first"
    assert store.get("key") == b"mine"
    faults.add("create", Reset(done=True))
    record = Log(store).append(lambda _: Draft(kind="NOTE", generation=1, body={}))
    assert record is not None and record.index == 1
    assert store.list("log/") == ["log/0000000001.json"]


def test_another_may_be_faster(store: FsspecStore, faults: Faults) -> None:
    other = open_store(store.url)
    assert isinstance(other, FsspecStore)
    faults.add("create", First(lambda: other.put("key", b"other")))
    assert not store.put_if_absent("key", b"mine")
    assert store.get("key") == b"other"
    other.close()


@pytest.mark.parametrize("part", ["begin", "part"])
def test_an_upload_in_parts_begins_anew(part: str, servers: dict[str, GcsServer]) -> None:
    data = os.urandom(17_000_003)
    faults = servers["gs"].faults
    with opened("gs://faults/parts") as store:
        for fault in (Status(503), Status(429), Reset(done=False), Reset(done=True)):
            faults.add(part, fault)
            store.put("large", memoryview(data))
            assert store.get("large") == data
            store.delete("large")
        if part == "part":  # the answer to the last part is lost, and with it the session's end
            faults.add("part", First(lambda: None), Reset(done=True))
            faults.add("take back", Status(404))
            store.put("large", memoryview(data))
            assert store.get("large") == data


def test_a_large_object_is_created_in_one_request(store: FsspecStore, faults: Faults) -> None:
    data = os.urandom(17_000_003)
    assert store.put_if_absent("large", data)
    assert not store.put_if_absent("large", b"other")
    assert faults.seen == ["create"] * 2
    assert store.get("large") == data


GRANTS = {
    "gs": {
        "create": "storage.objects.create",
        "write": "storage.objects.create and storage.objects.delete",
        "read": "storage.objects.get",
        "list": "storage.objects.list",
        "look up": "storage.objects.get",
        "delete": "storage.objects.delete",
    },
    "s3": {
        "create": "s3:PutObject",
        "write": "s3:PutObject",
        "read": "s3:GetObject and s3:ListBucket",
        "list": "s3:ListBucket",
        "look up": "s3:GetObject and s3:ListBucket",
        "delete": "s3:DeleteObject",
    },
}


@pytest.mark.parametrize("operation", DEEDS)
def test_a_refusal_names_the_operation_and_the_permission(
    operation: str, protocol: str, store: FsspecStore, faults: Faults
) -> None:
    for status, code in ((403, "AccessDenied"), (401, "InvalidToken")):
        faults.add(operation, Status(status, code))
        with pytest.raises(StoreRefusedError, match=f"not allowed to {operation}") as refused:
            DEEDS[operation](store)
        assert f"Grant {GRANTS[protocol][operation]} to the credentials" in str(refused.value)
        assert "\n" not in str(refused.value)
    assert faults.seen == [operation] * 2, "a refusal is not asked for again"
    DEEDS[operation](store)


def test_a_bucket_that_is_not_there(protocol: str, faults: Faults) -> None:
    with opened(f"{protocol}://no-such-bucket/run") as store:
        for act in (
            lambda: store.put_if_absent("a", b"x"),
            lambda: store.put("a", b"x"),
            lambda: store.put("a", bytes(17_000_000)),
            lambda: store.list(""),
        ):
            with pytest.raises(ConfigurationError, match="its bucket does not exist; create it"):
                act()


def test_nobody_listens(protocol: str) -> None:
    with (
        reached(protocol, "http://127.0.0.1:9"),
        opened(f"{protocol}://bucket/run", HASTY) as store,
        pytest.raises(StoreUnavailableError, match=r"cannot list .*127\.0\.0\.1:9.*5 times"),
    ):
        store.list("")


def test_s3_without_credentials(servers: object, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        patch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        with (
            opened("s3://faults/run") as store,
            pytest.raises(StoreRefusedError, match="not allowed to list objects: Unable to locate"),
        ):
            store.list("")


def test_s3_without_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'rangeflow\[s3\]'"):
        open_store("s3://bucket/run")


def test_credentials_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "/nonexistent/token.json"})
    with pytest.raises(ConfigurationError, match="credentials for gs:// cannot be read"):
        open_store("gs://bucket/run")


def test_an_object_encrypted_with_a_key_of_kms_has_no_checksum(
    servers: dict[str, S3Server],
) -> None:
    """Its ETag looks like an MD5, and is none."""
    with opened("s3://faults/kms") as store:
        store.put("plain", b"x")
        assert store.stat("plain").checksum.startswith("md5:")
        client = store._opened
        put = client._fs.call_s3  # type: ignore[attr-defined]
        put("put_object", Bucket="faults", Key="kms/a", Body=b"x", ServerSideEncryption="aws:kms")
        assert store.stat("a").checksum == ""


def test_a_forked_child_opens_a_client_of_its_own(
    protocol: str, servers: dict[str, GcsServer | S3Server]
) -> None:
    """In a program of its own: to fork one with this many threads is asking for trouble."""
    name = uuid.uuid4().hex
    program = f"""
import os
from storage.store import open_store
store = open_store("{protocol}://faults/{name}")
store.put("parent", b"1")
child = os.fork()
if child == 0:
    store.put("child", store.get("parent"))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert store.list("") == ["child", "parent"]
store.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "FSSPEC_GS_TOKEN": "anon"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_a_closed_store_opens_again(store: FsspecStore) -> None:
    store.close()
    assert store.get("old") == b"0123456789"
    store.close()
    store.close()


@pytest.mark.parametrize("url", ["zip://x.zip", "reference://x", "dir://x"])
def test_places_that_cannot_hold_a_run_are_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"no store for|cannot hold objects"):
        open_store(url).put_if_absent("a", b"x")
