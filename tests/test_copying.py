"""A copy holds the same run, bit for bit, and training goes on there as if nothing had been."""

import itertools
import json
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpointing.copying import copy_run
from checkpointing.history import history
from checkpointing.load import load
from checkpointing.pins import pin_for_ever, pinned_checkpoints
from checkpointing.pruning import prune
from storage.errors import ConfigurationError, IntegrityError
from storage.log import Draft, Log
from storage.store import LocalStore, ObjectInfo, Store, open_store
from tests.conftest import Interrupted
from tests.made_runs import contents, go_on, make_run
from tests.programs import final_digest, rows, train_here
from tests.test_retention import Interleaved, live_steps
from tests.test_save import Crash

Interrupt = Callable[[str, int], Callable[[str, int], None]]

SHAPE = (
    "--max_steps=8",
    "--eval_interval_steps=0",
    "--sample_interval_steps=0",
    "--save_interval_steps=2",
    "--wait_for_saves",
    "--n_embd=32",
    "--context=32",
    "--global_batch_size=8",
    "--warmup_steps=2",
)


@pytest.fixture
def source(tmp_path: Path) -> LocalStore:
    """A run with everything: retired, quarantined, pinned, in flight, data, curves, beats."""
    store = LocalStore(tmp_path / "source")
    owner = make_run(store, 1, 2, 3, 4)
    first, second, third, _ = history(owner.records).checkpoints
    owner.append("RETIRE", lambda _: {"checkpoints": [first.index]})
    owner.append("QUARANTINE", lambda _: {"checkpoints": [second.index]})
    pin_for_ever(store, Log(store), lambda past: third, reason="good")
    store.put("pins/lease.json", b'{"checkpoint": %d, "until": 9e12}' % second.index)
    store.put("checkpoints/g0001/s00000009-0123456789ab/r000-p00.safetensors", b"12345")
    for key in ("corpus/a/index.json", "corpus/a/b.npy", "metrics.jsonl", "tensorboard/x.1.2"):
        store.put(key, key.encode())
    for key in ("beats/g0001.json", "requests/x.json", "probe/x"):
        store.put(key, b"{}")
    (store.root / ".hidden").write_text("x")
    (store.root / "not a key").write_text("x")
    return store


@pytest.fixture(params=["local", "memory"])
def destination(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    local = request.param == "local"
    return open_store(str(tmp_path / "copy") if local else f"memory://{uuid.uuid4().hex}/copy")


def belongs(key: str) -> bool:
    """Whether a key of `source` is one of the run's that a copy has."""
    if key in ("pins/lease.json", ".hidden", "not a key"):
        return False
    if key.startswith(("beats/", "requests/", "probe/")):
        return False
    return not key.startswith("checkpoints/") or any(f"/s0000000{n}-" in key for n in (2, 3, 4))


def expected(source: LocalStore) -> dict[str, bytes]:
    keys = [k for k in source.list("") if belongs(k)]
    return {key: source.get(key) for key in keys}


def test_what_a_run_needs_arrives_bit_for_bit_and_nothing_else(
    source: LocalStore, destination: Store
) -> None:
    before = {p: p.read_bytes() for p in source.root.rglob("*") if p.is_file()}
    result = copy_run(source, destination)
    wanted = expected(source)
    found = contents(destination)
    (pin,) = [key for key in wanted if key.startswith("pins/")]
    assert json.loads(found.pop(pin)) == json.loads(wanted.pop(pin))
    assert found == wanted
    assert {p: p.read_bytes() for p in source.root.rglob("*") if p.is_file()} == before
    log = Log(destination).refresh()
    assert log == Log(source).refresh()
    for checkpoint in history(log).checkpoints[1:]:
        load(destination, checkpoint)
    assert [(c["step"], c["quarantined"], c["verdict"]) for c in result["checkpoints"]] == [
        (2, True, "whole"),
        (3, False, "whole"),
        (4, False, "whole"),
    ]
    moved = [key for key in wanted if not key.startswith(("log/", "run.json"))]
    assert result["copied_objects"] == len(moved)
    assert result["copied_bytes"] == sum(len(wanted[key]) for key in moved)
    assert (result["present_objects"], result["records"]) == (0, len(log))
    assert pinned_checkpoints(destination) == {history(log).checkpoints[2].index}


def test_a_second_copy_finds_everything_there(source: LocalStore, destination: Store) -> None:
    first = copy_run(source, destination)
    again = copy_run(source, destination)
    assert (again["copied_objects"], again["copied_bytes"]) == (0, 0)
    assert again["present_objects"] == first["copied_objects"]
    assert again["present_bytes"] == first["copied_bytes"]


def test_a_later_copy_brings_an_earlier_one_up_to_date(
    source: LocalStore, destination: Store
) -> None:
    copy_run(source, destination)
    go_on(source, 5, 6)
    prune(source, Log(source), keep_last=2, wall_clock=lambda: 0.0)
    source.put("metrics.jsonl", b"as long again")
    copy_run(source, destination)
    assert Log(destination).refresh() == Log(source).refresh()
    for checkpoint in history(Log(destination).refresh()).live:
        load(destination, checkpoint)
    assert destination.get("metrics.jsonl") == b"as long again", "known by its bytes"


class CrashingCopy(Interleaved):
    """A destination that fails at its nth operation from a moment on, on whichever thread."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._lock = threading.Lock()

    def crash_at(self, nth: int) -> None:
        def crash() -> None:
            raise Crash

        self.at(nth, crash)

    def _count(self) -> None:
        with self._lock:
            super()._count()

    def stat(self, key: str) -> ObjectInfo:
        return super().stat(key)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_killed_at_any_instant_the_same_command_goes_on(
    side: str, source: LocalStore, tmp_path: Path
) -> None:
    """And until it is finished the place is no run that somebody could start by mistake."""
    goal = expected(source)
    for nth in itertools.count(1, 3):
        one = CrashingCopy(source.root)
        other = CrashingCopy(tmp_path / f"copy{nth}")
        (one if side == "source" else other).crash_at(nth)
        try:
            copy_run(one, other)
            break
        except Crash:
            plain = LocalStore(other.root)
            if "run.json" in plain.list(""):
                assert set(goal) == set(plain.list(""))
            copy_run(LocalStore(source.root), plain)
            assert set(goal) == set(plain.list(""))
            assert Log(plain).refresh() == Log(source).refresh()
    assert nth > 40


def test_the_source_may_train_and_retire_at_any_instant(tmp_path: Path) -> None:
    """The copy is a beginning of the source's log, and every live checkpoint of it is whole."""
    for nth in itertools.count(1, 2):
        source = CrashingCopy(tmp_path / f"source{nth}")
        plain = LocalStore(source.root)
        make_run(plain, 1, 2, 3)
        went_on: list[int] = []

        def train(plain: LocalStore = plain, went_on: list[int] = went_on) -> None:
            went_on.append(1)
            go_on(plain, 4, 5)
            prune(plain, Log(plain), keep_last=2, wall_clock=lambda: 0.0)

        source.at(nth, train)
        destination = LocalStore(tmp_path / f"copy{nth}")
        copy_run(source, destination)
        records = Log(destination).refresh()
        assert list(records) == list(Log(plain).refresh())[: len(records)]
        for checkpoint in history(records).live:
            load(destination, checkpoint)
        if not went_on:
            assert nth > 40
            return


def test_what_is_no_run_is_not_copied(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no run"):
        copy_run(LocalStore(tmp_path / "none"), LocalStore(tmp_path / "copy"))
    new = LocalStore(tmp_path / "new")
    new.put("run.json", b'{"format":1,"run":"x","identity":{}}')
    with pytest.raises(ConfigurationError, match="new has never been trained: start it where"):
        copy_run(new, LocalStore(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()


def weights(store: Store, step: int) -> str:
    return next(
        key for key in store.list("checkpoints/") if f"/s{step:08d}-" in key and "safet" in key
    )


def test_an_object_that_arrived_damaged_is_sent_again(source: LocalStore, tmp_path: Path) -> None:
    destination = LocalStore(tmp_path / "copy")
    key = weights(source, 4)
    copy_run(source, destination)
    destination.put(key, bytes(destination.stat(key).size_bytes))
    copy_run(source, destination)
    assert destination.get(key) == source.get(key)


class Flipping(LocalStore):
    """A place that damages every object of one name."""

    bad = ".safetensors"

    def put(self, key: str, data: bytes | memoryview) -> None:
        super().put(key, bytes(len(data)) if key.endswith(self.bad) else data)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (".safetensors", "copy: the checkpoint of step 2 did not arrive whole in two attempts"),
        ("b.npy", r"copy: corpus/a/b\.npy is not what was written; copy again"),
    ],
)
def test_a_place_that_damages_what_it_holds_gets_no_run(
    bad: str, message: str, source: LocalStore, tmp_path: Path
) -> None:
    destination = Flipping(tmp_path / "copy")
    destination.bad = bad
    with pytest.raises(IntegrityError, match=message):
        copy_run(source, destination)
    assert "run.json" not in destination.list("")


def test_what_is_damaged_in_the_source_is_named_and_the_rest_is_copied(
    source: LocalStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    destination = LocalStore(tmp_path / "copy")
    key = weights(source, 3)
    source.put(key, bytes(source.stat(key).size_bytes))
    result = copy_run(source, destination)
    verdicts = {c["step"]: c["verdict"] for c in result["checkpoints"]}
    assert verdicts == {2: "whole", 3: "damaged", 4: "whole"}
    assert "step 3 is damaged in the source, and so in the copy" in caplog.text
    assert destination.get(key) == source.get(key)


def test_a_manifest_key_that_leads_elsewhere_is_refused(source: LocalStore, tmp_path: Path) -> None:
    body = {
        "step": 9,
        "digest": "",
        "manifest_key": "corpus/a/manifest.json",
        "manifest_sha256": "",
        "parent": None,
        "healthy": True,
        "validation_loss": None,
    }
    Log(source).append(lambda _: Draft(kind="COMMIT", generation=1, body=body))
    with pytest.raises(IntegrityError, match=r"'corpus/a/manifest\.json' is not the key of a"):
        copy_run(source, LocalStore(tmp_path / "copy"))


def test_progress_is_told(source: LocalStore, tmp_path: Path) -> None:
    heard: dict[str, list[tuple[int, int]]] = {}
    copy_run(
        source,
        LocalStore(tmp_path / "copy"),
        advance=lambda phase, done, total: heard.setdefault(phase, []).append((done, total)),
    )
    assert list(heard) == ["copying", "verifying", "copying the log"]
    for told in heard.values():
        assert told == sorted(told)
        assert told[-1][0] == told[-1][1]


def resumed(place: str, digest: str, *arguments: Any) -> None:
    assert train_here("--run", place, *arguments, "--take_over") == 0
    assert final_digest(place) == digest


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_copied_run_is_resumed_and_ends_with_the_same_bits(
    place: str, tmp_path: Path, interrupt: Interrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the corpus that lies in the run, while the source stands in the middle of a step."""
    monkeypatch.chdir(tmp_path)
    assert train_here("--run", "unbroken", *SHAPE) == 0
    digest = final_digest("unbroken")
    copy = "copy" if place == "local" else f"memory://{uuid.uuid4().hex}/copy"

    def listener(phase: str, step: int) -> None:
        if phase == "update:before" and step == 5:
            copy_run(open_store("source"), open_store(copy))
            raise Interrupted

    with pytest.raises(Interrupted):
        train_here("--run", "source", *SHAPE, listener=listener)
    assert live_steps(open_store(copy)) == [2, 4]  # type: ignore[arg-type]
    if place == "local":
        assert [row["step"] for row in rows(Path("copy"))] == [1, 2, 3, 4]
    (tmp_path / "source").rename(tmp_path / "away")  # nothing there is needed any more
    resumed(copy, digest, *SHAPE)
    with pytest.raises(ConfigurationError, match="has gone on by itself"):
        copy_run(LocalStore(tmp_path / "away"), open_store(copy))
