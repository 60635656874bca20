"""The same claims over every store: disks, memory, real clients against servers, a real bucket.

`RANGEFLOW_TEST_BUCKET=gs://bucket/folder` (or s3://...) adds that bucket, with the credentials in
use; what the tests put there, below names of their own, they take away again.
"""

import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.checksum import matches
from storage.errors import ConfigurationError
from storage.fsspec_store import FsspecStore
from storage.probe import examine, probe
from storage.store import Store, check_key, open_store
from tests import gcs_server, s3_server
from tests.places import drive, reached

BUCKET = os.environ.get("RANGEFLOW_TEST_BUCKET", "")
WITH_CHECKSUMS = ("gcs", "s3")


@pytest.fixture(scope="module")
def gcs() -> Iterator[gcs_server.GcsServer]:
    with gcs_server.running(gcs_server.GcsServer("bucket")) as server, reached("gs", server.url):
        yield server


@pytest.fixture(scope="module")
def s3() -> Iterator[s3_server.S3Server]:
    with s3_server.running(s3_server.S3Server()) as server, reached("s3", server.url):
        server.make_bucket("conformance")
        yield server


@pytest.fixture(params=["local", "drive", "memory", "gcs", "s3", "real"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    name = uuid.uuid4().hex
    if kind == "local":
        yield open_store(str(tmp_path / "place"))
        return
    if kind == "drive":
        with drive():
            yield open_store(str(tmp_path / "place"))
        return
    if kind == "real" and not BUCKET:
        pytest.skip("RANGEFLOW_TEST_BUCKET names no bucket to test against")
    if kind in WITH_CHECKSUMS:
        request.getfixturevalue(kind)
    url = {
        "memory": f"memory://{name}/place",
        "gcs": f"gs://bucket/{name}",
        "s3": f"s3://conformance/{name}",
        "real": f"{BUCKET.rstrip('/')}/{name}",
    }[kind]
    place = open_store(url)
    assert isinstance(place, FsspecStore)
    try:
        yield place
    finally:
        for key in place.list(""):
            place.delete(key)
        place.close()


def test_the_first_creation_wins(store: Store) -> None:
    assert store.put_if_absent("log/1.json", b"first")
    assert not store.put_if_absent("log/1.json", b"second")
    assert store.get("log/1.json") == b"first"


def test_of_eight_threads_that_create_one_key_exactly_one_wins(store: Store) -> None:
    start = threading.Barrier(8)
    won: list[int] = []

    def race(number: int) -> None:
        start.wait()
        if store.put_if_absent("log/1.json", b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get("log/1.json") == b"%d" % won[0]


def test_put_replaces_the_whole_object(store: Store) -> None:
    store.put("a/b", b"a long first content")
    store.put("a/b", memoryview(b"short"))
    assert store.get("a/b") == b"short"
    assert store.stat("a/b").size_bytes == 5


def test_four_threads_put_at_once(store: Store) -> None:
    data = {f"r{n}": os.urandom(300_000 + n) for n in range(4)}
    threads = [threading.Thread(target=store.put, args=pair) for pair in data.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key: store.get(key) for key in store.list("")} == data


@pytest.mark.parametrize("size", [0, 1, 9_000_001, 17_000_003])
def test_any_size_comes_back_and_its_checksum_matches(kind: str, size: int, store: Store) -> None:
    data = os.urandom(size)
    store.put("large", memoryview(bytearray(data)).cast("B"))
    info = store.stat("large")
    assert info.size_bytes == size
    assert store.get("large") == data
    assert store.get("large", size // 2) == data[size // 2 :]
    if kind in WITH_CHECKSUMS:
        assert matches(data, info.checksum)
        assert not matches(data + b"x", info.checksum)
    elif kind != "real":
        assert info.checksum == ""


@pytest.mark.parametrize(
    "data", [b"\r", b"\n", b"a\r\n", b"a\n\n", b"\r\n\r\na", b"a\n--==0==\nb", b"a\r\n--==0==--"]
)
def test_line_ends_and_boundaries_are_bytes_as_any(data: bytes, store: Store) -> None:
    store.put("put", data)
    assert store.put_if_absent("created", data)
    assert store.get("put") == store.get("created") == data


def test_ranges_are_half_open_and_may_reach_past_the_end(store: Store) -> None:
    store.put("a", b"0123456789")
    assert store.get("a", 2, 5) == b"234"
    assert store.get("a", 8) == b"89"
    assert store.get("a", 0, 99) == b"0123456789"
    assert store.get("a", 5, 5) == store.get("a", 7, 3) == b""
    assert store.get("a", 10) == store.get("a", 99, 100) == b""


def test_objects_are_stamped_by_the_store_s_own_clock(kind: str, store: Store) -> None:
    before = time.time()
    store.put("a", b"x")
    stamp = store.stat("a").modified_at
    if kind == "memory":
        assert stamp is None
        return
    assert stamp is not None
    assert kind == "real" or before - 2 < stamp < time.time() + 2, "these run on this clock"
    store.put("a", b"y")
    later = store.stat("a").modified_at
    assert later is not None and later >= stamp


def test_what_is_not_there_is_said_so(store: Store) -> None:
    for read in (lambda: store.get("no"), lambda: store.get("no", 1, 1), lambda: store.stat("no")):
        with pytest.raises(FileNotFoundError):
            read()
    store.delete("no")
    assert store.list("") == []


def test_listings_are_sorted_complete_and_begin_after(store: Store) -> None:
    keys = ["a", "b/10", "b/2", "b/c/1", "bb"]
    for key in reversed(keys):
        store.put(key, b"x")
    assert store.list("") == keys
    assert store.list("b/") == ["b/10", "b/2", "b/c/1"]
    assert store.list("b") == ["b/10", "b/2", "b/c/1", "bb"]
    assert store.list("b/1") == ["b/10"]
    for after in (*keys, "", "aa", "b", "b/", "b/1", "b/3", "b/c", "z"):
        assert store.list("", after) == [key for key in keys if key > after]
        assert store.list("b/", after) == [k for k in keys if k.startswith("b/") and k > after]
    assert store.list("c") == store.list("c/") == []


def test_a_deleted_object_leaves_no_trace_and_may_be_created_again(store: Store) -> None:
    assert store.put_if_absent("x/y/z", b"1")
    store.delete("x/y/z")
    assert store.list("") == []
    assert store.put_if_absent("x/y/z", b"2")
    assert store.get("x/y/z") == b"2"


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../up", "a/../b", "a//b", ".hidden", "a/", "a b", "ä", "a?b", "a#1"]
)
def test_a_key_cannot_leave_the_store(key: str, store: Store) -> None:
    with pytest.raises(ConfigurationError, match="is not a key"):
        check_key(key)
    for act in (
        lambda: store.put(key, b"x"),
        lambda: store.put_if_absent(key, b"x"),
        lambda: store.get(key),
        lambda: store.stat(key),
        lambda: store.delete(key),
        lambda: store.local_path(key),
    ):
        with pytest.raises(ConfigurationError, match="is not a key"):
            act()


def test_the_probe_passes_and_leaves_nothing(kind: str, store: Store) -> None:
    probe(store)
    findings = {finding.name: finding for finding in examine(store, megabytes=1)}
    wrong = [finding.name for finding in findings.values() if not finding.ok]
    assert wrong == (["whole creation"] if kind == "drive" else [])
    assert store.list("") == []


def test_a_listing_of_many_pages_is_whole(gcs: gcs_server.GcsServer) -> None:
    gcs.page = 3
    store = open_store("gs://bucket/many")
    assert isinstance(store, FsspecStore)
    keys = [f"log/{number:04d}" for number in range(10)]
    try:
        for key in keys:
            store.put(key, b"x")
        assert store.list("log/") == keys
        assert store.list("log/", keys[6]) == keys[7:]
    finally:
        gcs.page = 1000
        store.close()
