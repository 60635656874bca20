"""Loading believes nothing: every byte and every name is checked before it is used."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpointing.group import Solo
from checkpointing.history import Checkpoint
from checkpointing.load import load, read_manifest
from checkpointing.save import save
from storage.canonical import canonical_json, sha256_hex
from storage.errors import IntegrityError
from storage.store import LocalStore
from tests.test_save import claimed, state


@pytest.fixture
def saved(tmp_path: Path) -> tuple[LocalStore, Checkpoint]:
    store = LocalStore(tmp_path)
    checkpoint = save(store, claimed(store), Solo(), state(), step=0, parent=None)
    assert checkpoint is not None
    return store, checkpoint


def rewritten(
    saved: tuple[LocalStore, Checkpoint], change: Callable[[dict[str, Any]], None]
) -> tuple[LocalStore, Checkpoint]:
    """The checkpoint with a changed manifest whose sha256 is right, as a liar would make it."""
    store, checkpoint = saved
    manifest = json.loads(store.get(checkpoint.manifest_key))
    change(manifest)
    data = canonical_json(manifest)
    store.put(checkpoint.manifest_key, data)
    return store, replace(checkpoint, manifest_sha256=sha256_hex(data))


PLACES = {"start": 0, "middle": 0.5, "end": 1}


@pytest.mark.parametrize("kind", ["safetensors", "manifest.json"])
@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_bit_anywhere_is_found(
    kind: str, place: str, saved: tuple[LocalStore, Checkpoint]
) -> None:
    store, checkpoint = saved
    (key,) = [key for key in store.list("checkpoints/") if key.endswith(kind)]
    data = bytearray(store.get(key))
    data[int(PLACES[place] * (len(data) - 1))] ^= 0x10
    store.put(key, bytes(data))
    with pytest.raises(IntegrityError, match=r"is damaged|is not the manifest"):
        load(store, checkpoint)


@pytest.mark.parametrize("cut", [1, 100])
def test_a_cut_object_is_found(cut: int, saved: tuple[LocalStore, Checkpoint]) -> None:
    store, checkpoint = saved
    (key,) = [key for key in store.list("checkpoints/") if key.endswith("safetensors")]
    store.put(key, store.get(key)[:-cut])
    with pytest.raises(IntegrityError, match=r"has \d+ bytes, expected \d+"):
        load(store, checkpoint)
    store.put(key, b"")
    with pytest.raises(IntegrityError, match="has 0 bytes"):
        load(store, checkpoint)


def test_a_missing_object_is_named(saved: tuple[LocalStore, Checkpoint]) -> None:
    store, checkpoint = saved
    (key,) = [key for key in store.list("checkpoints/") if key.endswith("safetensors")]
    store.delete(key)
    with pytest.raises(IntegrityError, match=f"{key} is missing"):
        load(store, checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../../secret",
        "checkpoints/g0001/s00000000-000000000000/r000-p00.safetensors",
        "run.json",
    ],
)
def test_a_manifest_cannot_name_what_is_not_its_own(
    name: str, saved: tuple[LocalStore, Checkpoint]
) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["objects"][name] = {"size_bytes": 1, "sha256": ""}

    store, checkpoint = rewritten(saved, change)
    with pytest.raises(IntegrityError, match="which is not an object of its checkpoint"):
        load(store, checkpoint)


def test_a_manifest_key_is_checked_before_it_is_read(
    saved: tuple[LocalStore, Checkpoint],
) -> None:
    store, checkpoint = saved
    for key in ("run.json", "../run.json", "checkpoints/g0001/manifest.json"):
        with pytest.raises(IntegrityError, match="is not the key of a manifest"):
            read_manifest(store, replace(checkpoint, manifest_key=key))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["tensors"]["w"].update(shape=[5, 7]), r"w is .*, expected float32 \[5, 7\]"),
        (lambda m: m["tensors"]["w"].update(dtype="int32"), "expected int32"),
        (lambda m: m["tensors"]["w"].update(dtype="complex64"), "expected complex64"),
        (lambda m: m["tensors"]["w"].update(chunks=["0"]), "does not have the content"),
        (lambda m: m["tensors"].pop("w"), "do not name the same tensors: w"),
        (lambda m: m["exact"].update(step=9), "does not have the digest of its COMMIT"),
        (lambda m: m.update(format=99), "has format 99, expected 1"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], None],
    message: str,
    saved: tuple[LocalStore, Checkpoint],
) -> None:
    store, checkpoint = rewritten(saved, change)
    with pytest.raises(IntegrityError, match=message):
        load(store, checkpoint)
