import shutil
from pathlib import Path

import pytest

from launch.chaos import scenarios
from launch.chaos.scenarios import Ground, Scenario, lacking, skipped
from launch.chaos.trial import Trial, Violation


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("ground"))


def scenario(act: object, name: str = "made") -> Scenario:
    return Scenario(name=name, about="made for a test", act=act)  # type: ignore[arg-type]


def take_the_unbroken(ground: Ground, trial: Trial) -> None:
    shutil.copytree(ground.folder / "unbroken" / "run", trial.run)


def test_what_ends_as_the_unbroken_run_has_passed_and_is_removed(ground: Ground) -> None:
    drawn: list[float] = []

    def act(trial: Trial) -> None:
        drawn.append(trial.random.random())
        trial.fault("none at all")
        take_the_unbroken(ground, trial)

    result = ground.play(scenario(act), repetition=2, seed=5)
    assert (result.outcome, result.violations, result.faults) == ("passed", (), ("none at all",))
    assert result.folder == "" and not (ground.folder / "made-2").exists()
    kept = ground.play(scenario(act), repetition=2, seed=5, keep=True)
    assert Path(kept.folder, "run").is_dir()
    ground.play(scenario(act), repetition=3, seed=5)
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_is_wrong_at_the_end_has_failed_and_is_kept(ground: Ground) -> None:
    def act(trial: Trial) -> None:
        take_the_unbroken(ground, trial)
        trial.curves.unlink()

    result = ground.play(scenario(act, "wrong"))
    assert result.outcome == "failed"
    assert result.violations[0].startswith("the curve cannot be read")
    assert Path(result.folder, "run").is_dir()


def test_a_violation_on_the_way_is_told_alone(ground: Ground) -> None:
    def act(trial: Trial) -> None:
        trial.start(["sleep", "1000"])
        raise Violation("it ended with 3")

    assert ground.play(scenario(act, "on-the-way")).violations == ("it ended with 3",)


def test_a_scenario_that_fails_itself_passes_nothing(ground: Ground) -> None:
    def act(trial: Trial) -> None:
        raise KeyError("nothing")

    result = ground.play(scenario(act, "defect"))
    assert result.violations == ("the scenario itself failed: 'nothing'",)
    assert "KeyError" in Path(result.folder, "scenario.txt").read_text()


def test_what_is_lacking_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lacking(frozenset()) == ""
    monkeypatch.setattr(scenarios.os, "geteuid", lambda: 1000)
    assert lacking(frozenset({"root"})) == "it needs root"
    monkeypatch.setenv("PATH", "")
    assert "unshare" in lacking(frozenset({"network"}))
    result = skipped(scenario(None), 1, 2, "it needs root")
    assert (result.outcome, result.why_skipped) == ("skipped", "it needs root")
