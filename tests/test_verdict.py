"""Each kind of violation is found in a run that has it alone; a run without any is clean."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch.chaos import trial as trial_module
from launch.chaos.trial import Trial
from launch.chaos.verdict import Reference, judge, reference
from storage.log import Draft, Log
from storage.store import open_store
from tests.programs import train_here


@pytest.fixture(scope="module")
def unbroken(
    data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trial, Reference]:
    trial = Trial(tmp_path_factory.mktemp("verdict") / "unbroken", data, name="unbroken")
    assert train_here(*trial.flags) == 0
    return trial, reference(trial)


@pytest.fixture
def trial(unbroken: tuple[Trial, Reference], tmp_path: Path) -> Trial:
    """Another with the same run, to be spoiled."""
    made = Trial(tmp_path / "trial", (), name="spoiled")
    shutil.copytree(unbroken[0].run, made.run)
    return made


def spoil_digest(trial: Trial) -> None:
    """The last record, END, is of another run."""
    (record,) = sorted(Path(trial.run, "log").glob("*.json"))[-1:]
    record.unlink()


def repeat_step(trial: Trial) -> None:
    lines = trial.curves.read_text().splitlines(keepends=True)
    trial.curves.write_text("".join([*lines[:7], *lines[6:]]))


def lose_step(trial: Trial) -> None:
    lines = trial.curves.read_text().splitlines(keepends=True)
    trial.curves.write_text("".join([*lines[:6], *lines[7:]]))


def change_loss(trial: Trial) -> None:
    rows = [json.loads(line) for line in trial.curves.read_text().splitlines()]
    rows[6]["loss"] += 1e-15
    trial.curves.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lose_evaluation(trial: Trial) -> None:
    rows = [json.loads(line) for line in trial.curves.read_text().splitlines()]
    del rows[9]["validation_loss"]
    trial.curves.write_text("".join(json.dumps(row) + "\n" for row in rows))


def find_damage(trial: Trial) -> None:
    """A start steps back to an older checkpoint; in the end all is as it must be."""
    log = Log(open_store(trial.run))
    body = {"checkpoints": [], "reason": "rank 0: an object is not there"}
    log.append(lambda records: Draft(kind="QUARANTINE", generation=1, body=body))


def lose_curve(trial: Trial) -> None:
    trial.curves.unlink()


def damage_checkpoint(trial: Trial) -> None:
    newest = sorted(Path(trial.run, "checkpoints").glob("*/*"))[-1]
    path = max(newest.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def lose_commits(trial: Trial) -> None:
    for path in Path(trial.run, "log").glob("*.json"):
        if json.loads(path.read_text())["kind"] in ("COMMIT", "END", "RETIRE"):
            path.unlink()


def leave_a_process(trial: Trial) -> None:
    trial.start(["sh", "-c", "(setsid sleep 1000 &)"]).end(0)


def show_a_traceback(trial: Trial) -> None:
    trial.start(["python3", "-c", "raise ValueError"]).end(1)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_digest, ["the run has not come to its end"]),
        (repeat_step, ["the curve has steps [7] twice and lacks []"]),
        (lose_step, ["the curve has steps [] twice and lacks [7]"]),
        (change_loss, ["the loss of step 7 is "]),
        (lose_evaluation, ["the validation_loss of step 10 is None, expected "]),
        (find_damage, ["a checkpoint was committed that is not whole: rank 0: an object is "]),
        (lose_curve, ["the curve cannot be read: "]),
        (damage_checkpoint, ["the newest checkpoint is damaged: "]),
        (
            lose_commits,
            [
                "the run has not come to its end",
                "the audit: NOT PROVED: nothing is committed yet",
                "there is no checkpoint",
            ],
        ),
        (leave_a_process, ["program-0 is over, and left behind process "]),
        (show_a_traceback, ["program-0 shows a traceback"]),
    ],
)
def test_each_violation_is_found_alone(
    spoil: Callable[[Trial], None],
    said: list[str],
    trial: Trial,
    unbroken: tuple[Trial, Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trial_module, "ORPHAN_SECONDS", 0.1)
    with trial:
        assert judge(trial, unbroken[1]) == []
        spoil(trial)
        found = judge(trial, unbroken[1])
    assert len(found) == len(said), found
    assert all(one.startswith(begin) for one, begin in zip(found, said, strict=True)), found


def test_other_bits_than_the_unbroken_runs_are_found(
    trial: Trial, unbroken: tuple[Trial, Reference]
) -> None:
    right = unbroken[1]
    with trial:
        (found,) = judge(trial, replace(right, digest="0" * 64))
        assert found.startswith("the digest at the end is ") and found.endswith("000000000000")
        other = {**right.proofs, 5: bytes(24), 9: bytes(24)}
        (found,) = judge(trial, replace(right, proofs=other))
        assert found == "generation 1 made other bits of 2 steps, first of step 5"


def test_a_run_that_cannot_be_read_is_no_success(
    trial: Trial, unbroken: tuple[Trial, Reference]
) -> None:
    shutil.rmtree(trial.run)
    with trial:
        found = judge(trial, unbroken[1])
    assert found[0].startswith("the run ") and len(found) > 1


def test_a_traceback_that_is_expected_is_no_violation(
    trial: Trial, unbroken: tuple[Trial, Reference]
) -> None:
    trial.may_show_tracebacks = True
    with trial:
        show_a_traceback(trial)
        assert judge(trial, unbroken[1]) == []
