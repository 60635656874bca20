"""Every kind of object, damaged in every way: what is found, what is used instead, what is said.

Nothing may be silently wrong: what is restored has the exact digest of its COMMIT, or there is a
clear error.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpointing import incarnation as incarnation_module
from checkpointing.asks import KINDS, ask
from checkpointing.beats import read_beat
from checkpointing.group import Solo
from checkpointing.history import history
from checkpointing.incarnation import Incarnation, claim_run
from checkpointing.load import Loaded, load
from checkpointing.naming import RUN_KEY, read_run
from checkpointing.pins import all_pins, pin_for_ever
from checkpointing.restore import restore
from checkpointing.retention import sweep
from checkpointing.save import TrainingState, save
from storage.canonical import canonical_json
from storage.errors import ConfigurationError, NoUsableCheckpointError
from storage.log import Log
from storage.requests import Inbox
from storage.store import LocalStore
from tests.programs import train_here
from trainer.metrics import Metrics

STEPS = (1, 2, 3, 4)
SLOTS = (
    *("CLAIM", "COMMIT 1", "COMMIT 2", "RETIRE", "PLAN", "VERIFIED", "QUARANTINE"),
    *("CLAIM 2", "COMMIT 3", "COMMIT 4", "END"),
)
"""What the made run's log says, from record 1 on."""


def state(step: int) -> TrainingState:
    generator = torch.Generator().manual_seed(step)
    tensors = {"w": torch.randn(40, generator=generator), "b": torch.randn(3, generator=generator)}
    return TrainingState(tensors=tensors, exact={"step": step}, extra={"rng": [step]})


def claimed(store: LocalStore) -> Incarnation:
    return claim_run(store, Log(store), body={}, take_over=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose log has every kind of record. Step 1 is retired, 2 in quarantine."""
    folder = tmp_path_factory.mktemp("made") / "run"
    store = LocalStore(folder)
    identity = {"format": 1, "run": "made", "identity": {"seed": 0}}
    store.put(RUN_KEY, canonical_json(identity))
    first = claimed(store)
    saved = [save(store, first, Solo(), state(step), step=step) for step in STEPS[:2]]
    one, two = (checkpoint.index for checkpoint in saved if checkpoint is not None)
    first.append("RETIRE", lambda _: {"checkpoints": [one]})
    first.append("PLAN", lambda _: {"edit": 1})
    first.append("VERIFIED", lambda _: {"checkpoints": [two]})
    first.append("QUARANTINE", lambda _: {"checkpoints": [two], "reason": "a test"})
    second = claimed(store)
    for step in STEPS[2:]:
        save(store, second, Solo(), state(step), step=step)
    newest = history(second.records).live[-1]
    second.append("END", lambda _: {"step": 4, "digest": newest.digest})
    said = [record.kind for record in second.records]
    assert said == [slot.split()[0] for slot in SLOTS]
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> LocalStore:
    return LocalStore(shutil.copytree(made, tmp_path / "run"))


# The damages: each is given the file and another of its kind.


def flip(at: float) -> Callable[[Path, Path], None]:
    def damage(path: Path, other: Path) -> None:
        data = bytearray(path.read_bytes())
        data[min(int(at * len(data)), len(data) - 1)] ^= 1
        path.write_bytes(data)

    return damage


def cut(to: float) -> Callable[[Path, Path], None]:
    def damage(path: Path, other: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: min(int(to * len(data)), len(data) - 1)])

    return damage


def delete(path: Path, other: Path) -> None:
    path.unlink()


def swap(path: Path, other: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "a bit at the start": flip(0.0),
    "a bit in the middle": flip(0.5),
    "a bit at the end": flip(1.0),
    "empty": cut(0.0),
    "half": cut(0.5),
    "all but the end": cut(1.0),
    "deleted": delete,
    "swapped": swap,
}


def restarted(store: LocalStore) -> Loaded:
    """The next start: what it restores is what was committed, and it can save."""
    owner = claimed(store)
    loaded = restore(store, owner, Solo())
    assert loaded is not None
    step = loaded.checkpoint.step
    for name, tensor in state(step).tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
    assert loaded.exact == {"step": step}
    sweep(store, owner)
    saved = save(store, owner, Solo(), state(9), step=9, parent=loaded.checkpoint.index)
    assert saved is not None
    assert load(store, saved).exact == {"step": 9}
    again = history(Log(store).refresh()).live
    assert again[-1].step == 9
    return loaded


def slot_of(store: LocalStore, name: str) -> Path:
    return store.root / f"log/{SLOTS.index(name) + 1:010d}.json"


RECORDS: dict[str, tuple[int, str]] = {
    "CLAIM": (4, "CLAIM 2"),
    "COMMIT 1": (4, "COMMIT 2"),
    "COMMIT 2": (4, "COMMIT 1"),
    "RETIRE": (4, "QUARANTINE"),
    "PLAN": (4, "RETIRE"),
    "VERIFIED": (4, "RETIRE"),
    "QUARANTINE": (4, "RETIRE"),
    "CLAIM 2": (4, "CLAIM"),
    "COMMIT 3": (4, "COMMIT 2"),
    "COMMIT 4": (3, "COMMIT 2"),
    "END": (4, "PLAN"),
}
"""The step that is restored without the record, and what it is swapped with."""


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_is_left_out_and_named(
    name: str, damage: str, run: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    step, other = RECORDS[name]
    DAMAGES[damage](slot_of(run, name), slot_of(run, other))
    slot = SLOTS.index(name) + 1
    log = Log(run)
    log.refresh()
    if name == "END" and damage == "deleted":
        assert log.damaged == []  # the last record of a log leaves no gap; the run goes on
    else:
        expected = {slot, SLOTS.index(other) + 1} if damage == "swapped" else {slot}
        assert set(log.damaged) == expected
        what = "missing" if damage == "deleted" else "damaged"
        assert f"log record {slot} of {run.url} is {what} and is left out" in caplog.text
    before = set(run.list("checkpoints/"))
    assert restarted(run).checkpoint.step == step
    live = {c.index for c in history(Log(run).refresh()).live}
    for commit in ("COMMIT 3", "COMMIT 4"):
        intact = SLOTS.index(commit) + 1 not in log.damaged
        assert (SLOTS.index(commit) + 1 in live) == intact
    if name.startswith("COMMIT"):
        mine = {key for key in before if f"/s{int(name[-1]):08d}-" in key}
        assert mine <= set(run.list("checkpoints/")), "what no COMMIT names may be its checkpoint"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_base_is_not_needed(
    damage: str, run: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incarnation_module, "BASE_RECORDS", 1)
    owner = claimed(run)
    assert owner.shorten() is not None
    owner.append("PLAN", lambda _: {"edit": 2})
    base = len(SLOTS) + 2
    path = run.root / f"log/{base:010d}.json"
    assert b'"kind":"BASE"' in path.read_bytes()
    assert Log(run).refresh()[0].index == base, "a replay begins there"
    DAMAGES[damage](path, slot_of(run, "PLAN"))
    log = Log(run)
    assert log.refresh()[0].index == 1, "a replay begins at the beginning"
    assert base in log.damaged
    loaded = restarted(run)
    assert loaded.checkpoint.step == 4
    assert [c.step for c in history(Log(run).refresh()).checkpoints] == [1, 2, 3, 4, 9]


@pytest.mark.parametrize("damage", DAMAGES)
def test_before_a_base_no_damage_matters(
    damage: str, run: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incarnation_module, "BASE_RECORDS", 1)
    claimed(run).shorten()
    DAMAGES[damage](slot_of(run, "COMMIT 4"), slot_of(run, "COMMIT 3"))
    assert restarted(run).checkpoint.step == 4


def object_of(store: LocalStore, step: int, name: str) -> Path:
    past = history(Log(store).refresh())
    (found,) = [c for c in past.checkpoints if c.step == step]
    return (store.root / found.manifest_key).with_name(name)


OBJECTS: dict[tuple[str, str], str] = {
    ("manifest.json", "any"): "manifest.json is not the manifest that was committed: its sha256",
    ("manifest.json", "deleted"): "manifest.json is missing",
    ("r000-p00.safetensors", "a bit at the start"): "is damaged: its header is not that of its",
    ("r000-p00.safetensors", "any"): r"is damaged: (bytes 0 and following of|its header)",
    ("r000-p00.safetensors", "empty"): r"safetensors has 0 bytes, expected \d+",
    ("r000-p00.safetensors", "half"): r"safetensors has \d+ bytes, expected \d+",
    ("r000-p00.safetensors", "all but the end"): r"safetensors has \d+ bytes, expected \d+",
    ("r000-p00.safetensors", "deleted"): "r000-p00.safetensors is missing",
}
"""What is said of each."""


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["manifest.json", "r000-p00.safetensors"])
def test_a_damaged_checkpoint_goes_into_quarantine_and_the_one_before_is_restored(
    name: str, damage: str, run: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    older = object_of(run, 2, name)  # in quarantine: swapping harms only the newest
    DAMAGES[damage](object_of(run, 4, name), older)
    assert restarted(run).checkpoint.step == 3
    past = history(Log(run).refresh())
    assert [c.step for c in past.checkpoints if c.quarantined] == [2, 4]
    message = OBJECTS.get((name, damage), OBJECTS[name, "any"])
    (warning,) = [r.getMessage() for r in caplog.records if "goes into quarantine" in r.msg]
    assert warning.startswith("the checkpoint of step 4 is damaged")
    assert re.search(message, warning), warning


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["manifest.json", "r000-p00.safetensors"])
def test_when_every_checkpoint_is_damaged_the_start_says_so(
    name: str, damage: str, run: LocalStore
) -> None:
    DAMAGES[damage](object_of(run, 4, name), object_of(run, 2, name))
    DAMAGES[damage](object_of(run, 3, name), object_of(run, 1, name))
    with pytest.raises(NoUsableCheckpointError, match="checkpoints of this run are damaged"):
        restore(run, claimed(run), Solo())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("a bit at the start", "run.json is damaged"),
        ("a bit at the end", "run.json is damaged"),
        ("empty", "run.json is damaged"),
        ("half", "run.json is damaged"),
        ("all but the end", "run.json is damaged"),
        ("deleted", "holds no run: there is no run.json"),
    ],
)
def test_a_damaged_run_json_is_an_error(damage: str, message: str, run: LocalStore) -> None:
    DAMAGES[damage](run.root / RUN_KEY, run.root / RUN_KEY)
    with pytest.raises(ConfigurationError, match=message):
        read_run(run)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pin_never_harms_a_restart(damage: str, run: LocalStore) -> None:
    pin_for_ever(run, Log(run), lambda past: past.live[0])
    pin_for_ever(run, Log(run), lambda past: past.live[1])
    first, second = (run.root / key for key in run.list("pins/"))
    DAMAGES[damage](first, second)
    readable = len(all_pins(run))
    assert readable == (2 if damage == "swapped" else 1) or damage == "a bit in the middle"
    assert restarted(run).checkpoint.step == 4


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_request_is_refused_or_obeyed_and_never_harms(
    damage: str, run: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (run.root / ask(run, kind) for kind in ("save", "stop"))
    DAMAGES[damage](first, second)
    inbox = Inbox(run, KINDS)
    inbox.pending()
    kinds = {request.kind for request in inbox.pending()}
    assert kinds <= {"save", "stop"} and "stop" in kinds
    if damage not in ("deleted", "swapped") and "save" not in kinds:
        assert "is no request: " in caplog.text
        assert not first.exists(), "it is refused once"
    assert restarted(run).checkpoint.step == 4


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_beat_only_makes_a_starter_wait(damage: str, run: LocalStore) -> None:
    for generation in (1, 2):
        beat = {"count": generation, "phase": "step", "step": 4, "left": False}
        run.put(f"beats/g{generation:04d}.json", canonical_json(beat))
    DAMAGES[damage](run.root / "beats/g0002.json", run.root / "beats/g0001.json")
    assert read_beat(run, 2) == {} or read_beat(run, 2)["left"] is False
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += 1.0

    owner = claim_run(run, Log(run), body={}, take_over=False, clock=lambda: now[0], sleep=sleep)
    assert owner.generation == 3 and now[0] >= 10.0
    assert restarted(run).checkpoint.step == 4


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_curve_never_stops_a_start(damage: str, tmp_path: Path) -> None:
    with Metrics(tmp_path, generation=1, step=0) as metrics:
        for step in range(1, 6):
            metrics.add({"step": step, "loss": 2.5})
        metrics.flush()
    path, other = tmp_path / "metrics.jsonl", tmp_path / "other"
    other.write_bytes(b'{"step":1,"loss":7.0,"time":1}\n')
    DAMAGES[damage](path, other)
    with Metrics(tmp_path, generation=2, step=5) as metrics:
        metrics.add({"step": 6, "loss": 2.5})
        metrics.flush()
    found = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [row["step"] for row in found]
    assert steps == sorted(set(steps)) and steps[-1] == 6
    least = {"empty": 1, "deleted": 1, "swapped": 2, "half": 3}
    assert len(steps) >= least.get(damage, 5)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b'"seed":0', b'"seed":1', "seed decides bits: the run has 1, this start asks for 0"),
        (b'"seed":0', b'"seee":0', "seed decides bits: the run has None, this start asks for 0"),
    ],
)
def test_an_identity_that_changed_by_itself_is_refused(
    before: bytes,
    after: bytes,
    message: str,
    tmp_path: Path,
    data: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    shape = ("--max_steps=1", "--n_embd=32", "--context=32", "--global_batch_size=8")
    quiet = ("--eval_interval_steps=0", "--sample_interval_steps=0", "--warmup_steps=1")
    assert train_here("--run", tmp_path / "run", *data, *shape, *quiet) == 0
    path = tmp_path / "run" / RUN_KEY
    said = path.read_bytes()
    assert said.count(before) == 1
    path.write_bytes(said.replace(before, after))
    assert train_here("--run", tmp_path / "run", *data, *shape, *quiet) == 78
    assert message in capsys.readouterr().err
