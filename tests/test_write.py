"""A write is tried until it is committed, once; what is not whole or not equal never is."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing.group import Group, Solo
from checkpointing.history import Checkpoint, history
from checkpointing.incarnation import Incarnation
from checkpointing.layout import share, specs_of
from checkpointing.load import load
from checkpointing.save import TrainingState
from checkpointing.snapshot import Arena, Snapshot
from checkpointing.write import Around, Job, write
from storage.errors import (
    ConfigurationError,
    DivergenceError,
    FencedError,
    StoreUnavailableError,
)
from storage.log import Log
from storage.store import LocalStore, ObjectInfo
from tests.groups import on_ranks
from tests.test_save import claimed, state

STEP = 4
OBJECT_BYTES = 4096


@pytest.fixture(autouse=True)
def small_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("digest", "layout", "load"):
        monkeypatch.setattr(f"checkpointing.{module}.CHUNK_BYTES", 1024)
    monkeypatch.setattr("checkpointing.layout.OBJECT_BYTES", OBJECT_BYTES)
    monkeypatch.setattr("checkpointing.write.PATIENCE_SECONDS", (0.0,))


@pytest.fixture
def copier() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def job(group: Group, training: TrainingState, copier: ThreadPoolExecutor, step: int = STEP) -> Job:
    specs = specs_of(training.tensors)
    arena = Arena(share(specs, group.rank, group.size), pinned=False)
    return Job(
        step=step,
        snapshot=Snapshot(arena, training.tensors, copier, compare=group.size > 1),
        specs=specs,
        exact=training.exact,
        extra=training.extra,
        parent=None,
        healthy=True,
        validation_loss=None,
    )


class Writing:
    """What rank 0 of a write is told, and when it is to give up."""

    def __init__(self, *, patience: int = 10) -> None:
        self.reasons: list[str] = []
        self.phases: list[str] = []
        self._patience = patience
        self._give_up = threading.Event()

    def around(self) -> Around:
        return Around(
            announce=self.phases.append,
            before_commit=lambda: self.phases.append("before_commit"),
            failing=self._failing,
            give_up=self._give_up,
        )

    def _failing(self, reason: str) -> None:
        self.reasons.append(reason)
        if len(self.reasons) == self._patience:
            self._give_up.set()


def written(
    store: LocalStore,
    owner: Incarnation,
    copier: ThreadPoolExecutor,
    size: int = 1,
    *,
    states: Callable[[int], TrainingState] = lambda rank: state(),
    steps: Callable[[int], int] = lambda rank: STEP,
    writing: Writing | None = None,
) -> list[Any]:
    """What `write` returned or raised on each rank."""
    told = writing or Writing()

    def one(group: Group) -> int | None:
        first = group.rank == 0
        mine = job(group, states(group.rank), copier, steps(group.rank))
        around = told.around() if first else Writing().around()
        return write(store, owner if first else None, group, mine, around)

    return on_ranks(size, one)


def committed(store: LocalStore) -> list[Checkpoint]:
    return list(history(Log(store).refresh()).checkpoints)


def kinds(store: LocalStore) -> list[str]:
    return [record.kind for record in Log(store).refresh()]


def whole(store: LocalStore) -> bool:
    """Whether the one checkpoint is loaded bit for bit."""
    (checkpoint,) = committed(store)
    tensors = load(store, checkpoint).tensors
    return all(torch.equal(tensors[name], tensor) for name, tensor in state().tensors.items())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_commit_is_known_on_every_rank(
    size: int, tmp_path: Path, copier: ThreadPoolExecutor
) -> None:
    store = LocalStore(tmp_path)
    results = written(store, claimed(store), copier, size)
    (checkpoint,) = committed(store)
    assert results == [checkpoint.index] * size
    assert whole(store)


def test_phases_come_in_order(tmp_path: Path, copier: ThreadPoolExecutor) -> None:
    store, writing = LocalStore(tmp_path), Writing()
    written(store, claimed(store), copier, writing=writing)
    assert list(dict.fromkeys(writing.phases)) == [
        "save:begin",
        "save:object",
        "save:uploaded",
        "before_commit",
        "save:manifest",
        "save:committed",
    ]
    assert writing.phases.count("save:object") == 4
    assert writing.reasons == []


class Failing(LocalStore):
    """Fails the next `times` requests of a method on keys that contain a text."""

    def __init__(self, root: Path, method: str, text: str) -> None:
        super().__init__(root)
        self.times = 0
        self.puts: list[str] = []
        self._method, self._text = method, text

    def _maybe(self, method: str, key: str) -> None:
        if self.times and method == self._method and self._text in key:
            self.times -= 1
            raise StoreUnavailableError(f"{key}: no answer")

    def put(self, key: str, data: bytes | memoryview) -> None:
        self._maybe("put", key)
        self.puts.append(key)
        super().put(key, data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._maybe("put_if_absent", key)
        return super().put_if_absent(key, data)

    def stat(self, key: str) -> ObjectInfo:
        self._maybe("stat", key)
        return super().stat(key)

    def list(self, prefix: str, start_after: str = "") -> list[str]:
        self._maybe("list", prefix)
        return super().list(prefix, start_after)

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self._maybe("get", key)
        return super().get(key, start, end)


FAILURES = [
    ("put", "r000-p00"),
    ("put", "r001"),
    ("put", "manifest"),
    ("stat", "r001"),
    ("list", "checkpoints/"),
    ("get", "log/"),
    ("put_if_absent", "log/"),
]


@pytest.mark.parametrize(("method", "text"), FAILURES)
def test_a_store_that_fails_for_a_while_is_tried_again_until_it_is_committed_once(
    method: str, text: str, tmp_path: Path, copier: ThreadPoolExecutor
) -> None:
    store, writing = Failing(tmp_path, method, text), Writing()
    owner = claimed(store)
    store.times = 3
    results = written(store, owner, copier, 2, writing=writing)
    assert store.times == 0
    (checkpoint,) = committed(store)
    assert results == [checkpoint.index] * 2
    assert whole(store)
    assert writing.reasons and all("no answer" in r or "log" in r for r in writing.reasons)
    attempts = {key.split("/")[2] for key in LocalStore.list(store, "checkpoints/")}
    assert len(attempts) == 1, "the same save goes on"


def test_what_is_uploaded_is_not_uploaded_again(tmp_path: Path, copier: ThreadPoolExecutor) -> None:
    store, writing = Failing(tmp_path, "put", "p02"), Writing()
    owner = claimed(store)
    store.times = 2
    written(store, owner, copier, writing=writing)
    objects = [key for key in store.puts if key.endswith("safetensors")]
    assert len(objects) == len(set(objects)) == 4
    assert len(writing.reasons) == 2
    assert whole(store)


@pytest.mark.parametrize(("method", "text"), FAILURES)
def test_a_store_that_fails_for_good_is_given_up_on_every_rank(
    method: str, text: str, tmp_path: Path, copier: ThreadPoolExecutor
) -> None:
    store, writing = Failing(tmp_path, method, text), Writing(patience=3)
    owner = claimed(store)
    store.times = 10**9
    assert written(store, owner, copier, 3, writing=writing) == [None] * 3
    store.times = 0
    assert len(writing.reasons) == 3
    assert committed(store) == []
    assert "save:committed" not in writing.phases


def test_what_cannot_help_is_not_tried_again(tmp_path: Path, copier: ThreadPoolExecutor) -> None:
    class Impossible(LocalStore):
        def put(self, key: str, data: bytes | memoryview) -> None:
            raise ConfigurationError(f"{self.url} cannot hold objects")

    store, writing = Impossible(tmp_path), Writing()
    assert written(store, claimed(store), copier, 2, writing=writing) == [None, None]
    assert writing.reasons == [f"rank 0: {store.url} cannot hold objects"]


class LosesAnswers(LocalStore):
    """The first answer to a COMMIT is lost; then `unreadable` readings of the log fail."""

    def __init__(self, root: Path, unreadable: int) -> None:
        super().__init__(root)
        self.answers_lost = 0
        self.unreadable = unreadable

    def put_if_absent(self, key: str, data: bytes) -> bool:
        created = super().put_if_absent(key, data)
        if b'"COMMIT"' in data and not self.answers_lost:
            self.answers_lost += 1
            raise StoreUnavailableError(f"{key}: no answer")
        return created

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        if self.answers_lost and self.unreadable and key.startswith("log/"):
            self.unreadable -= 1
            raise StoreUnavailableError(f"{key}: no answer")
        return super().get(key, start, end)


@pytest.mark.parametrize("unreadable", [0, 1, 3])
def test_a_lost_answer_of_the_commit_commits_once(
    unreadable: int, tmp_path: Path, copier: ThreadPoolExecutor
) -> None:
    """The record is there; where it cannot be read back, the write is tried again, and finds it."""
    store, writing = LosesAnswers(tmp_path, unreadable), Writing()
    (index,) = written(store, claimed(store), copier, writing=writing)
    assert (store.answers_lost, store.unreadable) == (1, 0)
    assert len(writing.reasons) == unreadable
    assert kinds(store) == ["CLAIM", "COMMIT"]
    assert committed(store)[0].index == index
    assert whole(store)


def test_an_object_lost_after_its_upload_is_uploaded_again(
    tmp_path: Path, copier: ThreadPoolExecutor
) -> None:
    store, writing = LocalStore(tmp_path), Writing()
    around = writing.around()

    def announce(phase: str) -> None:
        if phase == "save:uploaded" and not writing.reasons:
            store.delete(store.list("checkpoints/")[1])

    losing = replace(around, announce=announce)
    owner = claimed(store)
    assert write(store, owner, Solo(), job(Solo(), state(), copier), losing) is not None
    assert len(writing.reasons) == 1
    assert "p01.safetensors is not in the store after its upload" in writing.reasons[0]
    assert whole(store)


class Remote(LocalStore):
    """A store elsewhere; its checksums and readings are wrong the next `lies` times."""

    def __init__(self, root: Path, *, checksums: bool, lies: int = 0) -> None:
        super().__init__(root)
        self._checksums = checksums
        self.lies = lies
        self.read: list[str] = []

    def _lie(self, key: str) -> bool:
        lies = bool(self.lies) and "p01" in key
        self.lies -= lies
        return lies

    def stat(self, key: str) -> ObjectInfo:
        info = super().stat(key)
        if not self._checksums:
            return info
        data = super().get(key) + b"changed" * self._lie(key)
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return ObjectInfo(size_bytes=info.size_bytes, checksum=f"md5:{digest}")

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        data = super().get(key, start, end)
        if key.endswith("safetensors"):
            self.read.append(key)
            if not self._checksums and self._lie(key):
                return data[:-1] + bytes([data[-1] ^ 1])
        return data

    def local_path(self, key: str) -> None:
        return None


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("checksums", [True, False])
def test_what_the_store_confirms_is_verified(
    checksums: bool, size: int, tmp_path: Path, copier: ThreadPoolExecutor
) -> None:
    store = Remote(tmp_path, checksums=checksums)
    written(store, claimed(store), copier, size)
    (checkpoint,) = committed(store)
    assert checkpoint.verified
    assert kinds(store) == ["CLAIM", "COMMIT", "VERIFIED"]
    objects = [key for key in store.list("checkpoints/") if key.endswith("safetensors")]
    assert sorted(store.read) == ([] if checksums else objects), "read back only without checksum"


def test_files_of_a_local_disk_are_not_called_verified(
    tmp_path: Path, copier: ThreadPoolExecutor
) -> None:
    store = LocalStore(tmp_path)
    written(store, claimed(store), copier)
    assert kinds(store) == ["CLAIM", "COMMIT"]
    assert not committed(store)[0].verified


@pytest.mark.parametrize("checksums", [True, False])
def test_bytes_changed_on_their_way_are_sent_again(
    checksums: bool, tmp_path: Path, copier: ThreadPoolExecutor
) -> None:
    store, writing = Remote(tmp_path, checksums=checksums, lies=2), Writing()
    written(store, claimed(store), copier, writing=writing)
    assert len(writing.reasons) == 2
    assert all("p01.safetensors was changed on its way" in reason for reason in writing.reasons)
    assert committed(store)[0].verified
    assert whole(store)


@pytest.mark.parametrize("checksums", [True, False])
def test_bytes_that_are_always_changed_are_never_committed(
    checksums: bool, tmp_path: Path, copier: ThreadPoolExecutor
) -> None:
    store, writing = Remote(tmp_path, checksums=checksums, lies=10**9), Writing(patience=4)
    assert written(store, claimed(store), copier, 2, writing=writing) == [None, None]
    assert len(writing.reasons) == 4
    assert kinds(store) == ["CLAIM"]


def test_a_cut_upload_is_sent_again(tmp_path: Path, copier: ThreadPoolExecutor) -> None:
    class Cuts(LocalStore):
        cuts = 1

        def put(self, key: str, data: bytes | memoryview) -> None:
            cut = "p01" in key and self.cuts
            self.cuts -= bool(cut)
            super().put(key, data[:-7] if cut else data)

    store, writing = Cuts(tmp_path), Writing()
    written(store, claimed(store), copier, writing=writing)
    assert len(writing.reasons) == 1
    assert "bytes after upload, sent" in writing.reasons[0]
    assert whole(store)


def test_a_verification_that_is_not_recorded_takes_no_commit_back(
    tmp_path: Path, copier: ThreadPoolExecutor
) -> None:
    class NotVerified(Remote):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            if b'"VERIFIED"' in data:
                raise StoreUnavailableError(f"{key}: no answer")
            return super().put_if_absent(key, data)

    store, writing = NotVerified(tmp_path, checksums=True), Writing(patience=1)
    assert written(store, claimed(store), copier, writing=writing) == [committed(store)[0].index]
    assert kinds(store) == ["CLAIM", "COMMIT"]


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("place", [0, 1500, 2999])
def test_replicas_that_differ_in_a_bit_are_not_saved(
    rank: int, place: int, tmp_path: Path, copier: ThreadPoolExecutor
) -> None:
    """Wherever the bit is: a rank answers for what the others would upload, too."""

    def states(of: int) -> TrainingState:
        one = state()
        if of == rank:
            one.tensors["big"].view(-1).view(torch.int32)[place] ^= 1
        return one

    store, writing = LocalStore(tmp_path), Writing()
    results = written(store, claimed(store), copier, 3, states=states, writing=writing)
    other = rank or 1
    assert [type(result) for result in results] == [DivergenceError] * 3
    assert str(results[0]).startswith(
        f"big after step {STEP} is not the same on rank {other} and rank 0, so the step is not "
    )
    assert len({str(result) for result in results}) == 1
    assert kinds(store) == ["CLAIM"]
    assert not any(key.endswith("manifest.json") for key in store.list("checkpoints/"))


def test_equal_replicas_are_saved_by_any_of_them(
    tmp_path: Path, copier: ThreadPoolExecutor
) -> None:
    """The control of the test above."""
    store = LocalStore(tmp_path)
    written(store, claimed(store), copier, 3)
    assert whole(store)


def test_a_rank_at_another_step_is_a_divergence(tmp_path: Path, copier: ThreadPoolExecutor) -> None:
    store = LocalStore(tmp_path)
    steps = [STEP, STEP, STEP + 1]
    results = written(store, claimed(store), copier, 3, steps=lambda rank: steps[rank])
    assert [type(result) for result in results] == [DivergenceError] * 3
    assert str(results[1]) == "rank 2 saved step 5, rank 0 4"
    assert committed(store) == []


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("when", ["save:begin", "save:object", "save:uploaded", "save:manifest"])
def test_a_claim_meanwhile_fences_every_rank(
    when: str, size: int, tmp_path: Path, copier: ThreadPoolExecutor
) -> None:
    store = LocalStore(tmp_path)
    owner = claimed(store)
    phases: list[str] = []
    one_at_a_time = threading.Lock()

    def announce(phase: str) -> None:
        with one_at_a_time:
            if phase == when and phase not in phases:
                claimed(store)
            phases.append(phase)

    class Claims(Writing):
        def around(self) -> Around:
            before_commit = partial(phases.append, "before_commit")
            return replace(super().around(), announce=announce, before_commit=before_commit)

    results = written(store, owner, copier, size, writing=Claims())
    assert [type(result) for result in results] == [FencedError] * size
    assert kinds(store) == ["CLAIM", "CLAIM"]
    stale = when != "save:manifest"
    assert ("before_commit" not in phases) == stale, "a stale one writes no curves"
    manifests = [key for key in store.list("checkpoints/") if key.endswith("manifest.json")]
    assert (manifests == []) == stale
