"""Looking ahead: what is under way always, what comes as far as there is room."""

from pathlib import Path

import pytest

from data_service.download import Remote
from data_service.upcoming import AHEAD, look_ahead
from tests.made_lanes import Lanes, Visit, made_objects


@pytest.fixture
def remotes(tmp_path: Path) -> list[Remote]:
    return made_objects(tmp_path, [100] * 12)[1]


def lane_of(*remotes: Remote, start: int = 0) -> list[Visit]:
    return [Visit(start + 2 * n, start + 2 * n + 2, r) for n, r in enumerate(remotes)]


def test_what_comes_is_in_order_and_within_the_room(remotes: list[Remote]) -> None:
    lanes = Lanes([lane_of(*remotes[:6]), lane_of(*remotes[6:], start=1)])
    size = remotes[0].size_bytes
    wanted, opens_at = look_ahead(lanes, 2, 5 * size)
    assert [remote for _, remote in wanted] == [remotes[n] for n in (6, 1, 7, 2, 8)]
    assert [step for step, _ in wanted] == [2, 2, 3, 4, 5]
    assert opens_at == 3


def test_what_is_under_way_is_wanted_whatever_the_room(remotes: list[Remote]) -> None:
    lanes = Lanes([lane_of(*remotes[:6]), lane_of(*remotes[6:])])
    wanted, _ = look_ahead(lanes, 0, 0)
    assert {remote for _, remote in wanted} == {remotes[0], remotes[6]}


def test_an_object_that_comes_again_counts_once(remotes: list[Remote]) -> None:
    lanes = Lanes([lane_of(*(remotes[:3] * 30))])
    wanted, opens_at = look_ahead(lanes, 0, 10**9)
    assert [remote for _, remote in wanted] == remotes[:3]
    assert opens_at == 2


def test_no_more_is_held_than_descriptors_allow(tmp_path: Path) -> None:
    remotes = made_objects(tmp_path, range(70, 70 + AHEAD + 20))[1]
    wanted, _ = look_ahead(Lanes([lane_of(*remotes)]), 0, 10**9)
    assert len(wanted) == 1 + AHEAD
