"""The scenarios of containers: nothing is violated."""

import pytest

from launch.chaos.containers import CONTAINERS
from launch.chaos.scenarios import Ground, lacking

SCENARIOS = {scenario.name: scenario for scenario in CONTAINERS}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("containers"))


@pytest.mark.soak
@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_violated(name: str, ground: Ground) -> None:
    if why_not := lacking(SCENARIOS[name].needs):
        pytest.skip(why_not)
    result = ground.play(SCENARIOS[name])
    assert result.outcome == "passed", f"{result.folder}: {result.violations}"


def test_every_scenario_says_what_it_needs() -> None:
    needs = {name: scenario.needs for name, scenario in SCENARIOS.items()}
    assert needs["clock-jumps"] == frozenset()
    assert "cgroup" in needs["little-memory"] and "users" in needs["nobody"]
