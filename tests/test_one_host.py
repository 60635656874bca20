from pathlib import Path

import pytest

from launch.chaos.one_host import ONE_HOST
from launch.chaos.scenarios import Ground, lacking
from tests.forks import ROOT

SCENARIOS = {scenario.name: scenario for scenario in ONE_HOST}

LEFT = "program-0 is over, and left behind process "


def test_names_and_descriptions_are_unique() -> None:
    assert len(SCENARIOS) == len(ONE_HOST) == len({scenario.about for scenario in ONE_HOST})


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("chaos"))


@pytest.mark.soak
@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_violated(name: str, ground: Ground) -> None:
    if why_not := lacking(SCENARIOS[name].needs):
        pytest.skip(why_not)
    result = ground.play(SCENARIOS[name])
    assert result.outcome == "passed", f"{result.folder}: {result.violations}"


@pytest.mark.soak
@pytest.mark.parametrize(
    ("control", "name", "said"),
    [
        ("fence", "stale-writer", "program-0 ended with 0, expected 76"),
        ("pdeathsig", "sigkill-torchrun", LEFT),
        ("abandoned", "sigkill-supervisor-start", (LEFT, "the rank has begun to train, and nob")),
        ("owner", "two-jobs", "program-0 ended before a rank came to where it was to stop"),
    ],
)
def test_without_a_mechanism_its_scenario_fails(
    control: str, name: str, said: str | tuple[str, ...], tmp_path: Path
) -> None:
    """The negative controls."""
    program = (str(ROOT / "tests" / "chaos_control.py"), control)
    result = Ground(tmp_path, training_program=program).play(SCENARIOS[name])
    assert result.outcome == "failed"
    (violation,) = result.violations
    assert violation.startswith(said), violation
