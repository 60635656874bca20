"""Every byte of a state is in one object of one rank, as the safetensors library reads it."""

from collections.abc import Iterator
from itertools import pairwise
from unittest.mock import patch

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointing import layout
from checkpointing.digest import checkpoint_digest, chunk_digests
from checkpointing.layout import ObjectLayout, Spec, described, share, specs_of
from checkpointing.snapshot import flat_bytes
from storage.errors import ConfigurationError

CHUNK, OBJECT = 64, 256
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "uint8", "bool")

States = dict[str, torch.Tensor]


def made(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A tensor of any bits; a bool of zeros and ones."""
    size = Spec(dtype=dtype, shape=shape).size_bytes
    generator = torch.Generator().manual_seed(seed)
    most = 2 if dtype == "bool" else 256
    raw = torch.randint(most, (size,), dtype=torch.uint8, generator=generator)
    return raw.view(getattr(torch, dtype)).reshape(shape)


@st.composite
def states(draw: st.DrawFn) -> States:
    shapes = st.lists(st.integers(0, 12), max_size=3).map(tuple)
    entries = draw(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=8))
    return {f"t{i}": made(dtype, shape, seed=i) for i, (dtype, shape) in enumerate(entries)}


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Chunks of 64 bytes and objects of 256, so that small tensors are cut."""
    with (
        patch("checkpointing.layout.CHUNK_BYTES", CHUNK),
        patch("checkpointing.digest.CHUNK_BYTES", CHUNK),
        patch("checkpointing.layout.OBJECT_BYTES", OBJECT),
    ):
        yield


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(flat_bytes(tensor).numpy())


def stored(one: ObjectLayout, tensors: States) -> bytes:
    """The object's bytes."""
    parts = (raw(tensors[piece.tensor])[piece.start : piece.stop] for piece in one.pieces)
    return one.header + b"".join(parts)


SIZES = st.integers(1, 9)


@settings(max_examples=150, deadline=None)
@given(tensors=states(), size=SIZES)
def test_every_byte_is_in_one_object_of_one_rank(tensors: States, size: int) -> None:
    specs = specs_of(tensors)
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in tensors}
    for rank in range(size):
        for one in share(specs, rank, size):
            for piece in one.pieces:
                found[piece.tensor].append((piece.start, piece.stop))
    for name, spec in specs.items():
        ends = [0]
        for start, stop in sorted(found[name]):
            assert start == ends[-1]
            assert start % CHUNK == 0
            assert stop % CHUNK == 0 or stop == spec.size_bytes
            ends.append(stop)
        assert ends[-1] == spec.size_bytes
        assert len(ends) > 1, "an empty tensor is stored, too"


@settings(max_examples=150, deadline=None)
@given(tensors=states(), size=SIZES)
def test_shares_are_even_but_for_a_chunk(tensors: States, size: int) -> None:
    specs = specs_of(tensors)
    shares = [
        sum(p.stop - p.start for one in share(specs, rank, size) for p in one.pieces)
        for rank in range(size)
    ]
    even = sum(shares) / size
    assert all(abs(one - even) <= CHUNK for one in shares)


@settings(max_examples=150, deadline=None)
@given(tensors=states(), size=SIZES)
def test_objects_have_a_largest_size(tensors: States, size: int) -> None:
    specs = specs_of(tensors)
    for rank in range(size):
        objects = share(specs, rank, size)
        for one in objects:
            assert one.size_bytes - len(one.header) <= OBJECT
        for one, following in pairwise(objects):
            first = following.pieces[0]
            chunk = min(CHUNK, first.stop - first.start)
            assert one.size_bytes - len(one.header) + chunk > OBJECT, "no smaller than need be"


@settings(max_examples=150, deadline=None)
@given(tensors=states(), size=SIZES)
def test_safetensors_reads_every_object(tensors: States, size: int) -> None:
    specs = specs_of(tensors)
    for rank in range(size):
        for one in share(specs, rank, size):
            data = stored(one, tensors)
            assert len(data) == one.size_bytes
            loaded = safetensors.torch.load(data)
            assert len(loaded) == len(one.pieces)
            for piece in one.pieces:
                spec = specs[piece.tensor]
                if piece.stop - piece.start == spec.size_bytes:
                    expected = tensors[piece.tensor]
                    name = piece.tensor
                else:
                    first, last = piece.start // spec.item_bytes, piece.stop // spec.item_bytes
                    expected = tensors[piece.tensor].reshape(-1)[first:last]
                    name = f"{piece.tensor}[{first}:{last}]"
                assert loaded[name].dtype == expected.dtype
                assert loaded[name].shape == expected.shape
                assert raw(loaded[name]) == raw(expected)


@settings(max_examples=150, deadline=None)
@given(tensors=states(), size=SIZES)
def test_tensors_are_aligned_in_their_objects(tensors: States, size: int) -> None:
    specs = specs_of(tensors)
    for rank in range(size):
        for one in share(specs, rank, size):
            assert len(one.header) % 8 == 0
            for piece, offset in one.offsets():
                assert offset % specs[piece.tensor].item_bytes == 0


@settings(max_examples=150, deadline=None)
@given(tensors=states(), size=SIZES)
def test_the_digest_is_the_same_for_any_number_of_ranks(tensors: States, size: int) -> None:
    specs = specs_of(tensors)
    chunks: dict[str, dict[int, str]] = {name: {} for name in tensors}
    for rank in range(size):
        for one in share(specs, rank, size):
            data = memoryview(stored(one, tensors))
            for piece, offset in one.offsets():
                digests = chunk_digests(data[offset : offset + piece.stop - piece.start])
                found = dict(zip(piece.chunks, digests, strict=True))
                assert not found.keys() & chunks[piece.tensor].keys()
                chunks[piece.tensor].update(found)
    by_rank, whole = (
        {
            name: {"dtype": spec.dtype, "shape": list(spec.shape), "chunks": of[name]}
            for name, spec in specs.items()
        }
        for of in (
            {name: [found[n] for n in sorted(found)] for name, found in chunks.items()},
            {name: chunk_digests(memoryview(raw(t))) for name, t in tensors.items()},
        )
    )
    assert checkpoint_digest(by_rank, {}) == checkpoint_digest(whole, {})
    assert all(len(by_rank[name]["chunks"]) == specs[name].chunks for name in specs)


def test_a_state_without_bytes_is_stored() -> None:
    tensors = {"empty": torch.empty(0, 3), "none": torch.empty(0, dtype=torch.int64)}
    (one,) = [o for rank in range(3) for o in share(specs_of(tensors), rank, 3)]
    loaded = safetensors.torch.load(stored(one, tensors))
    assert {name: t.shape for name, t in loaded.items()} == {
        name: t.shape for name, t in tensors.items()
    }


def test_more_ranks_than_chunks_leave_some_without_objects() -> None:
    specs = specs_of({"a": torch.zeros(3, dtype=torch.uint8)})
    assert [len(share(specs, rank, 4)) for rank in range(4)] == [1, 0, 0, 0]


def test_a_chunk_larger_than_an_object_is_an_object_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layout, "OBJECT_BYTES", 10)
    specs = specs_of({"a": torch.zeros(200, dtype=torch.uint8)})
    objects = share(specs, 0, 1)
    assert [len(one.pieces) for one in objects] == [1, 1, 1, 1]
    assert [one.pieces[0].stop - one.pieces[0].start for one in objects] == [64, 64, 64, 8]


def test_a_name_that_json_must_escape_is_read() -> None:
    tensors = {'a"b\\cé': torch.arange(3.0)}
    (one,) = share(specs_of(tensors), 0, 1)
    assert list(safetensors.torch.load(stored(one, tensors))) == list(tensors)


def test_the_header_follows_from_the_pieces() -> None:
    specs = specs_of({"a": torch.zeros(100), "b": torch.zeros(7, dtype=torch.bool)})
    for one in share(specs, 0, 2) + share(specs, 1, 2):
        assert described(one.pieces, specs) == one


def test_a_dtype_that_cannot_be_stored_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"z is torch\.complex64, which a .* cannot hold"):
        specs_of({"z": torch.zeros(2, dtype=torch.complex64)})
