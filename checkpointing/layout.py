"""Which bytes of the training state each process stores, in which objects: pure functions.

The state is one line of bytes: its tensors by item size (largest first) and name, cut into chunks
of 16 MiB. Each of N processes stores one stretch of whole chunks, about 1/N of the bytes, in
objects of at most 64 MiB. A tensor that does not lie in one object is stored in pieces.

An object is a safetensors file; a whole tensor keeps its name and shape there, a piece is flat and
named `tensor[start:stop]` in elements. Its header follows from its pieces, so that a reader knows
every byte of it.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from checkpointing.digest import CHUNK_BYTES, dtype_named
from storage.errors import ConfigurationError

OBJECT_BYTES = 64 * 2**20
"""Four chunks. Of S3's clients, s3fs uploads up to 100 MiB in one part, whose ETag is an md5."""

_ALIGNMENT = 64

_SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""https://huggingface.co/docs/safetensors: names of dtypes in a header."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """dtype and shape of a tensor, as a manifest has them."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        dtype = dtype_named(self.dtype)
        assert dtype is not None, "specs have dtypes that a checkpoint may hold"
        return dtype.itemsize

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.item_bytes

    @property
    def chunks(self) -> int:
        """How many chunks it has; an empty tensor has one."""
        return max(1, -(-self.size_bytes // CHUNK_BYTES))


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Bytes [start, stop) of a tensor. `start` is on a chunk's boundary, `stop` too or the end."""

    tensor: str
    start: int
    stop: int

    @property
    def chunks(self) -> range:
        """The numbers of its chunks."""
        first = self.start // CHUNK_BYTES
        return range(first, max(first + 1, -(-self.stop // CHUNK_BYTES)))


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectLayout:
    """One object: a header, and pieces one after the other."""

    header: bytes
    pieces: tuple[Piece, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the object, its header among them."""
        return len(self.header) + sum(piece.stop - piece.start for piece in self.pieces)

    def offsets(self) -> Iterator[tuple[Piece, int]]:
        """Each piece, and where in the object it begins."""
        offset = len(self.header)
        for piece in self.pieces:
            yield piece, offset
            offset += piece.stop - piece.start


def specs_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Spec]:
    """The specs of a state. Raises ConfigurationError for a dtype that cannot be stored."""
    specs = {}
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _SAFETENSORS_DTYPES:
            raise ConfigurationError(
                f"{name} is {tensor.dtype}, which a checkpoint cannot hold; expected one of "
                f"{', '.join(_SAFETENSORS_DTYPES)}"
            )
        specs[name] = Spec(dtype=dtype, shape=tuple(tensor.shape))
    return specs


def share(specs: Mapping[str, Spec], rank: int, size: int) -> list[ObjectLayout]:
    """The objects of one of `size` processes."""
    total = sum(spec.size_bytes for spec in specs.values())
    objects: list[ObjectLayout] = []
    pieces: list[Piece] = []
    filled = 0
    position = 0
    for chunk in _line(specs):
        length = chunk.stop - chunk.start
        owner = min(size - 1, position * size // max(1, total))
        position += length
        if owner != rank:
            continue
        if pieces and filled + length > OBJECT_BYTES:
            objects.append(described(pieces, specs))
            pieces, filled = [], 0
        if pieces and pieces[-1].tensor == chunk.tensor:
            pieces[-1] = Piece(tensor=chunk.tensor, start=pieces[-1].start, stop=chunk.stop)
        else:
            pieces.append(chunk)
        filled += length
    if pieces:
        objects.append(described(pieces, specs))
    return objects


def described(pieces: Sequence[Piece], specs: Mapping[str, Spec]) -> ObjectLayout:
    """The object that holds these pieces, with its header."""
    entries: dict[str, dict[str, object]] = {}
    offset = 0
    for piece in pieces:
        spec = specs[piece.tensor]
        end = offset + piece.stop - piece.start
        first, last = piece.start // spec.item_bytes, piece.stop // spec.item_bytes
        whole = piece.stop - piece.start == spec.size_bytes
        name = piece.tensor if whole else f"{piece.tensor}[{first}:{last}]"
        entries[name] = {
            "dtype": _SAFETENSORS_DTYPES[spec.dtype],
            "shape": list(spec.shape) if whole else [last - first],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return ObjectLayout(header=len(text).to_bytes(8, "little") + text, pieces=tuple(pieces))


def _line(specs: Mapping[str, Spec]) -> Iterator[Piece]:
    """Every chunk of the state, in order."""
    for name in sorted(specs, key=lambda name: (-specs[name].item_bytes, name)):
        size = specs[name].size_bytes
        for start in range(0, max(1, size), CHUNK_BYTES):
            yield Piece(tensor=name, start=start, stop=min(size, start + CHUNK_BYTES))
