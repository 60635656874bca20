"""Loading believes nothing: every byte and every name is checked before it is used."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing.digest import checkpoint_digest
from checkpointing.group import Solo
from checkpointing.history import Checkpoint
from checkpointing.layout import Piece, Spec, described
from checkpointing.load import load, read_manifest
from checkpointing.save import save
from storage.canonical import canonical_json, sha256_hex
from storage.errors import ConfigurationError, IntegrityError, StoreUnavailableError
from storage.store import LocalStore
from tests.test_save import claimed, save_on, state


def rewritten(
    saved: tuple[LocalStore, Checkpoint], change: Callable[[dict[str, Any]], None]
) -> tuple[LocalStore, Checkpoint]:
    """The checkpoint with a changed manifest whose sha256 is right, as a liar would make it."""
    store, checkpoint = saved
    manifest = json.loads(store.get(checkpoint.manifest_key))
    change(manifest)
    data = canonical_json(manifest)
    store.put(checkpoint.manifest_key, data)
    digest = checkpoint_digest(manifest["tensors"], state().exact)
    return store, replace(checkpoint, manifest_sha256=sha256_hex(data), digest=digest)


class Remote(LocalStore):
    """A store whose objects are not files of this machine."""

    def local_path(self, key: str) -> None:
        return None


@pytest.fixture(params=[LocalStore, Remote])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[LocalStore, Checkpoint]:
    store: LocalStore = request.param(tmp_path)
    checkpoint = save(store, claimed(store), Solo(), state(), step=0, parent=None)
    assert checkpoint is not None
    return store, checkpoint


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
        manifest["objects"][name] = {"size_bytes": 1, "pieces": []}

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
        (lambda m: m["tensors"]["w"].update(shape=[5, 7]), "its header is not that of its manif"),
        (lambda m: m["tensors"]["w"].update(dtype="int32"), "its header is not that of its manif"),
        (lambda m: m["tensors"]["w"].update(dtype="float64"), "does not store every byte of w"),
        (
            lambda m: next(iter(m["objects"].values())).update(size_bytes=5),
            "is said to have 5 bytes",
        ),
        (
            lambda m: m["tensors"]["w"].update(dtype="complex64"),
            "w is complex64, which no checkpoint holds",
        ),
        (
            lambda m: m["tensors"]["w"].update(chunks=["0"]),
            "bytes 0 and following of w do not have their sha256",
        ),
        (lambda m: m["tensors"]["w"].update(chunks=[]), "not have a digest for every chunk of w"),
        (lambda m: m["tensors"].pop("w"), "holds 'w', which is no tensor"),
        (lambda m: m["objects"].clear(), "does not store every byte of .* exactly once"),
        (lambda m: m["exact"].update(step=9), "does not have the digest of its COMMIT"),
        (lambda m: m["tensors"]["w"].update(shape=[-5, -7]), "is said to have the shape"),
        (lambda m: m["tensors"]["w"].update(shape=["a"]), "is said to have the shape"),
        (lambda m: m["tensors"]["w"].update(shape=None), "is no manifest: TypeError"),
        (lambda m: m.pop("objects"), "is no manifest: KeyError"),
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


@pytest.mark.parametrize("found", [1, 99])
def test_another_format_is_no_damage(found: int, saved: tuple[LocalStore, Checkpoint]) -> None:
    """A run of another version is refused, and none of its checkpoints quarantined."""
    store, checkpoint = rewritten(saved, lambda m: m.update(format=found))
    with pytest.raises(ConfigurationError, match=f"has format {found}, expected 2: use the versio"):
        load(store, checkpoint)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("digest", "layout", "load"):
        monkeypatch.setattr(f"checkpointing.{module}.CHUNK_BYTES", 1024)
    monkeypatch.setattr("checkpointing.layout.OBJECT_BYTES", 4096)


def test_a_checkpoint_of_many_pieces_is_loaded_bit_for_bit(
    small_chunks: None, saved: tuple[LocalStore, Checkpoint]
) -> None:
    store, checkpoint = saved
    loaded = load(store, checkpoint).tensors
    assert len(read_manifest(store, checkpoint)["objects"]) == 4
    assert loaded.keys() == state().tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state().tensors.items())


@pytest.mark.parametrize(
    "pieces",
    [
        [(0, 4096), (8192, 12000)],
        [(0, 4096), (3072, 12000)],
        [(0, 4096), (4096, 8192)],
        [(1024, 12000)],
        [(0, 1000), (1000, 12000)],
        [(0, 12000), (0, 12000)],
        [(0, 12000), (0, 1024)],
        [(0, 12000), (4096, 8192)],
        [(0, 16384)],
        [],
    ],
)
def test_pieces_that_overlap_or_leave_a_gap_are_refused(
    pieces: list[tuple[int, int]], small_chunks: None, saved: tuple[LocalStore, Checkpoint]
) -> None:
    """`big` has 12,000 bytes."""

    def change(manifest: dict[str, Any]) -> None:
        specs = {
            name: Spec(dtype=entry["dtype"], shape=tuple(entry["shape"]))
            for name, entry in manifest["tensors"].items()
        }
        instead = [["big", start, stop] for start, stop in pieces]
        for entry in manifest["objects"].values():
            entry["pieces"] = instead + [p for p in entry["pieces"] if p[0] != "big"]
            instead = []
            layout = [Piece(tensor=t, start=start, stop=stop) for t, start, stop in entry["pieces"]]
            entry["size_bytes"] = described(layout, specs).size_bytes

    store, checkpoint = rewritten(saved, change)
    with pytest.raises(IntegrityError, match="does not store every byte of big exactly once"):
        load(store, checkpoint)


def objects_of(store: LocalStore, checkpoint: Checkpoint) -> list[str]:
    folder = checkpoint.manifest_key.removesuffix("manifest.json")
    return [key for key in store.list(folder) if key.endswith("safetensors")]


def test_objects_exchanged_within_a_checkpoint_are_found(
    small_chunks: None, saved: tuple[LocalStore, Checkpoint]
) -> None:
    store, checkpoint = saved
    _, first, second, _ = objects_of(store, checkpoint)
    one, two = store.get(first), store.get(second)
    assert len(one) == len(two), "not found by their sizes alone"
    store.put(first, two)
    store.put(second, one)
    with pytest.raises(IntegrityError, match="is damaged: its header is not that of its manifest"):
        load(store, checkpoint)


@pytest.mark.parametrize("size", [1, 2])
def test_an_object_of_another_checkpoint_is_found(size: int, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    owner = claimed(store)
    one, two = (save_on(size, store, owner, seed)[0] for seed in (1, 2))
    key, other = objects_of(store, one)[-1], objects_of(store, two)[-1]
    assert len(store.get(key)) == len(store.get(other))
    store.put(key, store.get(other))
    with pytest.raises(IntegrityError, match=f"{key} is damaged: bytes 0 and following of"):
        load(store, one)


def test_an_object_with_a_header_of_its_own_is_found(
    saved: tuple[LocalStore, Checkpoint],
) -> None:
    """A header that means the same, but was not written by us."""
    store, checkpoint = saved
    (key,) = objects_of(store, checkpoint)
    data = store.get(key)
    length = 8 + int.from_bytes(data[:8], "little")
    header = data[8:length].replace(b"} ", b" }", 1)
    assert header != data[8:length] and json.loads(header) == json.loads(data[8:length])
    store.put(key, data[:8] + header + data[length:])
    with pytest.raises(IntegrityError, match="its header is not that of its manifest"):
        load(store, checkpoint)


def test_a_disk_that_fails_is_no_damage(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    checkpoint = save(store, claimed(store), Solo(), state(), step=0)
    assert checkpoint is not None
    (key,) = objects_of(store, checkpoint)
    path = tmp_path / key
    path.unlink()
    path.symlink_to(path.name)  # cannot be opened: ELOOP
    with pytest.raises(StoreUnavailableError, match="Too many levels of symbolic links"):
        load(store, checkpoint)


def test_what_is_written_to_a_loaded_tensor_stays_in_memory(
    saved: tuple[LocalStore, Checkpoint],
) -> None:
    store, checkpoint = saved
    for tensor in load(store, checkpoint).tensors.values():
        tensor.fill_(1)
    again = load(store, checkpoint).tensors
    assert all(torch.equal(again[name], tensor) for name, tensor in state().tensors.items())


def test_loaded_tensors_outlive_their_objects(saved: tuple[LocalStore, Checkpoint]) -> None:
    """Retention may delete a checkpoint while somebody still copies from it."""
    store, checkpoint = saved
    loaded = load(store, checkpoint).tensors
    for key in objects_of(store, checkpoint):
        store.delete(key)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state().tensors.items())


def test_what_lies_whole_in_a_local_file_is_mapped_and_keeps_no_file_open(
    saved: tuple[LocalStore, Checkpoint],
) -> None:
    store, checkpoint = saved
    before = len(os.listdir("/proc/self/fd"))
    loaded = load(store, checkpoint)
    path = store.local_path(objects_of(store, checkpoint)[0])
    assert (str(path) in Path("/proc/self/maps").read_text()) == (path is not None)
    assert len(os.listdir("/proc/self/fd")) == before
    del loaded
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_chunk_is_verified_over_several_reads(
    saved: tuple[LocalStore, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("checkpointing.load._SCRATCH_BYTES", 100)
    loaded = load(*saved).tensors
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state().tensors.items())


def test_a_file_system_that_maps_no_files_is_read(
    saved: tuple[LocalStore, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 4096 bytes from file: No such device (19)")

    monkeypatch.setattr("checkpointing.load.torch.from_file", refuse)
    loaded = load(*saved).tensors
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state().tensors.items())
