import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.errors import StoreUnavailableError
from storage.fsspec_store import FsspecStore
from storage.log import Draft, Log, Record
from storage.store import LocalStore, ObjectInfo, Store


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


class Counting(LocalStore):
    """Objects in memory, so that thousands are quick; counts what is asked for."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"))
        self.objects: dict[str, bytes] = {}
        self.asked = Counter[str]()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.asked["put"] += 1
        return self.objects.setdefault(key, data) is data

    def put(self, key: str, data: bytes | memoryview) -> None:
        self.objects[key] = bytes(data)

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self.asked["get"] += 1
        if key not in self.objects:
            raise FileNotFoundError(key)
        return self.objects[key]

    def stat(self, key: str) -> ObjectInfo:
        self.asked["stat"] += 1
        if key not in self.objects:
            raise FileNotFoundError(key)
        return ObjectInfo(size_bytes=len(self.objects[key]))

    def list(self, prefix: str, start_after: str = "") -> list[str]:
        keys = sorted(k for k in self.objects if k.startswith(prefix) and k > start_after)
        self.asked["list"] += 1
        self.asked["listed"] += len(keys)
        return keys

    def delete(self, key: str) -> None:
        del self.objects[key]


def base(generation: int = 1) -> Draft:
    return Draft(kind="BASE", generation=generation, body={"text": "base"})


def write(store: Store, kinds: str) -> Log:
    """A log of notes (their own index as text), and of BASE records where `kinds` has a B."""
    log = Log(store, whole=True)
    for index, kind in enumerate(kinds, start=1):
        log.append(lambda _, n=index, k=kind: base() if k == "B" else note(str(n)))
    return log


def test_a_replay_begins_at_the_newest_base_and_a_whole_one_at_the_beginning(store: Store) -> None:
    write(store, "..B..B..")
    assert texts(store) == ["base", "7", "8"]
    whole = Log(store, whole=True).refresh()
    assert [record.index for record in whole] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [record.previous for record in whole[1:]] == [r.sha256 for r in whole[:-1]]
    Log(store).append(lambda _: note("9"))
    assert texts(store) == ["base", "7", "8", "9"]


def test_a_log_that_follows_forgets_what_a_base_restates(store: Store) -> None:
    follower, whole = Log(store), Log(store, whole=True)
    write(store, "...")
    held = follower.refresh()
    Log(store).append(lambda _: base())
    assert [r.index for r in follower.refresh()] == [4]
    assert [r.index for r in held] == [1, 2, 3, 4], "who iterates over it is not disturbed"
    assert [r.index for r in whole.refresh()] == [1, 2, 3, 4]
    follower.append(lambda _: note("5"))
    assert texts(store) == ["base", "5"]


def test_opening_reads_what_lies_behind_the_base_however_long_the_log() -> None:
    store = Counting()
    write(store, ("." * 99 + "B") * 60 + "." * 50)
    store.asked.clear()
    records = Log(store).refresh()
    assert [records[0].index, records[-1].index] == [6000, 6050]
    assert store.asked["get"] <= 128 + 1, "one window, and the slot after the tail"
    assert store.asked["stat"] <= 1 + 8 + 2 * 8
    assert (store.asked["list"], store.asked["listed"] <= 1000) == (1, True)


def test_an_append_reads_no_more_in_a_long_log_than_in_a_short_one() -> None:
    store = Counting()
    log = write(store, "." * 10)
    asked = []
    for more in (1, 1500):
        write(store, "." * more)
        log.refresh()
        store.asked.clear()
        log.append(lambda _: note("one more"))
        asked.append(dict(store.asked))
    assert asked[0] == asked[1] == {"get": 4, "put": 1}


@pytest.mark.parametrize("holes", [[1000], [1000, 2000], [1000, 1001, 2499], [2499], [1, 1500]])
def test_a_missing_record_is_not_mistaken_for_the_tail(holes: list[int]) -> None:
    store = Counting()
    write(store, "." * 2500)
    for index in holes:
        store.delete(f"log/{index:010d}.json")
    log = Log(store)
    assert log.refresh()[-1].index == 2500
    assert log.damaged == holes
    record = log.append(lambda _: note("next"))
    assert record is not None and record.index == 2501


@pytest.mark.parametrize("tail", [1, 2, 999, 1000, 1001, 7999, 8000, 8001, 8888, 70_000, 600_001])
def test_the_tail_is_found_wherever_it_is(tail: int) -> None:
    class UpTo(Counting):
        """Holds `tail` objects that are no records, without making them."""

        def stat(self, key: str) -> ObjectInfo:
            if int(key[4:14]) > tail:
                raise FileNotFoundError(key)
            return ObjectInfo(size_bytes=2)

        def list(self, prefix: str, start_after: str = "") -> list[str]:
            first = int(start_after[4:14]) + 1 if start_after else 1
            assert tail - first < 1000, "one page"
            return [f"log/{index:010d}.json" for index in range(first, tail + 1)]

    with ThreadPoolExecutor(2) as pool:
        assert Log(UpTo())._last_slot(pool) == tail


BASE_DAMAGE = ["flipped", "cut", "deleted", "exchanged", "foreign", "foreign and last"]


@pytest.mark.parametrize("how", BASE_DAMAGE)
def test_a_replay_goes_on_to_an_earlier_base_when_one_is_damaged(
    how: str, store: Store, tmp_path: Path
) -> None:
    write(store, "..B..B" if how == "foreign and last" else "..B..B..")
    key = "log/0000000006.json"
    data = store.get(key)
    if how == "flipped":
        store.put(key, data.replace(b'"text":"', b'"text":"!'))
    elif how == "cut":
        store.put(key, data[:-2])
    elif how == "deleted":
        store.delete(key)
    elif how == "exchanged":
        store.put(key, store.get("log/0000000003.json"))
    else:
        other = LocalStore(tmp_path / "other")
        write(other, "..B..B..")
        store.put(key, other.get(key))
    rest = [] if how == "foreign and last" else ["7", "8"]
    log = Log(store)
    assert [r.body["text"] for r in log.refresh()] == ["base", "4", "5", *rest]
    assert log.damaged == ([] if how == "deleted" and not rest else [6])
    store.put("log/0000000003.json", b"{}")
    assert texts(store) == ["1", "2", "4", "5", *rest]
    assert log.append(lambda _: note("9")) is not None


def test_a_base_whose_neighbours_are_damaged_still_begins_a_replay(store: Store) -> None:
    write(store, "..B..B..")
    store.put("log/0000000005.json", b"{}")
    store.put("log/0000000007.json", b"{}")
    log = Log(store)
    assert [r.body["text"] for r in log.refresh()] == ["base", "8"]
    assert log.damaged == [7]


def test_a_base_says_which_slots_were_damaged(store: Store) -> None:
    write(store, "...")
    store.put("log/0000000002.json", b"{}")
    writer = Log(store)
    writer.append(lambda _: base())
    reader = Log(store)
    assert [r.index for r in reader.refresh()] == [4]
    assert reader.damaged == writer.damaged == [2]
    assert Log(store, whole=True).refresh()[0].index == 1


def test_a_base_knows_the_highest_generation(store: Store) -> None:
    log = Log(store)
    log.append(lambda _: Draft(kind="CLAIM", generation=5, body={}))
    log.append(lambda _: base(generation=5))
    again = Log(store)
    assert [r.kind for r in again.refresh()] == ["BASE"]
    assert again.highest_generation == 5


@pytest.mark.parametrize("generation", [0, 1])
def test_a_base_that_is_not_the_owners_begins_no_replay(generation: int, store: Store) -> None:
    follower = Log(store)
    follower.append(lambda _: note("1", generation=2))
    Log(store).append(lambda _: base(generation=generation))
    assert [r.index for r in Log(store).refresh()] == [1, 2]
    assert [r.index for r in follower.refresh()] == [1, 2]


def test_a_torn_base_that_ends_after_all_begins_no_replay(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.creates_atomically = False
    write(store, "..B")
    path = tmp_path / "log/0000000003.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    follower = Log(store, sleep=lambda seconds: None)
    path.write_bytes(whole)
    assert [r.index for r in follower.refresh()] == [3], "this reader saw it whole"
    path.write_bytes(whole[:20])
    Log(store, sleep=lambda seconds: None).append(lambda _: note("4"))
    path.write_bytes(whole)
    assert texts(store) == ["1", "2", "4"]
    assert [r.body["text"] for r in follower.refresh()] == ["1", "2", "4"]
