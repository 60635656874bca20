import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest

from storage.errors import StoreUnavailableError
from storage.log import Draft, Log, Record
from storage.store import FsspecStore, LocalStore, Store


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return LocalStore(tmp_path / "run")
    return FsspecStore(f"memory://{uuid.uuid4().hex}")


def note(text: str, generation: int = 1) -> Draft:
    return Draft(kind="NOTE", generation=generation, body={"text": text})


def texts(store: Store) -> list[str]:
    return [record.body["text"] for record in Log(store).refresh()]


def test_records_are_read_in_the_order_of_their_appending(store: Store) -> None:
    one, two = Log(store), Log(store)
    for number in range(6):
        (one if number % 2 else two).append(lambda _, n=number: note(str(n)))
    assert texts(store) == ["0", "1", "2", "3", "4", "5"]
    records = Log(store).refresh()
    assert [record.index for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record.previous for record in records[1:]] == [r.sha256 for r in records[:-1]]


def test_a_writer_that_loses_the_race_decides_anew(store: Store) -> None:
    fast, slow = Log(store), Log(store)
    seen: list[int] = []

    def decide(records: Sequence[Record]) -> Draft:
        seen.append(len(records))
        if len(seen) == 1:
            fast.append(lambda _: note("fast"))
        return note(f"slow after {len(records)}")

    slow.append(decide)
    assert seen == [0, 1]
    assert texts(store) == ["fast", "slow after 1"]


def test_deciding_nothing_appends_nothing(store: Store) -> None:
    assert Log(store).append(lambda _: None) is None
    assert texts(store) == []


class LosesResponses(LocalStore):
    """Writes, and then says that it could not."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        super().put_if_absent(key, data)
        raise StoreUnavailableError("connection reset")


class LosesRequests(LocalStore):
    def put_if_absent(self, key: str, data: bytes) -> bool:
        raise StoreUnavailableError("connection reset")


def test_a_lost_response_is_told_from_a_lost_request(tmp_path: Path) -> None:
    record = Log(LosesResponses(tmp_path / "a")).append(lambda _: note("once"))
    assert record is not None
    assert texts(LocalStore(tmp_path / "a")) == ["once"]
    with pytest.raises(StoreUnavailableError, match="connection reset"):
        Log(LosesRequests(tmp_path / "b")).append(lambda _: note("never"))


def test_a_record_knows_the_highest_generation_also_when_its_claim_is_damaged(
    store: Store,
) -> None:
    log = Log(store)
    log.append(lambda _: Draft(kind="CLAIM", generation=5, body={"text": "claim"}))
    log.append(lambda _: note("after", generation=5))
    store.put("log/0000000001.json", b"{")
    again = Log(store)
    again.refresh()
    assert again.damaged == [1]
    assert again.highest_generation == 5


DAMAGE = [
    (how, damaged)
    for how in ("flipped", "cut", "deleted", "exchanged", "foreign")
    for damaged in (1, 2, 3)
    # a whole other first record is told by the second's chain alone
    if (how, damaged) != ("foreign", 1)
]


@pytest.mark.parametrize(("how", "damaged"), DAMAGE)
def test_a_damaged_record_is_left_out_and_the_others_kept(
    how: str, damaged: int, store: Store, tmp_path: Path
) -> None:
    log = Log(store)
    for number in (1, 2, 3):
        log.append(lambda _, n=number: note(str(n)))
    key = f"log/{damaged:010d}.json"
    data = store.get(key)
    if how == "flipped":
        store.put(key, data.replace(b'"text":"', b'"text":"!'))
    elif how == "cut":
        store.put(key, data[:-2])
    elif how == "deleted":
        store.delete(key)
    elif how == "exchanged":
        store.put(key, store.get(f"log/{damaged % 3 + 1:010d}.json"))
    else:
        other = LocalStore(tmp_path / "other")
        for number in (7, 8, 9):
            Log(other).append(lambda _, n=number: note(str(n)))
        store.put(key, other.get(key))
    assert texts(store) == [str(n) for n in (1, 2, 3) if n != damaged]
    Log(store).append(lambda _: note("4"))
    assert texts(store)[-1] == "4"


def test_a_torn_record_is_void_after_a_wait_where_creation_is_not_atomic(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.creates_atomically = False
    Log(store).append(lambda _: note("1"))
    (tmp_path / "log/0000000002.json").write_bytes(b'{"half":')
    waits: list[float] = []
    record = Log(store, sleep=waits.append).append(lambda _: note("3"))
    assert record is not None and record.index == 3
    assert waits == [30.0]
    assert record.voids == (2,)
    assert texts(store) == ["1", "3"]


def test_a_slow_writer_of_the_last_record_is_waited_for(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.creates_atomically = False
    Log(store).append(lambda _: note("1"))
    Log(store).append(lambda _: note("2"))
    path = tmp_path / "log/0000000002.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    log = Log(store, sleep=lambda seconds: path.write_bytes(whole) and None)
    log.append(lambda _: note("3"))
    assert texts(store) == ["1", "2", "3"]


def test_a_voided_record_stays_void_when_its_writer_ends_after_all(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.creates_atomically = False
    Log(store).append(lambda _: note("1"))
    Log(store).append(lambda _: note("2"))
    path = tmp_path / "log/0000000002.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    Log(store, sleep=lambda seconds: None).append(lambda _: note("3"))
    path.write_bytes(whole)
    assert texts(store) == ["1", "3"]
