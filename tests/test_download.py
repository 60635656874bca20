"""One download: in pieces, verified, from the next place when one fails, and never for ever."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from data_service.download import Remote, download
from storage.errors import DataError, IntegrityError, StoreUnavailableError
from storage.store import LocalStore, Store
from tests.faulty_store import FaultyStore, FlipByte, Hang, Refuse, TruncateRead
from tests.made_lanes import downloads, made_objects


class Sink:
    """What was written, as a file would have it."""

    def __init__(self) -> None:
        self.data = bytearray(10_000)
        self.end = 0

    def write(self, start: int, data: bytes) -> None:
        self.data[start : start + len(data)] = data
        self.end = start + len(data)

    def content(self) -> bytes:
        return bytes(self.data[: self.end])


@pytest.fixture
def made(tmp_path: Path) -> tuple[FaultyStore, Remote]:
    store, (remote,) = made_objects(tmp_path / "first", [500])
    return store, remote


def content(tmp_path: Path) -> bytes:
    return (tmp_path / "first" / "shard-0.npy").read_bytes()


def at(remote: Remote, *stores: Store) -> Remote:
    return replace(remote, stores=stores)


def test_pieces_arrive_in_order_and_whole(made: tuple[FaultyStore, Remote], tmp_path: Path) -> None:
    store, remote = made
    sink = Sink()
    download(remote, sink.write, piece_bytes=300)
    assert sink.content() == content(tmp_path)
    assert len(downloads(store)) == 4


def test_a_piece_that_is_damaged_is_fetched_again_with_all_others(
    made: tuple[FaultyStore, Remote], tmp_path: Path
) -> None:
    inner = LocalStore(tmp_path / "first")
    for fault in (FlipByte(7), TruncateRead()):
        store = FaultyStore(inner, lambda op, fault=fault: fault if op.number == 2 else None)  # type: ignore[misc]
        sink = Sink()
        download(at(made[1], store), sink.write, piece_bytes=300)
        assert sink.content() == content(tmp_path)


def test_every_cause_is_told(made: tuple[FaultyStore, Remote], tmp_path: Path) -> None:
    inner = LocalStore(tmp_path / "first")
    empty = LocalStore(tmp_path / "empty")
    flipped = FaultyStore(inner, lambda op: FlipByte(200))
    away = FaultyStore(inner, lambda op: Refuse("away"))
    with pytest.raises(DataError, match=r"shard-0\.npy cannot be had: .*empty has no such object;"):
        download(at(made[1], empty), Sink().write)
    with pytest.raises(IntegrityError, match=r"no such object; .*first has it with sha256"):
        download(at(made[1], empty, flipped), Sink().write)
    with pytest.raises(StoreUnavailableError, match=r"with sha256 .*; .*away"):
        download(at(made[1], flipped, away), Sink().write)
    sink = Sink()
    download(at(made[1], empty, flipped, away, inner), sink.write)
    assert sink.content() == content(tmp_path)


def test_a_read_that_hangs_is_left_to_itself(
    made: tuple[FaultyStore, Remote], tmp_path: Path
) -> None:
    ever = threading.Event()
    hanging = FaultyStore(LocalStore(tmp_path / "first"), lambda op: Hang(ever))
    with pytest.raises(StoreUnavailableError, match=r"gave no answer within 0\.\d+ s"):
        download(at(made[1], hanging), Sink().write, piece_seconds=0.02)
    with pytest.raises(StoreUnavailableError, match="gave no answer"):
        download(at(made[1], hanging), Sink().write, seconds=0.02)
    with pytest.raises(StoreUnavailableError, match="gave no answer"):
        download(at(made[1], hanging), Sink().write, stopped=lambda: True)
    sink = Sink()
    download(at(made[1], hanging, LocalStore(tmp_path / "first")), sink.write, piece_seconds=0.02)
    ever.set()
    assert sink.content() == content(tmp_path)


def test_a_disk_that_refuses_is_told(made: tuple[FaultyStore, Remote]) -> None:
    def full(start: int, data: bytes) -> None:
        raise StoreUnavailableError("no space left")

    with pytest.raises(StoreUnavailableError, match="no space left"):
        download(made[1], full)
