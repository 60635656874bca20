"""Reads one checkpoint, and believes no byte of it before its digest is checked.

Does not cover: a local disk that answers otherwise when it is read again. What lies whole in a file
is mapped, not copied; where memory is so short that the system drops pages between the check and
their use, they come from the disk a second time.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from checkpointing.digest import CHUNK_BYTES, checkpoint_digest, dtype_named
from checkpointing.group import Group
from checkpointing.history import Checkpoint
from checkpointing.layout import ObjectLayout, Piece, Spec, described
from checkpointing.snapshot import fingerprint, flat_bytes
from checkpointing.write import FORMAT
from storage.canonical import sha256_hex
from storage.errors import ConfigurationError, IntegrityError, StoreUnavailableError
from storage.store import Store

_KEY = re.compile(r"checkpoints/g\d{4,}/s\d{8,}-[0-9a-f]{12}/(r\d{3,}-p\d{2,}\.safetensors)")
_MANIFEST_BYTES = 256 * 2**20
_READS_IN_FLIGHT = 4
_SCRATCH_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A verified checkpoint: CPU tensors by name, and the JSON beside them."""

    checkpoint: Checkpoint
    tensors: dict[str, torch.Tensor]
    exact: dict[str, Any]
    extra: dict[str, Any]
    objects: tuple[ObjectLayout, ...] = ()


def load(
    store: Store,
    checkpoint: Checkpoint,
    *,
    rank: int = 0,
    size: int = 1,
    before_object: Callable[[], None] = lambda: None,
) -> Loaded:
    """The checkpoint, every byte verified.

    What lies whole in a local file is not copied: its tensor is the file, mapped, and what is
    written to it stays in memory. Copy the tensors to where they are used, and let them go.
    With a `size`, only the objects whose number is `rank` modulo `size` are read; the others' bytes
    are not there until `spread` has brought them.
    `before_object` is called before each object is read, by the reading threads; what it raises
    ends the reading.
    Raises IntegrityError when an object is missing, cut, changed or exchanged, naming it, and
    StoreUnavailableError when the store fails.
    """
    manifest = read_manifest(store, checkpoint)
    try:
        specs, layouts = _plan(manifest, checkpoint.manifest_key)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{checkpoint.manifest_key} is no manifest: {error!r}") from error
    tensors = {name: _empty(spec) for name, spec in specs.items()}

    def read(key: str) -> None:
        before_object()
        _read_object(store, key, layouts[key], specs, tensors, manifest["tensors"])

    with ThreadPoolExecutor(_READS_IN_FLIGHT, thread_name_prefix="load") as pool:
        list(pool.map(read, list(layouts)[rank::size]))
    return Loaded(
        checkpoint=checkpoint,
        tensors=tensors,
        exact=manifest["exact"],
        extra=manifest["extra"],
        objects=tuple(layouts.values()),
    )


def spread(loaded: Loaded, group: Group) -> None:
    """Give each process what the others have read, and compare what has arrived.

    Raises StoreUnavailableError when it is not the same everywhere.
    """
    places = {name: flat_bytes(tensor) for name, tensor in loaded.tensors.items()}
    for number, layout in enumerate(loaded.objects):
        for piece in layout.pieces:
            if piece.stop > piece.start:
                place = places[piece.tensor][piece.start : piece.stop]
                group.share(place, number % group.size)
    mine = {name: int(fingerprint(tensor)) for name, tensor in loaded.tensors.items()}
    for rank, theirs in enumerate(group.gather(mine)):
        for name, found in theirs.items():
            if found != mine[name]:
                raise StoreUnavailableError(
                    f"{name} has arrived differently on rank {rank}: the network between the "
                    "processes changes bytes. Start again, or look for the faulty machine"
                )


def read_manifest(store: Store, checkpoint: Checkpoint) -> dict[str, Any]:
    """The manifest of a checkpoint, its bytes and its keys verified. Raises IntegrityError."""
    key = checkpoint.manifest_key
    folder = key.removesuffix("manifest.json")
    if not _KEY.fullmatch(f"{folder}r000-p00.safetensors"):
        raise IntegrityError(f"{key!r} is not the key of a manifest")
    try:
        data = store.get(key, 0, _MANIFEST_BYTES + 1)
    except FileNotFoundError as error:
        raise IntegrityError(f"{key} is missing") from error
    if sha256_hex(data) != checkpoint.manifest_sha256:
        raise IntegrityError(f"{key} is not the manifest that was committed: its sha256 differs")
    try:
        manifest: dict[str, Any] = json.loads(data)
        _check(manifest, checkpoint, folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{key} is no manifest: {error!r}") from error
    return manifest


def _check(manifest: Mapping[str, Any], checkpoint: Checkpoint, folder: str) -> None:
    key = checkpoint.manifest_key
    if manifest["format"] != FORMAT:
        raise ConfigurationError(
            f"{key} has format {manifest['format']}, expected {FORMAT}: use the version of "
            "RangeFlow that wrote it, or start anew with --run"
        )
    for name in manifest["objects"]:
        if not name.startswith(folder) or not _KEY.fullmatch(name):
            raise IntegrityError(f"{key} names {name!r}, which is not an object of its checkpoint")
    if checkpoint_digest(manifest["tensors"], manifest["exact"]) != checkpoint.digest:
        raise IntegrityError(f"{key} does not have the digest of its COMMIT")


def _plan(manifest: Mapping[str, Any], key: str) -> tuple[dict[str, Spec], dict[str, ObjectLayout]]:
    """The tensors, and the objects that hold every byte of each of them exactly once."""
    specs: dict[str, Spec] = {}
    for name, entry in manifest["tensors"].items():
        if dtype_named(entry["dtype"]) is None:
            raise IntegrityError(f"{name} is {entry['dtype']}, which no checkpoint holds")
        if not all(type(length) is int and length >= 0 for length in entry["shape"]):
            raise IntegrityError(f"{name} is said to have the shape {entry['shape']}")
        specs[name] = Spec(dtype=entry["dtype"], shape=tuple(entry["shape"]))
        if len(entry["chunks"]) != specs[name].chunks:
            raise IntegrityError(f"{key} does not have a digest for every chunk of {name}")
    layouts: dict[str, ObjectLayout] = {}
    stored: dict[str, list[Piece]] = {name: [] for name in specs}
    for object_key, entry in manifest["objects"].items():
        pieces = [Piece(tensor=t, start=start, stop=stop) for t, start, stop in entry["pieces"]]
        for piece in pieces:
            if piece.tensor not in specs:
                raise IntegrityError(f"{object_key} holds {piece.tensor!r}, which is no tensor")
            stored[piece.tensor].append(piece)
        layouts[object_key] = described(pieces, specs)
        if layouts[object_key].size_bytes != entry["size_bytes"]:
            raise IntegrityError(f"{object_key} is said to have {entry['size_bytes']} bytes")
    for name, found in stored.items():
        end = 0
        for piece in sorted(found, key=lambda piece: piece.start):
            fits = piece.start == end and piece.start % CHUNK_BYTES == 0
            end = piece.stop if fits else -1
        if end != specs[name].size_bytes or not found:
            raise IntegrityError(f"{key} does not store every byte of {name} exactly once")
    return specs, layouts


def _empty(spec: Spec) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=dtype_named(spec.dtype))


def _tensor(spec: Spec, data: memoryview) -> torch.Tensor:
    """The tensor that these bytes are, not a copy."""
    dtype = dtype_named(spec.dtype)
    assert dtype is not None, "specs have dtypes that a checkpoint may hold"
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(spec.shape)


def _read_object(
    store: Store,
    key: str,
    layout: ObjectLayout,
    specs: Mapping[str, Spec],
    tensors: dict[str, torch.Tensor],
    table: Mapping[str, Mapping[str, Any]],
) -> None:
    """Read an object, verify its header and every chunk, and put its pieces where they belong."""
    with _opened(store, key, layout.size_bytes) as source:
        header = memoryview(bytearray(len(layout.header)))
        source.fill(header)
        if header != layout.header:
            raise IntegrityError(f"{key} is damaged: its header is not that of its manifest")
        for piece, offset in layout.offsets():
            spec = specs[piece.tensor]
            mapped = source.mapped is not None and 0 < spec.size_bytes == piece.stop - piece.start
            if mapped:
                assert source.mapped is not None, "as just seen"
                whole = source.mapped[offset : offset + spec.size_bytes]
                tensors[piece.tensor] = _tensor(spec, whole)
            place = memoryview(flat_bytes(tensors[piece.tensor]).numpy())  # type: ignore[arg-type]
            for number in piece.chunks:
                start = number * CHUNK_BYTES
                chunk = place[start : min(start + CHUNK_BYTES, piece.stop)]
                found = source.sha256(len(chunk)) if mapped else source.fill(chunk)
                if found != table[piece.tensor]["chunks"][number]:
                    raise IntegrityError(
                        f"{key} is damaged: bytes {start} and following of {piece.tensor} do not "
                        "have their sha256"
                    )


def _mapped(path: Path, size_bytes: int) -> memoryview:
    """A file as memory: what is written there stays there. Python's mmap would keep it open too."""
    flat = torch.from_file(str(path), shared=False, size=size_bytes, dtype=torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


class _Source:
    """The bytes of an object from its first to its last, and the memory that they are mapped to."""

    def __init__(self, key: str, file: BinaryIO, mapped: memoryview | None) -> None:
        self._key = key
        self._file = file
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self.mapped = mapped

    def fill(self, place: memoryview) -> str:
        """Put the next bytes there; their sha256."""
        rest = place
        while rest:
            rest = rest[self._read(rest) :]
        return sha256_hex(place)

    def sha256(self, size: int) -> str:
        """The sha256 of the next bytes, which stay where they are mapped."""
        digest = hashlib.sha256()
        while size:
            read = self._read(self._scratch[:size])
            digest.update(self._scratch[:read])
            size -= read
        return digest.hexdigest()

    def _read(self, place: memoryview) -> int:
        read = self._file.readinto(place)  # type: ignore[attr-defined]
        if not read:
            raise IntegrityError(f"{self._key} ends too early")
        return int(read)


@contextmanager
def _opened(store: Store, key: str, size_bytes: int) -> Iterator[_Source]:
    """The object, if it has the size that it should have."""
    path = store.local_path(key)
    try:
        with (
            open(path, "rb", buffering=0)
            if path is not None
            else io.BytesIO(store.get(key, 0, size_bytes + 1))
        ) as file:
            found = file.seek(0, os.SEEK_END)
            file.seek(0)
            if found != size_bytes:
                raise IntegrityError(f"{key} has {found} bytes, expected {size_bytes}")
            mapped = None
            if path is not None:
                with suppress(RuntimeError):  # some file systems map no files
                    mapped = _mapped(path, size_bytes)
            yield _Source(key, file, mapped)
    except FileNotFoundError as error:
        raise IntegrityError(f"{key} is missing") from error
    except OSError as error:
        raise StoreUnavailableError(f"{store.url}: {key}: {error.strerror}") from error
