from pathlib import Path

import pytest

from launch.chaos.scenarios import Ground
from launch.chaos.soak import MARGIN_STEPS, drawn, shape, soak

FAULTS = 60
"""Four minutes; `python -m launch.chaos --faults 200` deals more."""


def test_the_seed_decides_the_faults() -> None:
    assert drawn(3, 200) == drawn(3, 200)
    assert drawn(3, 200) != drawn(4, 200)
    assert drawn(3, 50)[:20] == drawn(3, 200)[:20]


@pytest.mark.parametrize("seed", range(5))
def test_so_many_faults_are_drawn_as_were_asked_for(seed: int) -> None:
    for count in (1, 2, 3, 50, 200):
        assert sum(len(blow.faults) for blow in drawn(seed, count)) == count


def test_every_kind_of_fault_phase_and_world_is_drawn() -> None:
    blows = drawn(0, 200)
    assert len({fault for blow in blows for fault in blow.faults}) == 8
    assert {blow.world for blow in blows} == {1, 2, 3, 4}
    assert {"import", "claim", "restore", "micro_batch", "save:object", "evaluate"} <= {
        blow.phase for blow in blows
    }


@pytest.mark.parametrize("seed", range(20))
def test_what_is_drawn_can_be_dealt(seed: int) -> None:
    """Phases of a start follow the end of one; steps grow; two deaths in starts at most."""
    early, step, world = 0, 0, 0
    starting, another = True, True
    for blow in drawn(seed, 200):
        assert another or blow.world == world
        if blow.step == 0:
            early += 1
            assert starting and early <= 2
        else:
            assert blow.step > step
            early, step = 0, blow.step
        starting, another, world = blow.ends_start, blow.ends_supervisor, blow.world
    assert shape(drawn(seed, 200))[-1] == f"--max_steps={step + MARGIN_STEPS}"


@pytest.mark.soak
def test_a_run_ends_as_the_unbroken_one_after_many_random_faults(tmp_path: Path) -> None:
    blows = drawn(0, FAULTS)
    result = Ground(tmp_path, shape=shape(blows)).play(soak(blows))
    assert result.outcome == "passed", f"seed 0, {result.folder}: {result.violations}"
