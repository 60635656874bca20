"""Whatever a server does wrong at any request of a save, a restart has the right digest.

Through the real clients of object stores, against servers on loopback.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import pytest

from checkpointing.group import Solo
from checkpointing.naming import RUN_KEY
from checkpointing.restore import restore
from checkpointing.save import save
from storage.canonical import canonical_json
from storage.fsspec_store import FsspecStore
from storage.store import LocalStore
from tests import gcs_server, s3_server
from tests.gcs_server import GcsServer
from tests.made_runs import contents
from tests.places import HASTY, opened, reached
from tests.s3_server import S3Server
from tests.server_faults import Fault, Faults, Reset, Silence, Status
from tests.test_crash_points import MINE, RUN, claimed, digests, reopened, state

__all__ = ["digests"]


class Nth(Faults):
    """Only the nth request goes wrong. Requests are counted from 1, from `begin` on."""

    def __init__(self, number: int, fault: Callable[[str], Fault]) -> None:
        super().__init__()
        self._number = number
        self._fault = fault
        self._counting = threading.Event()
        self._counter = count(1)
        self.hit = ""

    def begin(self) -> None:
        self._counting.set()

    def end(self) -> None:
        self._counting.clear()

    def next(self, operation: str) -> Fault | None:
        if not self._counting.is_set():
            return None
        with self._lock:
            if next(self._counter) != self._number:
                return None
            self.hit = operation
        return self._fault(operation)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The objects of a run with a checkpoint."""
    store = LocalStore(tmp_path_factory.mktemp("start"))
    store.put(RUN_KEY, canonical_json(RUN))
    save(store, claimed(store), Solo(), state(1), step=1)
    return contents(store)


@contextmanager
def seeded(url: str, start: dict[str, bytes]) -> Iterator[FsspecStore]:
    with opened(url, HASTY) as store:
        for key, data in start.items():
            store.put(key, data)
        yield store


def points(
    server: GcsServer | S3Server,
    url: str,
    fault: Callable[[str], Fault],
    start: dict[str, bytes],
    digest: str,
) -> int:
    """Save with the fault at each request in turn, and restart; how many requests there were.

    `fault` is given the name of the request.
    """
    for number in count(1):
        server.faults = faults = Nth(number, fault)
        with seeded(f"{url}/{number}", start) as store:
            owner = reopened(store)
            faults.begin()
            saved = save(store, owner, Solo(), state(MINE), step=MINE)
            if saved is None:  # training went on: the next one
                saved = save(store, owner, Solo(), state(MINE), step=MINE)
            faults.end()
            assert saved is not None, f"no save after a fault at request {number}"
            if not faults.hit:
                return number - 1
            restarted = restore(store, claimed(store), Solo())
            assert restarted is not None and restarted.checkpoint.index == saved.index
            assert restarted.checkpoint.digest == digest
    raise AssertionError("a save ends")


FAULTS: dict[str, Fault] = {
    "412": Status(412, "PreconditionFailed"),
    "429": Status(429, "SlowDown"),
    "503": Status(503, "ServiceUnavailable"),
    "reset before": Reset(done=False),
    "reset after": Reset(done=True),
}


@pytest.mark.parametrize("name", [*FAULTS, "silence"])
def test_a_save_to_gcs_survives_a_fault_at_any_request(
    name: str, start: dict[str, bytes], digests: dict[int, str]
) -> None:
    release = threading.Event()
    fault = Silence(release) if name == "silence" else FAULTS[name]
    with gcs_server.running(GcsServer("bucket")) as server, reached("gs", server.url):
        requests = points(server, "gs://bucket/run", lambda _: fault, start, digests[MINE])
        release.set()
    print(f"gs {name}: {requests} points")
    assert requests >= 15


def test_a_save_to_s3_survives_a_fault_at_any_request(
    start: dict[str, bytes], digests: dict[int, str]
) -> None:
    """409 is what S3 answers to two creations at once, and 503 to anything when it is busy."""

    def fault(operation: str) -> Fault:
        if operation in ("create", "write"):
            return Status(409, "ConditionalRequestConflict")
        return Status(503, "SlowDown")

    with s3_server.running(S3Server()) as server, reached("s3", server.url):
        server.make_bucket("crash-requests")
        requests = points(server, "s3://crash-requests/run", fault, start, digests[MINE])
    print(f"s3: {requests} points")
    assert requests >= 15
