"""The faulty store does each wrong that its script asks for, and no other."""

import threading
from pathlib import Path

import pytest

from storage.errors import StoreUnavailableError
from storage.store import LocalStore
from tests.faulty_store import (
    Crash,
    CrashAfter,
    CrashBefore,
    Delay,
    Fault,
    FaultyStore,
    FlipByte,
    Hang,
    LoseResponse,
    Operation,
    Refuse,
    TruncateRead,
    TruncateWrite,
)


@pytest.fixture
def inner(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path)
    store.put("old", b"0123456789")
    return store


def at(number: int, fault: Fault) -> "FaultAt":
    return FaultAt(number, fault)


class FaultAt:
    """A script of one fault."""

    def __init__(self, number: int, fault: Fault) -> None:
        self.number, self.fault = number, fault

    def __call__(self, operation: Operation) -> Fault | None:
        return self.fault if operation.number == self.number else None


def test_without_faults_it_is_the_store_within_and_counts(inner: LocalStore) -> None:
    store = FaultyStore(inner)
    assert store.put_if_absent("a/1", b"x") and not store.put_if_absent("a/1", b"y")
    store.put("b", memoryview(b"z"))
    assert store.get("old", 2, 4) == b"23"
    assert store.stat("b").size_bytes == 1
    assert store.list("a/") == ["a/1"]
    store.delete("b")
    assert store.local_path("a/1") is None
    assert store.creates_atomically and store.url == inner.url
    assert [(o.number, o.name, o.key) for o in store.operations] == [
        (1, "put_if_absent", "a/1"),
        (2, "put_if_absent", "a/1"),
        (3, "put", "b"),
        (4, "get", "old"),
        (5, "stat", "b"),
        (6, "list", "a/"),
        (7, "delete", "b"),
    ]


@pytest.mark.parametrize(
    ("fault", "raised", "done"),
    [
        (CrashBefore(), Crash, False),
        (CrashAfter(), Crash, True),
        (Refuse("503"), StoreUnavailableError, False),
        (LoseResponse(), StoreUnavailableError, True),
    ],
)
def test_a_fault_before_or_after_the_deed(
    fault: Fault, raised: type[BaseException], done: bool, inner: LocalStore
) -> None:
    store = FaultyStore(inner, at(2, fault))
    store.get("old")
    with pytest.raises(raised):
        store.put_if_absent("new", b"x")
    assert ("new" in inner.list("")) == done
    assert store.put_if_absent("new", b"y") != done, "the third operation is as usual"


def test_half_a_write_is_only_where_it_can_be(inner: LocalStore) -> None:
    store = FaultyStore(inner, lambda operation: TruncateWrite())
    with pytest.raises(Crash):
        store.put("new", b"123456")
    assert inner.get("new") == b"123"
    with pytest.raises(AssertionError, match="no half object"):
        store.put_if_absent("record", b"123456")
    store.creates_atomically = False
    with pytest.raises(Crash):
        store.put_if_absent("record", b"123456")
    assert inner.get("record") == b"123"
    with pytest.raises(AssertionError, match="writes nothing"):
        store.delete("record")


def test_what_is_read_may_be_cut_or_flipped(inner: LocalStore) -> None:
    assert FaultyStore(inner, at(1, TruncateRead())).get("old") == b"01234"
    assert FaultyStore(inner, at(1, FlipByte(-1))).get("old") == b"012345678" + bytes([0x39 ^ 0xFF])
    assert inner.get("old") == b"0123456789"
    with pytest.raises(AssertionError, match="only what is read"):
        FaultyStore(inner, at(1, FlipByte())).list("")


def test_another_may_be_faster(inner: LocalStore) -> None:
    store = FaultyStore(inner, at(1, Delay(lambda: inner.put_if_absent("new", b"other"))))
    assert not store.put_if_absent("new", b"mine")
    assert inner.get("new") == b"other"


def test_a_hang_ends_with_its_event_and_holds_up_no_other_thread(inner: LocalStore) -> None:
    until, hanging = threading.Event(), threading.Event()

    def script(operation: Operation) -> Fault | None:
        if operation.key == "new":
            hanging.set()
            return Hang(until)
        return None

    store = FaultyStore(inner, script)
    errors: list[BaseException] = []

    def put() -> None:
        try:
            store.put("new", b"x")
        except StoreUnavailableError as error:
            errors.append(error)

    thread = threading.Thread(target=put)
    thread.start()
    hanging.wait()
    assert store.get("old") == b"0123456789"
    assert not errors
    until.set()
    thread.join()
    assert len(errors) == 1 and inner.list("") == ["old"]
