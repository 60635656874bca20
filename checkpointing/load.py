"""Reads one checkpoint, and believes no byte of it before its digest is checked."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch

from checkpointing.digest import checkpoint_digest, chunk_digests, dtype_named
from checkpointing.history import Checkpoint
from checkpointing.save import FORMAT
from storage.canonical import sha256_hex
from storage.errors import IntegrityError
from storage.store import Store

_KEY = re.compile(r"checkpoints/g\d{4,}/s\d{8,}-[0-9a-f]{12}/(r\d{3,}-p\d{2,}\.safetensors)")
_MANIFEST_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A verified checkpoint: tensors in CPU memory by name, and the JSON beside them."""

    checkpoint: Checkpoint
    tensors: dict[str, torch.Tensor]
    exact: dict[str, Any]
    extra: dict[str, Any]


def load(store: Store, checkpoint: Checkpoint) -> Loaded:
    """The checkpoint, every byte verified.

    Raises IntegrityError when an object is missing, cut, changed or exchanged, naming it, and
    StoreUnavailableError when the store fails.
    """
    manifest = read_manifest(store, checkpoint)
    tensors: dict[str, torch.Tensor] = {}
    for key, entry in manifest["objects"].items():
        tensors |= _read_object(store, key, entry)
    _compare(tensors, manifest["tensors"])
    if checkpoint_digest(manifest["tensors"], manifest["exact"]) != checkpoint.digest:
        raise IntegrityError(f"{checkpoint.manifest_key} does not have the digest of its COMMIT")
    return Loaded(
        checkpoint=checkpoint,
        tensors=tensors,
        exact=manifest["exact"],
        extra=manifest["extra"],
    )


def read_manifest(store: Store, checkpoint: Checkpoint) -> dict[str, Any]:
    """The manifest of a checkpoint, its bytes and its keys verified. Raises IntegrityError."""
    key = checkpoint.manifest_key
    folder = key.removesuffix("manifest.json")
    if not _KEY.fullmatch(f"{folder}r000-p00.safetensors"):
        raise IntegrityError(f"{key!r} is not the key of a manifest")
    data = _read(store, key, _MANIFEST_BYTES)
    if sha256_hex(data) != checkpoint.manifest_sha256:
        raise IntegrityError(f"{key} is not the manifest that was committed: its sha256 differs")
    manifest: dict[str, Any] = json.loads(data)
    if manifest["format"] != FORMAT:
        raise IntegrityError(f"{key} has format {manifest['format']}, expected {FORMAT}")
    for name in manifest["objects"]:
        if not name.startswith(folder) or not _KEY.fullmatch(name):
            raise IntegrityError(f"{key} names {name!r}, which is not an object of its checkpoint")
    return manifest


def _read_object(store: Store, key: str, entry: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    data = _read(store, key, entry["size_bytes"])
    if len(data) != entry["size_bytes"]:
        raise IntegrityError(f"{key} has {len(data)} bytes, expected {entry['size_bytes']}")
    if sha256_hex(data) != entry["sha256"]:
        raise IntegrityError(f"{key} is damaged: its sha256 is not that of its manifest")
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise IntegrityError(f"{key} is not a safetensors object: {error}") from error


def _read(store: Store, key: str, most_bytes: int) -> bytes:
    try:
        return store.get(key, 0, most_bytes + 1)
    except FileNotFoundError as error:
        raise IntegrityError(f"{key} is missing") from error


def _compare(tensors: Mapping[str, torch.Tensor], table: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise IntegrityError unless the tensors are those of the manifest's table, chunk by chunk."""
    if tensors.keys() != table.keys():
        names = ", ".join(sorted(tensors.keys() ^ table.keys())[:5])
        raise IntegrityError(f"objects and manifest do not name the same tensors: {names}")
    for name, tensor in tensors.items():
        entry = table[name]
        same_kind = tensor.dtype == dtype_named(entry["dtype"])
        if not same_kind or list(tensor.shape) != entry["shape"]:
            raise IntegrityError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, "
                f"expected {entry['dtype']} {entry['shape']}"
            )
        if chunk_digests(tensor) != entry["chunks"]:
            raise IntegrityError(f"{name} does not have the content of its manifest")
