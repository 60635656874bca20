"""A snapshot is the state of its instant, if the update waits for it."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointing.layout import share, specs_of
from checkpointing.snapshot import Arena, Snapshot, fingerprint, flat_bytes


@pytest.fixture
def copier() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with (
        patch("checkpointing.layout.CHUNK_BYTES", 64),
        patch("checkpointing.layout.OBJECT_BYTES", 256),
    ):
        yield


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "a": torch.randn(90, 2, generator=generator),
        "transposed": torch.randn(6, 9, generator=generator).t(),
        "half": torch.randn(33, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
    }


def arena(tensors: dict[str, torch.Tensor], rank: int = 0, size: int = 1) -> Arena:
    return Arena(share(specs_of(tensors), rank, size), pinned=False)


def contents(memory: Arena) -> dict[str, torch.Tensor]:
    """What the objects hold, read by the library."""
    found: dict[str, torch.Tensor] = {}
    for number in range(len(memory.objects)):
        found |= safetensors.torch.load(bytes(memory.data(number)))
    return found


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_arenas_of_all_ranks_hold_the_state(size: int, copier: ThreadPoolExecutor) -> None:
    tensors = state()
    found: dict[str, bytearray] = {n: bytearray(flat_bytes(t).numel()) for n, t in tensors.items()}
    for rank in range(size):
        memory = arena(tensors, rank, size)
        Snapshot(memory, tensors, copier, compare=False).finished()
        for piece, place in memory.places():
            found[piece.tensor][piece.start : piece.stop] = bytes(place.numpy())
        assert len(contents(memory)) == sum(len(one.pieces) for one in memory.objects)
    assert found == {name: bytes(flat_bytes(t).numpy()) for name, t in tensors.items()}


def overwrite(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor.fill_(1)


class Held(ThreadPoolExecutor):
    """A copier that begins only when it is let go."""

    def __init__(self) -> None:
        super().__init__(1)
        self.let_go = threading.Event()
        self.submit(self.let_go.wait, 60)


def test_what_is_overwritten_after_the_wait_is_stored_as_it_was() -> None:
    tensors = state()
    with Held() as copier:
        snapshot = Snapshot(arena(tensors), tensors, copier, compare=True)
        waited = threading.Thread(target=snapshot.wait)
        waited.start()
        assert waited.is_alive(), "the copy has not begun"
        copier.let_go.set()
        waited.join(60)
        overwrite(tensors)
        snapshot.finished()
    expected = {n: bytes(flat_bytes(t).numpy()) for n, t in state().items()}
    found: dict[str, bytes] = dict.fromkeys(expected, b"")
    for piece, place in sorted(snapshot.arena.places(), key=lambda pair: pair[0].start):
        found[piece.tensor] += bytes(place.numpy())
    assert found == expected
    assert snapshot.fingerprints() == {n: int(fingerprint(t)) for n, t in state().items()}


def test_without_the_wait_what_is_stored_is_not_what_it_was() -> None:
    """The control: the copy comes after the update."""
    tensors = state()
    with Held() as copier:
        snapshot = Snapshot(arena(tensors), tensors, copier, compare=False)
        overwrite(tensors)
        copier.let_go.set()
        snapshot.finished()
    first = next(place for piece, place in snapshot.arena.places() if piece.tensor == "a")
    assert not torch.equal(first, flat_bytes(state()["a"])[: len(first)])
    assert torch.equal(first, flat_bytes(tensors["a"])[: len(first)])


def test_a_copy_that_fails_is_told_to_both_that_wait(copier: ThreadPoolExecutor) -> None:
    tensors = state()
    memory = arena(tensors)
    other = {name: torch.zeros(1, device="meta") for name in tensors}
    snapshot = Snapshot(memory, other, copier, compare=False)
    for wait in (snapshot.wait, snapshot.finished):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()


def test_an_arena_is_used_again_in_place(copier: ThreadPoolExecutor) -> None:
    tensors = state()
    memory = arena(tensors)
    places = [place.data_ptr() for _, place in memory.places()]
    size = memory.size_bytes
    for turn in range(3):
        for tensor in tensors.values():
            tensor.fill_(turn)
        Snapshot(memory, tensors, copier, compare=False).finished()
        assert all(bool((t == turn).all()) for n, t in contents(memory).items() if n != "flags")
    assert [place.data_ptr() for _, place in memory.places()] == places
    assert memory.size_bytes == size >= sum(one.size_bytes for one in memory.objects)


def test_only_a_comparing_snapshot_has_fingerprints(copier: ThreadPoolExecutor) -> None:
    tensors = state()
    snapshot = Snapshot(arena(tensors), tensors, copier, compare=False)
    snapshot.finished()
    assert snapshot.fingerprints() == {}
    snapshot = Snapshot(arena(tensors, rank=1, size=3), tensors, copier, compare=True)
    snapshot.finished()
    assert snapshot.fingerprints().keys() == tensors.keys(), "of what others store, too"


def reference(data: bytes) -> int:
    """The sum of 64-bit words modulo 2**64, and of the bytes after the last word."""
    whole = len(data) // 8 * 8
    words = (data[i : i + 8] for i in range(0, whole, 8))
    total = sum(int.from_bytes(word, "little") for word in words) + sum(data[whole:])
    return (total + 2**63) % 2**64 - 2**63


@settings(deadline=None)
@given(data=st.binary(max_size=70), offset=st.integers(0, 9))
def test_a_fingerprint_is_the_sum_of_words_wherever_they_lie(data: bytes, offset: int) -> None:
    memory = torch.frombuffer(bytearray(bytes(offset) + data + b"."), dtype=torch.uint8)
    tensor = memory[offset : offset + len(data)]
    assert int(fingerprint(tensor)) == reference(data)


@settings(deadline=None)
@given(data=st.binary(min_size=1, max_size=70), bit=st.integers(0, 10**6))
def test_any_one_bit_changes_the_fingerprint(data: bytes, bit: int) -> None:
    other = bytearray(data)
    other[bit // 8 % len(data)] ^= 1 << bit % 8
    one, two = (torch.frombuffer(bytearray(d), dtype=torch.uint8) for d in (data, other))
    assert int(fingerprint(one)) != int(fingerprint(two))


def test_a_view_has_the_bytes_of_its_values() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    assert bytes(flat_bytes(tensor.t()).numpy()) == tensor.t().contiguous().numpy().tobytes()
    assert flat_bytes(tensor).data_ptr() == tensor.data_ptr(), "no copy where none is needed"
    assert int(fingerprint(tensor.t())) == int(fingerprint(tensor.t().contiguous()))


def test_memory_is_made_ready_once_and_never_under_a_copy() -> None:
    """Two threads: the second waits for the first, and then changes nothing."""
    arena = Arena(share(specs_of({"w": torch.ones(2_000_000)}), 0, 1), pinned=False)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(arena.make_ready) for _ in range(2)]
        both[1].result()
        for _, place in arena.places():
            place.fill_(7)
        both[0].result()
        arena.make_ready()
    assert all(bool((place == 7).all()) for _, place in arena.places())
