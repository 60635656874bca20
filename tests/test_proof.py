"""What a resume is proved by: steps that are made again, beside the record of the dead."""

import json
import logging
import math
import struct
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from checkpointing.beats import read_beat
from checkpointing.incarnation import Incarnation, claim_run
from launch.proof import KEPT_STEPS, MOST_GENERATIONS, Proof, nothing_recorded, recorded_steps
from storage.canonical import canonical_json
from storage.errors import IntegrityError
from storage.log import Log
from storage.store import LocalStore
from tests.conftest import Interrupted
from tests.controls import broken
from tests.made_sources import plan_of, unwritten_source
from tests.programs import Program, checkpoints, train_here

Interrupt = Callable[[str, int], Callable[[str, int], None]]

SHAPE = (
    "--max_steps=12",
    "--eval_interval_steps=0",
    "--sample_interval_steps=0",
    "--save_interval_steps=4",
    "--wait_for_saves",
    "--n_embd=32",
    "--context=32",
    "--global_batch_size=8",
    "--micro_batch_size=2",
    "--warmup_steps=4",
    "--dropout=0.1",
)


def samples_of(step: int) -> bytes:
    return step.to_bytes(32, "little")


def loss_of(step: int) -> float:
    return 1.0 / (step + 1)


def told(proof: Proof, steps: Sequence[int], **other: Any) -> None:
    """Steps are made; `other` gives another `samples`, `loss` or `norm`."""
    for step in steps:
        samples = partial(other.get("samples", samples_of), step)
        loss, norm = other.get("loss", loss_of)(step), other.get("norm", math.sqrt)(step)
        proof.step(step, samples, loss, norm)


def made(recorded: dict[str, Any] | None = None, **options: Any) -> Proof:
    fixed: Any = {"restored_step": 40, "stop": False, "leader": True} | options
    return Proof(recorded or nothing_recorded(), **fixed)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def claimed(store: LocalStore, **body: Any) -> Incarnation:
    return claim_run(store, Log(store), body=body, take_over=True)


def beaten(store: LocalStore, owner: Incarnation, steps: Sequence[int], **other: Any) -> None:
    """The owner's last heartbeat, after these steps."""
    proof = made()
    told(proof, steps, **other)
    beat = {"count": 3, "phase": "step", "step": steps[-1], "left": False} | proof.beat()
    store.put(f"beats/g{owner.generation:04d}.json", canonical_json(beat))


def found(store: LocalStore, owner: Incarnation, step: int = 40, oldest: int = 1) -> dict[str, Any]:
    """Through JSON, as from rank 0 to the others."""
    looked = recorded_steps(store, owner.records, owner.generation, step, oldest)
    content: dict[str, Any] = json.loads(canonical_json(looked))
    return content


def test_replayed_steps_with_the_same_bits_verify_the_resume(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "launch.proof")
    beaten(store, claimed(store), range(31, 78))
    proof = made(found(store, claimed(store)))
    told(proof, range(41, 77))
    assert proof.beat()["proof"]["resume"]["verified"] is None, "one is to come"
    told(proof, range(77, 90))
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "steps 41 to 77 were made before: 37 of them will be compared with what was recorded of "
        "them",
        "resume verified on 37 replayed steps",
    ]
    assert proof.beat()["proof"]["resume"] == {
        "from_step": 40,
        "recorded": 37,
        "compared": 37,
        "verified": True,
        "difference": None,
        "why_not": "",
    }


@pytest.mark.parametrize(
    ("part", "name", "other", "values"),
    [
        ("samples", "samples", lambda step: samples_of(step + 1), ("2d" + 14 * "0", "2e")),
        ("loss", "loss", lambda step: math.nextafter(loss_of(step), 9.0), ("0.021739130434", "")),
        ("norm", "gradient norm", lambda step: step**0.5 + 1e-9, (repr(math.sqrt(45)), "6.70")),
    ],
)
def test_the_first_difference_is_told_by_step_and_part(
    part: str,
    name: str,
    other: Callable[[int], Any],
    values: tuple[str, str],
    store: LocalStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    right = {"samples": samples_of, "loss": loss_of, "norm": math.sqrt}[part]
    beaten(store, claimed(store), range(31, 51))
    proof = made(found(store, claimed(store)))
    told(proof, range(41, 60), **{part: lambda step: (right if step < 45 else other)(step)})
    difference = proof.beat()["proof"]["resume"]["difference"]
    assert (difference["step"], difference["part"], difference["generation"]) == (45, name, 1)
    assert difference["recorded"].startswith(values[0])
    assert difference["replayed"].startswith(values[1])
    assert difference["recorded"] != difference["replayed"]
    assert proof.beat()["proof"]["resume"]["verified"] is False
    [warning] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert f"step 45 is not what generation 1 made of it: its {name} is " in warning
    assert difference["recorded"] in warning and difference["replayed"] in warning


def test_samples_are_named_before_the_loss_that_they_change(store: LocalStore) -> None:
    beaten(store, claimed(store), range(41, 50))
    proof = made(found(store, claimed(store)))
    told(proof, [41], samples=lambda step: b"other..." * 4, loss=lambda step: 9.0)
    assert proof.beat()["proof"]["resume"]["difference"]["part"] == "samples"


STOPPED = (
    r"step 43 is not what generation 1 made of it: its loss is 9\.0, expected .* Nothing is saved "
    r"from step 43 on\. .* Start again where it was right, or with --on_divergence warn"
)


def test_a_difference_can_stop_the_run_and_then_stops_every_start(store: LocalStore) -> None:
    """The record of the one that was stopped does not hide that of the one before."""
    beaten(store, claimed(store), range(41, 50))
    second = claimed(store)
    proof = made(found(store, second), stop=True)
    told(proof, [41, 42])
    with pytest.raises(IntegrityError, match=STOPPED) as raised:
        told(proof, [43], loss=lambda step: 9.0)
    assert raised.value.exit_code == 78
    beat = {"count": 2, "phase": "step", "step": 43, "left": True} | proof.beat()
    store.put("beats/g0002.json", canonical_json(beat))
    again = made(found(store, claimed(store)), stop=True)
    told(again, [41, 42])
    with pytest.raises(IntegrityError, match=STOPPED):
        told(again, [43], loss=lambda step: 9.0)


def test_every_process_comes_to_the_same_verdict(store: LocalStore) -> None:
    beaten(store, claimed(store), range(41, 50))
    looked = found(store, claimed(store))
    for leader in (True, False):
        proof = made(looked, stop=True, leader=leader)
        with pytest.raises(IntegrityError, match="step 41"):
            told(proof, [41], norm=lambda step: 0.0)


def test_other_processes_only_look_where_a_difference_would_stop_them(store: LocalStore) -> None:
    beaten(store, claimed(store), range(41, 43))
    looked = found(store, claimed(store))
    asked: list[int] = []

    def samples(step: int) -> bytes:
        asked.append(step)
        return samples_of(step)

    told(made(looked, leader=False), range(41, 50), samples=samples)
    assert asked == []
    told(made(looked, leader=False, stop=True), range(41, 50), samples=samples)
    assert asked == [41, 42]


def test_every_nan_is_the_same(store: LocalStore) -> None:
    (other,) = struct.unpack("<d", struct.pack("<Q", 0xFFF8000000000001))
    beaten(store, claimed(store), [41, 42], loss=lambda step: math.nan)
    proof = made(found(store, claimed(store)))
    told(proof, [41, 42], loss=lambda step: other)
    assert proof.beat()["proof"]["resume"]["verified"] is True


def test_a_beat_holds_the_newest_steps_up_to_a_bound() -> None:
    proof = made()
    told(proof, range(1, KEPT_STEPS + 11))
    said = proof.beat()["proof"]
    assert said["first"] == 11
    assert len(b64decode(said["steps"])) == 24 * KEPT_STEPS
    assert len(canonical_json(said)) < 34_000


def test_the_newest_record_of_a_step_counts_and_older_ones_fill_up(store: LocalStore) -> None:
    beaten(store, claimed(store), range(35, 60))
    beaten(store, claimed(store), range(41, 48), loss=lambda step: 2.0)
    looked = found(store, claimed(store))
    by = {int(step): generation for step, (generation, _) in looked["steps"].items()}
    assert by == {**dict.fromkeys(range(41, 60), 1), **dict.fromkeys(range(41, 48), 2)}
    assert looked["why_not"] == ""


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b'{"count":1,"proof":{"format":1,"first":41,"steps":"',
        b"\xff\xfe",
        canonical_json({"step": 50, "proof": "garbled"}),
        canonical_json({"step": 50, "proof": {"format": 2, "first": 41, "steps": ""}}),
        canonical_json({"step": 50, "proof": {"format": 1, "first": "41", "steps": ""}}),
        canonical_json({"step": 50, "proof": {"format": 1, "first": 41, "steps": "%%%"}}),
        canonical_json(
            {
                "step": 50,
                "proof": {
                    "format": 1,
                    "first": 41,
                    "steps": b64encode(bytes(30)).decode(),
                },
            }
        ),
        canonical_json({"step": 50}),
    ],
    ids=[
        *("missing", "empty", "truncated", "binary", "text", "later format", "no number"),
        *("no base64", "a part of a step", "none, of an earlier version"),
    ],
)
def test_a_beat_that_cannot_be_read_is_named_once_and_nothing_is_compared(
    content: bytes | None, store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    claimed(store)
    if content is not None:
        store.put("beats/g0001.json", content)
    proof = made(found(store, claimed(store)))
    told(proof, range(41, 60))
    [said] = [record.getMessage() for record in caplog.records]
    assert said == (
        "steps that are made again are not compared: no steps can be read in the heartbeats of "
        "generation 1"
    )
    resume = proof.beat()["proof"]["resume"]
    assert (resume["verified"], resume["recorded"]) == (None, 0)


def test_where_nothing_was_replayed_nothing_is_said(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    """It left in order, or never came as far: no matter what is changed now."""
    caplog.set_level(logging.INFO, "launch.proof")
    beaten(store, claimed(store, schedule={"schedule.max_steps": 40}), range(1, 41))
    store.put("beats/g0002.json", canonical_json({"step": 40, "left": True}))
    claimed(store)
    proof = made(found(store, claimed(store, schedule={"schedule.max_steps": 80})))
    told(proof, range(41, 60))
    assert caplog.records == []
    assert proof.beat()["proof"]["resume"]["verified"] is None


@pytest.mark.parametrize(
    ("change", "why_not"),
    [
        (
            {"schedule": {"schedule.learning_rate": 2e-3, "data": []}},
            "schedule.learning_rate changed after generation 1",
        ),
        (
            {"accepted_changes": {"numerics.cpu_threads": 2}},
            "numerics.cpu_threads changed after generation 1",
        ),
        ({"schedule": {"schedule.learning_rate": 1e-3, "data": ["a=b"]}}, ""),  # in the plan
    ],
)
def test_what_was_changed_on_purpose_is_not_compared(
    change: dict[str, Any], why_not: str, store: LocalStore
) -> None:
    body = {"schedule": {"schedule.learning_rate": 1e-3, "data": []}}
    beaten(store, claimed(store, **body), range(41, 50))
    owner = claimed(store, **(body | change))
    looked = found(store, owner)
    assert looked["why_not"] == why_not
    assert (looked["steps"] == {}) == bool(why_not)


def test_what_the_log_does_not_tell_is_not_compared(store: LocalStore) -> None:
    beaten(store, claimed(store), range(41, 50))
    owner = claimed(store)
    records = [record for record in owner.records if record.generation != 1]
    looked = recorded_steps(store, records, 2, 40, 1)
    assert looked["steps"] == {}
    assert looked["why_not"] == "the log does not tell with which configuration generation 1 ran"


def test_a_claim_that_only_a_base_restates_is_known(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("checkpointing.incarnation.BASE_RECORDS", 1)
    first = claimed(store, schedule={"schedule.max_steps": 80})
    assert first.shorten() is not None
    beaten(store, first, range(41, 50))
    owner = claimed(store, schedule={"schedule.max_steps": 80})
    records = [record for record in owner.records if record.index > 1]
    assert records[0].kind == "BASE"
    assert len(recorded_steps(store, records, 2, 40, 1)["steps"]) == 9


def test_steps_that_an_edit_decides_are_left_out(store: LocalStore) -> None:
    first = claimed(store)
    made = plan_of([unwritten_source("web", train=[400])])
    plan = {"plan": made.to_json(), "seed": 0, "context": 8, "global_batch_size": 2, "lanes": 8}
    first.append("PLAN", lambda _: {**plan, "from_step": 0})
    beaten(store, first, range(41, 60))
    owner = claimed(store)
    assert len(found(store, owner)["steps"]) == 19
    owner.append("PLAN", lambda _: {**plan, "from_step": 47})
    assert sorted(map(int, found(store, owner)["steps"])) == list(range(41, 48))
    later = claimed(store)
    later.append("PLAN", lambda _: {**plan, "from_step": 200})
    assert sorted(map(int, found(store, later)["steps"])) == list(range(41, 48))


def test_few_beats_are_read_however_many_starts_there_were(store: LocalStore) -> None:
    beaten(store, claimed(store), range(41, 50))
    for _ in range(MOST_GENERATIONS):
        owner = claimed(store)
        store.put(f"beats/g{owner.generation:04d}.json", canonical_json({"step": 0}))
    assert found(store, owner)["steps"] != {}
    assert found(store, claimed(store))["steps"] == {}
    assert found(store, owner, oldest=2)["steps"] == {}


# With the training program.


def interrupted(run: Path, interrupt: Interrupt, *arguments: str) -> None:
    """Step 8 is left in the middle, step 4 is saved; the last beat holds steps 1 to 7."""
    with pytest.raises(Interrupted):
        train_here("--run", run, *arguments, listener=interrupt("update:before", 8))


def resumed(run: Path, generation: int = 2) -> dict[str, Any]:
    content: dict[str, Any] = read_beat(LocalStore(run), generation)["proof"]["resume"]
    return content


def test_a_resumed_run_says_on_how_many_steps_it_is_verified(
    tmp_path: Path,
    data: tuple[str, ...],
    interrupt: Interrupt,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    interrupted(run, interrupt, *data, *SHAPE)
    assert train_here("--run", run, *data, *SHAPE) == 0
    shown = capsys.readouterr().err
    assert shown.count("resume verified on 3 replayed steps") == 1
    assert "rank 0 step 7] resume verified" in shown
    assert (resumed(run)["verified"], resumed(run)["from_step"]) == (True, 4)


def test_a_resume_in_two_processes_is_verified_on_the_steps_of_one(
    tmp_path: Path, data: tuple[str, ...], interrupt: Interrupt
) -> None:
    run = tmp_path / "run"
    interrupted(run, interrupt, *data, *SHAPE)
    with Program("--run", run, *data, *SHAPE, "--on_divergence=stop", world=2) as program:
        assert program.end() == 0, program.output()
        assert program.output().count("resume verified on 3 replayed steps") == 1


def test_stepping_back_to_an_older_checkpoint_compares_all_that_was_recorded(
    tmp_path: Path, data: tuple[str, ...], interrupt: Interrupt
) -> None:
    run = tmp_path / "run"
    listener = interrupt("update:before", 10)
    with pytest.raises(Interrupted):
        train_here("--run", run, *data, *SHAPE, listener=listener)
    [older, newer] = checkpoints(run)
    assert (older.step, newer.step) == (4, 8)
    for path in (run / newer.folder).glob("*.safetensors"):
        path.write_bytes(b"damaged")
    assert train_here("--run", run, *data, *SHAPE) == 0
    assert resumed(run)["from_step"] == 4
    assert (resumed(run)["recorded"], resumed(run)["verified"]) == (5, True)


@pytest.mark.parametrize(
    ("control", "step", "part"),
    [
        ("rng_key+generators", 5, "loss"),  # dropout without its key, and no state of generators
        ("cursor", 5, "samples"),
        ("learning_rate", 6, "loss"),  # the loss of a step is that before its update
        pytest.param("moments", 6, "loss", marks=pytest.mark.soak),
    ],
)
def test_a_part_of_the_state_that_is_left_out_shows_at_once(
    control: str,
    step: int,
    part: str,
    tmp_path: Path,
    data: tuple[str, ...],
    interrupt: Interrupt,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    with broken(control):
        interrupted(run, interrupt, *data, *SHAPE)
        assert train_here("--run", run, *data, *SHAPE) == 0
    difference = resumed(run)["difference"]
    assert (difference["step"], difference["part"]) == (step, part)
    assert f"step {step} is not what generation 1 made of it: its {part} is" in (
        capsys.readouterr().err
    )


def test_a_difference_that_stops_the_run_is_not_saved(
    tmp_path: Path,
    data: tuple[str, ...],
    interrupt: Interrupt,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, stop = tmp_path / "run", ("--on_divergence=stop", "--save_interval_steps=1")
    interrupted(run, interrupt, *data, *SHAPE)
    with broken("moments"):
        assert train_here("--run", run, *data, *SHAPE, *stop) == 78
    assert "error: step 6 is not what generation 1 made of it" in capsys.readouterr().err
    assert [c.step for c in checkpoints(run)] == [4], "step 5 looked right, and was not"
    assert train_here("--run", run, *data, *SHAPE, *stop) == 0
    assert resumed(run, 3)["verified"] is True
    assert resumed(run, 3)["recorded"] == 3, "also what the stopped one did not make again"
