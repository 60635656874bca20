"""What operators ask reaches the owner, and what is no request does no harm."""

import json
import logging
from pathlib import Path

import pytest

from storage.errors import ConfigurationError, StoreUnavailableError
from storage.requests import MOST_BYTES, MOST_PENDING, Inbox, put_request, refusal
from storage.store import LocalStore

KINDS = ("stop", "save")
KEY = f"requests/{'0' * 32}.json"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def request(**fields: object) -> bytes:
    whole = {"format": 1, "kind": "save", "body": {}, "asked_at": 1.0}
    return json.dumps(whole | fields).encode()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_what_is_asked_is_pending_until_it_is_answered(store: LocalStore) -> None:
    assert Inbox(store, KINDS).pending() == []
    later = put_request(store, "stop", {"why": "maintenance"}, wall_clock=lambda: 2.0)
    first = put_request(store, "save", wall_clock=lambda: 1.0)
    inbox = Inbox(store, KINDS)
    found = inbox.pending()
    assert [(r.key, r.kind, r.body, r.asked_at) for r in found] == [
        (first, "save", {}, 1.0),
        (later, "stop", {"why": "maintenance"}, 2.0),
    ]
    assert inbox.pending() == found, "looking answers nothing"
    inbox.answered(found[0])
    inbox.answered(found[0])
    assert inbox.pending() == found[1:] == Inbox(store, KINDS).pending()


def test_asking_twice_makes_two_requests(store: LocalStore) -> None:
    keys = {put_request(store, "save", wall_clock=lambda: 1.0) for _ in range(2)}
    inbox = Inbox(store, KINDS)
    found = inbox.pending()
    assert {r.key for r in found} == keys and len(found) == 2
    for each in found:
        inbox.answered(each)
    assert inbox.pending() == []


def test_a_request_withdrawn_while_it_is_read_is_none(store: LocalStore) -> None:
    class Withdrawn(LocalStore):
        def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            raise FileNotFoundError(key)

    put_request(store, "save")
    assert Inbox(Withdrawn(store.root), KINDS).pending() == []


def test_a_request_that_is_refused_says_why_and_is_gone(store: LocalStore) -> None:
    key = put_request(store, "save")
    inbox = Inbox(store, KINDS)
    assert refusal(store, key) is None
    inbox.refuse(inbox.pending()[0], "no room")
    assert refusal(store, key) == "no room"
    assert inbox.pending() == []
    store.put(store.list("answers/")[0], b"[" * 100)
    assert refusal(store, key) is None, "an answer that cannot be read is none"


def test_a_request_of_another_owners_kind_is_refused(store: LocalStore) -> None:
    put_request(store, "edit")
    inbox = Inbox(store, KINDS)
    assert [inbox.pending(), inbox.pending(), store.list("requests/")] == [[], [], []]


def test_a_request_that_is_too_large_is_not_put(store: LocalStore) -> None:
    with pytest.raises(ConfigurationError, match=f"at most {MOST_BYTES} bytes; this one has"):
        put_request(store, "save", {"note": "x" * MOST_BYTES})
    assert store.list("") == []


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (request()[:-9], "it is not JSON"),
        (b"", "it is not JSON"),
        (b"\xff\x00", "it is not JSON"),
        (b"[" * MOST_BYTES, "it is not JSON"),
        (request(body={"note": "x" * MOST_BYTES}), f"it has more than {MOST_BYTES} bytes"),
        (b"[]", "expected format 1; was it written by another version?"),
        (request(format=2), "expected format 1; was it written by another version?"),
        (request(kind="explode"), "it asks for 'explode'; expected one of save, stop"),
        (request(kind=["save"]), r"it asks for ['save']; expected one of save, stop"),
        (request(kind=None), "it asks for None; expected one of save, stop"),
        (request(body=[1]), "`body` must be an object, and `asked_at` a number"),
        (request(asked_at="now"), "`body` must be an object, and `asked_at` a number"),
    ],
)
def test_what_is_no_request_is_refused_with_one_warning(
    data: bytes, why: str, store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(KEY, data)
    good = put_request(store, "save")
    inbox = Inbox(store, KINDS)
    for _ in range(4):
        assert [r.key for r in inbox.pending()] == [good]
    assert store.list("requests/") == [good]
    assert warnings(caplog) == [f"{store.url}/{KEY} is no request: {why}"]


def test_a_half_written_request_is_waited_for(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    inbox = Inbox(store, KINDS)
    for length in (0, 10, 20):
        store.put(KEY, request()[:length])
        assert inbox.pending() == []
    store.put(KEY, request())
    assert [r.key for r in inbox.pending()] == [KEY]
    assert not warnings(caplog)


def test_objects_with_other_names_stay(store: LocalStore, caplog: pytest.LogCaptureFixture) -> None:
    names = ["requests/notes.txt", f"requests/deep/{'0' * 32}.json"]
    for name in names:
        store.put(name, request())
    (store.root / "requests" / ".hidden").write_text("x")
    inbox = Inbox(store, KINDS)
    for _ in range(3):
        assert inbox.pending() == []
    assert set(names) <= set(store.list("requests/"))
    assert len(warnings(caplog)) == 3
    assert "notes.txt is no request: it is not named as one, and stays" in warnings(caplog)[-1]


def test_one_that_cannot_be_deleted_does_not_hide_the_others(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    class KeepsAll(LocalStore):
        def delete(self, key: str) -> None:
            raise StoreUnavailableError("permission denied")

    store.put(KEY, b"{}")
    good = put_request(store, "save")
    inbox = Inbox(KeepsAll(store.root), KINDS)
    for _ in range(4):
        assert [r.key for r in inbox.pending()] == [good]
    assert len(warnings(caplog)) == 1


def test_a_flood_is_read_in_turns(store: LocalStore) -> None:
    for n in range(MOST_PENDING + 5):
        store.put(f"requests/{n:032x}.json", request())
    inbox = Inbox(store, KINDS)
    found = inbox.pending()
    assert len(found) == MOST_PENDING
    for each in found:
        inbox.answered(each)
    assert len(inbox.pending()) == 5


def test_a_store_that_fails_says_so(store: LocalStore) -> None:
    class Unreachable(LocalStore):
        def list(self, prefix: str, start_after: str = "") -> list[str]:
            raise StoreUnavailableError("no route to host")

    with pytest.raises(StoreUnavailableError, match="no route"):
        Inbox(Unreachable(store.root), KINDS).pending()
