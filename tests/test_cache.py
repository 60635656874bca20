"""The cache of remote shards: what is read is what was written, soon, and within the limit."""

import logging
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_service.cache import Cache
from data_service.cache_folder import CacheFolder
from data_service.download import Remote
from storage.canonical import sha256_hex
from storage.errors import ConfigurationError, DataError, IntegrityError, StoreUnavailableError
from storage.store import LocalStore
from tests.cache_users import ROOT, other_process
from tests.faulty_store import (
    Fault,
    FlipByte,
    Hang,
    Operation,
    Refuse,
    Script,
    TruncateRead,
)
from tests.made_lanes import Lanes, Visit, downloads, made_objects, read_step, shuffled_lanes
from tests.test_bad_input import fill, small_disk

__all__ = ["small_disk"]

SIZES = (100, 200, 300, 150, 250, 120)


def folder_of(tmp_path: Path, limit_bytes: int = 10**6) -> CacheFolder:
    return CacheFolder(tmp_path / "cache", limit_bytes=limit_bytes)


def one_lane(*remotes: Remote) -> Lanes:
    return Lanes([[Visit(number, number + 1, remote) for number, remote in enumerate(remotes)]])


def read_all(cache: Cache, lanes: Lanes, folder: CacheFolder) -> None:
    with cache:
        cache.follow(lanes, 0)
        for step in range(lanes.steps):
            read_step(cache, lanes, step)
            assert folder.used_bytes() <= folder.limit_bytes


def on_gets(*faults: Fault | None) -> Script:
    """The first reads go wrong in these ways."""
    coming = list(faults)
    return lambda operation: coming.pop(0) if operation.name == "get" and coming else None


def test_everything_is_read_and_fetched_once_if_it_fits(tmp_path: Path) -> None:
    store, remotes = made_objects(tmp_path / "place", SIZES)
    lanes = shuffled_lanes(remotes, lanes=2, epochs=3, seed=1)
    folder = folder_of(tmp_path)
    cache = Cache(folder)
    read_all(cache, lanes, folder)
    assert sorted(downloads(store)) == sorted(remote.key for remote in remotes)
    report = cache.report()
    assert report.downloads == len(remotes)
    assert report.downloaded_bytes == sum(remote.size_bytes for remote in remotes)
    assert report.next_shard == ""


def test_a_later_start_fetches_nothing(tmp_path: Path) -> None:
    store, remotes = made_objects(tmp_path / "place", SIZES)
    lanes = shuffled_lanes(remotes, lanes=2, epochs=1, seed=1)
    folder = folder_of(tmp_path)
    read_all(Cache(folder), lanes, folder)
    before = len(downloads(store))
    cache = Cache(folder_of(tmp_path))
    read_all(cache, lanes, folder)
    assert len(downloads(store)) == before
    assert cache.report().hit_rate == 1.0


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_never_over_the_limit_and_no_more_downloads_than_visits(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With room for the lanes and a few more: what is evicted is never needed before what came."""
    tmp_path = tmp_path_factory.mktemp("cache")
    sizes = data.draw(st.lists(st.integers(70, 500), min_size=1, max_size=12))
    lane_count = data.draw(st.integers(1, 4))
    epochs = data.draw(st.integers(1, 3))
    seed = data.draw(st.integers(0, 1000))
    store, remotes = made_objects(tmp_path / "place", sizes)
    lanes = shuffled_lanes(remotes, lanes=lane_count, epochs=epochs, seed=seed)
    more = data.draw(st.integers(0, sum(remote.size_bytes for remote in remotes)))
    folder = folder_of(tmp_path, lanes.minimum_bytes + more)
    read_all(Cache(folder, threads=data.draw(st.integers(1, 3))), lanes, folder)
    assert len(downloads(store)) <= epochs * (len(remotes) + lane_count)


class Slow(Lanes):
    """What comes is told late: the first answer waits, while others read on."""

    def __init__(self, *remotes: Remote) -> None:
        super().__init__(one_lane(*remotes).lanes)
        self.asked, self.go, self.asked_again = (threading.Event() for _ in range(3))

    def uses(self, step: int) -> Iterator[tuple[int, Remote]]:
        if self.asked.is_set():
            self.asked_again.set()
        self.asked.set()
        self.go.wait(60)
        return super().uses(step)


def test_what_was_read_meanwhile_is_not_fetched_again(tmp_path: Path) -> None:
    """A look ahead may end when what it began with has been read, left behind and evicted."""
    store, remotes = made_objects(tmp_path / "place", [400] * 4)
    slow = Slow(*remotes)
    with Cache(folder_of(tmp_path, slow.minimum_bytes), threads=1) as cache:
        cache.follow(slow, 0)
        assert slow.asked.wait(60)
        for step in range(3):
            read_step(cache, slow, step)
        slow.go.set()
        assert slow.asked_again.wait(60)
        read_step(cache, slow, 3)
    assert sorted(downloads(store)) == sorted(remote.key for remote in remotes)


def test_less_than_the_minimum_is_refused_with_the_number(tmp_path: Path) -> None:
    _, remotes = made_objects(tmp_path / "place", SIZES)
    lanes = shuffled_lanes(remotes, lanes=2, epochs=1, seed=1)
    minimum = sum(sorted(remote.size_bytes for remote in remotes)[-2:]) + max(
        remote.size_bytes for remote in remotes
    )
    cache = Cache(folder_of(tmp_path, minimum - 1))
    with pytest.raises(
        ConfigurationError, match=f"must be at least {minimum:,} bytes: what the la"
    ):
        cache.follow(lanes, 0)


def test_two_runs_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    _, remotes = made_objects(tmp_path / "place", SIZES)
    lanes = one_lane(*remotes)
    limit = 2 * lanes.minimum_bytes - 1
    with Cache(folder_of(tmp_path, limit), group="a") as first:
        first.follow(lanes, 0)
        with Cache(folder_of(tmp_path, limit), group="a") as sibling:
            sibling.follow(lanes, 0)
        with (
            Cache(folder_of(tmp_path, limit), group="b") as other,
            pytest.raises(ConfigurationError, match=r"beside [\d,]+ bytes for other runs"),
        ):
            other.follow(lanes, 0)
    with Cache(folder_of(tmp_path, limit), group="b") as later:
        later.follow(lanes, 0)


@pytest.mark.parametrize("fault", [TruncateRead(), FlipByte(200), FlipByte(-1)])
def test_a_damaged_arrival_is_fetched_once_more(tmp_path: Path, fault: Fault) -> None:
    store, remotes = made_objects(tmp_path / "place", SIZES[:1], on_gets(fault))
    folder = folder_of(tmp_path)
    read_all(Cache(folder), one_lane(*remotes), folder)
    assert len(downloads(store)) == 2


def always(fault: Fault) -> Script:
    return lambda operation: fault if operation.name == "get" else None


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (TruncateRead(), IntegrityError, "truncated: 164 bytes, the index names 328"),
        (FlipByte(200), IntegrityError, r"with sha256 \w{12}, the index names \w{12}"),
    ],
)
def test_what_is_damaged_everywhere_is_an_error_with_its_place(
    tmp_path: Path, fault: Fault, kind: type[Exception], said: str
) -> None:
    _, remotes = made_objects(tmp_path / "place", SIZES[:1], always(fault))
    folder = folder_of(tmp_path)
    with Cache(folder) as cache:
        cache.at(17)
        with pytest.raises(kind, match=f"step 17: source 'web': shard shard-0.npy.*{said}"):
            cache.array(remotes[0])
    assert not folder.objects() and folder.used_bytes() == 0


def test_control_without_verification_the_flipped_shard_would_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, remotes = made_objects(tmp_path / "place", SIZES[:1], always(FlipByte(200)))

    class Believing:
        def update(self, data: bytes) -> None: ...
        def hexdigest(self) -> str:
            return remotes[0].sha256

    monkeypatch.setattr("data_service.download.hashlib.sha256", Believing)
    with Cache(folder_of(tmp_path)) as cache:
        assert cache.array(remotes[0]).sum() == 0xFF


def test_a_missing_shard_is_an_error_with_its_place(tmp_path: Path) -> None:
    _, remotes = made_objects(tmp_path / "place", SIZES[:1])
    LocalStore(tmp_path / "place").delete("shard-0.npy")
    with (
        Cache(folder_of(tmp_path)) as cache,
        pytest.raises(DataError, match=r"step 0: source 'web': shard shard-0\.npy.*no such object"),
    ):
        cache.array(remotes[0])


@pytest.mark.parametrize("fault", [TruncateRead(), FlipByte(200), Refuse(), "missing"])
def test_the_second_place_is_asked_when_the_first_fails(tmp_path: Path, fault: Fault | str) -> None:
    script = always(fault) if not isinstance(fault, str) else lambda operation: None
    _, remotes = made_objects(tmp_path / "first", SIZES, script)
    second, _ = made_objects(tmp_path / "second", SIZES)
    if fault == "missing":
        for remote in remotes:
            LocalStore(tmp_path / "first").delete(remote.key)
    both = [
        Remote(
            source=r.source,
            key=r.key,
            sha256=r.sha256,
            size_bytes=r.size_bytes,
            stores=(*r.stores, second),
        )
        for r in remotes
    ]
    folder = folder_of(tmp_path)
    read_all(Cache(folder), shuffled_lanes(both, lanes=2, epochs=1, seed=3), folder)
    assert len(downloads(second)) == len(SIZES)


def test_a_store_that_fails_for_a_while_is_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faults = [Refuse("away")] * 4
    store, remotes = made_objects(tmp_path / "place", SIZES, on_gets(*faults))
    folder = folder_of(tmp_path)
    with caplog.at_level(logging.WARNING), Cache(folder, retry_seconds=0.01) as cache:
        cache.array(remotes[0])
    assert len(downloads(store)) == 5
    assert "step 0: source 'web': shard shard-0.npy cannot be had" in caplog.text
    assert "away; it is tried again" in caplog.text


def test_a_store_that_stays_away_is_an_error_with_the_last_cause(tmp_path: Path) -> None:
    _, remotes = made_objects(tmp_path / "place", SIZES, always(Refuse("away for good")))
    with (
        Cache(folder_of(tmp_path), timeout_seconds=0.1, retry_seconds=0.01) as cache,
        pytest.raises(
            StoreUnavailableError,
            match=r"step 0: .*shard-2\.npy did not come within 0\.1 s: .*away for good",
        ),
    ):
        cache.array(remotes[2])


def test_a_read_that_hangs_ends_and_the_next_place_is_asked(tmp_path: Path) -> None:
    ever = threading.Event()
    _, remotes = made_objects(tmp_path / "place", SIZES, always(Hang(ever)))
    second, _ = made_objects(tmp_path / "second", SIZES)
    with (
        Cache(folder_of(tmp_path), timeout_seconds=0.1) as cache,
        pytest.raises(StoreUnavailableError, match=r"did not come within 0\.1 s: .*no answer"),
    ):
        cache.array(remotes[0])
    hanging = Remote(
        source="web",
        key=remotes[1].key,
        sha256=remotes[1].sha256,
        size_bytes=remotes[1].size_bytes,
        stores=(*remotes[1].stores, second),
    )
    with Cache(folder_of(tmp_path), piece_seconds=0.05) as cache:
        assert (cache.array(hanging) == 1).all()
    ever.set()


def test_what_an_earlier_process_left_damaged_is_fetched_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, remotes = made_objects(tmp_path / "place", SIZES[:2])
    folder = folder_of(tmp_path)
    lanes = one_lane(*remotes)
    read_all(Cache(folder), lanes, folder)
    path = folder.folder / "objects" / remotes[0].sha256
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    read_all(Cache(folder), lanes, folder)
    assert downloads(store).count(remotes[0].key) == 2
    assert downloads(store).count(remotes[1].key) == 1
    assert "was damaged in the cache" in caplog.text


def test_what_is_not_npy_is_an_error(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "place")
    store.put("x.npy", b"tokens, surely")
    remote = Remote(
        source="web",
        key="x.npy",
        sha256=sha256_hex(b"tokens, surely"),
        size_bytes=14,
        stores=(store,),
    )
    with Cache(folder_of(tmp_path)) as cache, pytest.raises(DataError, match=r"x\.npy is no \.npy"):
        cache.array(remote)


def test_large_objects_come_in_pieces(tmp_path: Path) -> None:
    store, remotes = made_objects(tmp_path / "place", (1000,))
    folder = folder_of(tmp_path)
    read_all(Cache(folder, piece_bytes=500), one_lane(*remotes), folder)
    assert len(downloads(store)) == -(-remotes[0].size_bytes // 500)


def test_one_object_wanted_by_many_threads_is_fetched_once(tmp_path: Path) -> None:
    gate = threading.Event()
    store, remotes = made_objects(tmp_path / "place", (500,), on_gets(Hang(gate)))
    with Cache(folder_of(tmp_path), retry_seconds=0.01) as cache:
        threads = [
            threading.Thread(target=cache.array, args=(remotes[0],), daemon=True) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        gate.set()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
    assert len(downloads(store)) == 2  # the refused one, and one for all


def test_closing_ends_a_wait_for_a_store_that_hangs(tmp_path: Path) -> None:
    ever, begun = threading.Event(), threading.Event()

    def script(operation: Operation) -> Fault | None:
        begun.set()
        return Hang(ever)

    _, remotes = made_objects(tmp_path / "place", SIZES[:1], script)
    cache = Cache(folder_of(tmp_path))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cache.array, remotes[0])
        assert begun.wait(30)
        cache.close()
        with pytest.raises(StoreUnavailableError, match="the cache is closed"):
            waiting.result(30)
    ever.set()


def test_what_comes_is_fetched_before_it_is_asked_for(tmp_path: Path) -> None:
    store, remotes = made_objects(tmp_path / "place", SIZES)
    lanes = one_lane(*remotes)
    with Cache(folder_of(tmp_path)) as cache:
        cache.follow(lanes, 0)
        with cache._changed:
            assert cache._changed.wait_for(lambda: len(cache._held) == len(remotes), 60)
        assert sorted(downloads(store)) == sorted(remote.key for remote in remotes)
        for step in range(lanes.steps):
            read_step(cache, lanes, step)
        assert cache.report().hit_rate == 1.0


def test_the_soonest_is_fetched_first(tmp_path: Path) -> None:
    store, remotes = made_objects(tmp_path / "place", SIZES)
    with Cache(folder_of(tmp_path), threads=1) as cache:
        cache.follow(one_lane(*reversed(remotes)), 0)
        with cache._changed:
            assert cache._changed.wait_for(lambda: len(cache._held) == len(remotes), 60)
    assert downloads(store) == [remote.key for remote in reversed(remotes)]


def test_control_the_nearest_next_use_evicted_would_be_fetched_over_and_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, remotes = made_objects(tmp_path / "place", [100] * 8)

    def fetched(name: str) -> int:
        store, same = made_objects(tmp_path / name, [100] * 8)
        order = random.Random(5)
        turns = [order.sample(same, len(same)) for _ in range(12)]
        lanes = one_lane(*[remote for turn in turns for remote in turn])
        folder = CacheFolder(tmp_path / f"cache-{name}", limit_bytes=6 * same[0].size_bytes)
        read_all(Cache(folder), lanes, folder)
        return len(downloads(store))

    farthest = fetched("farthest")
    victims = Cache._victims
    monkeypatch.setattr(Cache, "_victims", lambda *given: victims(*given)[::-1])
    assert farthest < fetched("nearest")
    assert remotes


def test_another_process_that_holds_everything_gives_way_when_asked(tmp_path: Path) -> None:
    """Two caches on one folder, as of two processes, of which the second finds no room."""
    _, remotes = made_objects(tmp_path / "place", [200] * 4)
    limit = 2 * remotes[0].size_bytes
    with (
        Cache(CacheFolder(tmp_path / "cache", limit_bytes=limit), group="run") as ahead,
        Cache(
            CacheFolder(tmp_path / "cache", limit_bytes=limit), group="run", patient_seconds=0.0
        ) as behind,
    ):
        ahead.follow(one_lane(remotes[0], remotes[1]), 0)
        with ahead._changed:
            assert ahead._changed.wait_for(lambda: len(ahead._held) == 2, 60)
        assert (behind.array(remotes[2]) == 2).all()


def test_the_report_says_what_is_next_and_when(tmp_path: Path) -> None:
    now, gate = [0.0], threading.Event()
    store, remotes = made_objects(
        tmp_path / "place",
        SIZES[:3],
        lambda operation: Hang(gate) if operation.key == "shard-2.npy" else None,
    )
    with Cache(folder_of(tmp_path), clock=lambda: now[0], threads=1) as cache:
        cache.follow(Lanes([[Visit(n * 10, n * 10 + 10, r) for n, r in enumerate(remotes)]]), 0)
        with cache._changed:
            assert cache._changed.wait_for(lambda: len(cache._held) == 2, 60)
        for step in range(4):
            now[0] = 2.0 * step
            cache.at(step)
        report = cache.report()
        assert report.next_shard == "web/shard-2.npy"
        assert report.seconds_until_needed == pytest.approx(2.0 * (20 - 3))
        assert report.seconds_until_there >= 0
        assert "next web/shard-2.npy, needed in 34 s" in str(report)
        gate.set()
    assert store


READER = """
import json
from data_service.cache import Cache
from tests.made_lanes import made_objects, read_step, shuffled_lanes
_, remotes = made_objects(Path({place!r}), {sizes!r})
lanes = shuffled_lanes(remotes, lanes=3, epochs=2, seed=4)
with Cache(CacheFolder(Path({folder!r}), limit_bytes={limit}), group="run") as cache:
    cache.follow(lanes, 0)
    for step in range(lanes.steps):
        read_step(cache, lanes, step)
    downloads = cache.report().downloads
print(downloads, flush=True)
"""


def test_two_processes_share_downloads_and_stay_within_the_limit_at_every_moment(
    tmp_path: Path,
) -> None:
    sizes = [20_000 + 1000 * n for n in range(16)]
    _, remotes = made_objects(tmp_path / "place", sizes)
    lanes = shuffled_lanes(remotes, lanes=3, epochs=2, seed=4)
    folder = folder_of(tmp_path, lanes.minimum_bytes + 3 * remotes[-1].size_bytes)
    program = "from pathlib import Path\nfrom data_service.cache_folder import CacheFolder" + (
        READER.format(
            place=str(tmp_path / "place"),
            sizes=sizes,
            folder=str(folder.folder),
            limit=folder.limit_bytes,
        )
    )
    command = [sys.executable, "-c", program]
    readers = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    most = 0
    while any(reader.poll() is None for reader in readers):
        most = max(most, folder.used_bytes())
        os.sched_yield()
    counts = [int(reader.communicate()[0]) for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0]
    assert 0 < most <= folder.limit_bytes
    # Together about once a visit, and not once a visit for each.
    assert sum(counts) <= 1.5 * 2 * (len(sizes) + 3)


def test_a_download_that_is_killed_is_swept_and_made_by_the_next(tmp_path: Path) -> None:
    store, remotes = made_objects(tmp_path / "place", SIZES)
    lanes = one_lane(*remotes)
    folder = folder_of(tmp_path)
    lines = (
        "import threading",
        "from data_service.cache import Cache",
        "from tests.faulty_store import Hang",
        "from tests.made_lanes import made_objects",
        "begun, ever = threading.Event(), threading.Event()",
        "script = lambda op: begun.set() or Hang(ever) if op.key == 'shard-3.npy' else None",
        f"_, remotes = made_objects(Path({str(tmp_path / 'place')!r}), {SIZES!r}, script)",
        "cache = Cache(folder)",
        "[cache.array(remote) for remote in remotes[:3]]",
        "threading.Thread(target=cache.array, args=(remotes[3],), daemon=True).start()",
        "begun.wait()",
    )
    with other_process(folder, *lines) as process:
        part = folder.folder / "objects" / f"{remotes[3].sha256}.part"
        assert part.stat().st_size == remotes[3].size_bytes
        process.send_signal(signal.SIGKILL)
        process.wait()
    read_all(Cache(folder), lanes, folder)
    assert sorted(downloads(store)) == [f"shard-{number}.npy" for number in (3, 4, 5)]
    assert not part.exists()


def test_needs_that_a_full_disk_refuses_are_nobodys(small_disk: Path) -> None:
    folder, other = (CacheFolder(small_disk / "cache", limit_bytes=10**6) for _ in range(2))
    fill(small_disk)
    with pytest.raises(StoreUnavailableError, match="no space left"):
        folder.needs.register("run a", 300)
    (small_disk / "filler").unlink()
    assert other.needs.of_others("run b") == 0


def test_a_full_disk_is_said_with_the_shard(small_disk: Path, tmp_path: Path) -> None:
    _, remotes = made_objects(tmp_path / "place", [3 * 2**20])  # 6 MiB on a disk of 4
    with (
        Cache(CacheFolder(small_disk / "cache", limit_bytes=10**9)) as cache,
        pytest.raises(StoreUnavailableError, match=r"step 0: the disk of the cache .*bytes free"),
    ):
        cache.array(remotes[0])
