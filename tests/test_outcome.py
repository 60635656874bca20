"""What a start came to, by what its ranks said and how torchrun ended."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.agent import NOT_REACHED
from launch.exit_codes import exit_code
from launch.links import HostLostError
from launch.outcome import Outcome, outcome
from launch.reporting import Reporter, Reports
from storage.errors import (
    ConfigurationError,
    FencedError,
    RunBusyError,
    StoreUnavailableError,
    UnlikeHostsError,
)

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:1")


class Ranks:
    """Ranks of this process, which report to a supervisor of this process."""

    def __init__(self, folder: Path, count: int) -> None:
        self.reports = Reports(str(folder / "reports"))
        self.ranks = [Reporter(self.reports.path, rank) for rank in range(count)]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error: object) -> None:
        for each in (self.reports, *self.ranks):
            each.__exit__(None, None, None)

    def end(self, rank: int, error: BaseException | int) -> None:
        if isinstance(error, int):
            self.ranks[rank].ended(error)
        else:
            self.ranks[rank].ended(exit_code(error), error)

    def outcome(
        self, status: int, *, noticed: bool = False, hang: str = "", several_hosts: bool = False
    ) -> Outcome:
        self.reports.hear()
        return outcome(
            self.reports, status, noticed=noticed, hang=hang, several_hosts=several_hosts
        )


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Ranks]:
    with Ranks(tmp_path, 2) as ranks:
        yield ranks


def test_a_complete_run_is_complete_also_after_a_notice(two: Ranks) -> None:
    two.end(0, 0)
    two.end(1, 0)
    assert two.outcome(0).code == 0
    assert two.outcome(0, noticed=True).code == 0
    assert two.outcome(-9).code == 0, "torchrun was killed after its ranks had ended"


def test_a_stop_that_an_operator_asked_for_is_told_from_a_complete_run(two: Ranks) -> None:
    assert two.outcome(0).cause == "complete"
    for rank in (0, 1):
        two.ranks[rank].stopped()
        two.end(rank, 0)
    came = two.outcome(0)
    assert (came.code, came.cause) == (0, "stopped, as an operator asked")


def test_a_rank_that_died_without_a_word_completes_nothing(two: Ranks) -> None:
    two.end(0, 0)
    assert two.outcome(1).code == 70


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (StoreUnavailableError("x"), ConfigurationError("y"), 78),
        (FencedError("x"), StoreUnavailableError("y"), 76),
        (FencedError("x"), ConfigurationError("y"), 78),
        (ZeroDivisionError("x"), LOST, 75),
        (LOST, ZeroDivisionError("x"), 75),
        (ZeroDivisionError("x"), ZeroDivisionError("y"), 70),
        (75, 75, 75),
    ],
)
def test_when_ranks_differ_the_code_that_matters_most_wins(
    first: BaseException | int, second: BaseException | int, code: int, two: Ranks
) -> None:
    two.end(0, first)
    two.end(1, second)
    assert two.outcome(1).code == code


def test_the_cause_is_the_first_error_of_a_ranks_own_and_no_secondary_one(two: Ranks) -> None:
    two.end(0, LOST)
    two.end(1, ZeroDivisionError("the cause"))
    came = two.outcome(1)
    assert came.cause == came.ended.error == "rank 1: ZeroDivisionError: the cause"


def test_the_first_of_two_errors_is_the_cause(two: Ranks) -> None:
    two.end(1, ZeroDivisionError("the first"))
    two.end(0, ZeroDivisionError("the second"))
    assert two.outcome(1).cause == "rank 1: ZeroDivisionError: the first"


def test_peers_that_all_lost_one_another_left_in_no_order(two: Ranks) -> None:
    two.end(0, LOST)
    two.end(1, LOST)
    assert not two.outcome(1).ended.in_order


def test_a_lost_peer_alone_is_no_error_and_no_orderly_end(two: Ranks) -> None:
    two.ranks[0].place("reduce", 7)
    two.end(0, LOST)
    came = two.outcome(1)
    assert (came.code, came.ended.error, came.ended.in_order) == (75, "", False)
    assert came.cause == "rank 0 lost another process of the world", "not gloo's words about it"
    assert (came.ended.phase, came.ended.step) == ("reduce", 7)


def test_a_store_out_of_reach_is_an_orderly_end(two: Ranks) -> None:
    for rank in range(2):
        two.end(rank, StoreUnavailableError("no answer"))
    came = two.outcome(1)
    assert (came.code, came.ended.error, came.ended.in_order) == (75, "", True)
    assert came.cause == "StoreUnavailableError: no answer"


def test_another_owner_is_named_and_is_no_error(two: Ranks) -> None:
    for rank in range(2):
        two.end(rank, RunBusyError("in use by generation 4 on host b, in phase 'step' at step 9"))
    came = two.outcome(1)
    assert came.busy and came.code == 75 and came.ended.in_order
    assert "generation 4 on host b, in phase 'step' at step 9" in came.cause


def test_arguments_that_torchrun_does_not_take_are_said_to_be_the_cause(tmp_path: Path) -> None:
    with Ranks(tmp_path, 0) as ranks:
        came = ranks.outcome(78)
    assert came.code == 78
    assert "torchrun does not take its arguments, see above; write `--` before" in came.cause


@pytest.mark.parametrize(("status", "code"), [(1, 70), (70, 70), (75, 75), (78, 78), (-9, 70)])
def test_without_a_word_of_a_rank_torchruns_end_counts(
    status: int, code: int, tmp_path: Path
) -> None:
    with Ranks(tmp_path, 0) as ranks:
        came = ranks.outcome(status)
    assert (came.code, came.ended.phase) == (code, "torchrun")
    assert not came.ended.in_order


def test_hosts_that_were_lost_or_not_met_are_no_defect_of_this_one(
    two: Ranks, tmp_path: Path
) -> None:
    for rank in range(2):
        two.end(rank, HostLostError("10.77.0.3 has not answered for 20 s"))
    came = two.outcome(1, several_hosts=True)
    assert (came.code, came.ended.in_order) == (75, True)
    assert came.cause == "HostLostError: 10.77.0.3 has not answered for 20 s"
    assert not two.outcome(-9, several_hosts=True).ended.in_order, "torchrun was killed"
    (tmp_path / "none").mkdir()
    with Ranks(tmp_path / "none", 0) as none:
        assert none.outcome(75, several_hosts=True).ended.in_order
        assert not none.outcome(70, several_hosts=True).ended.in_order


def test_a_place_that_torchrun_cannot_connect_to_is_told_from_ranks_that_lost_it(
    two: Ranks, tmp_path: Path
) -> None:
    (tmp_path / "none").mkdir()
    with Ranks(tmp_path / "none", 0) as none:
        came = none.outcome(NOT_REACHED, several_hosts=True)
        assert (came.code, came.ended.in_order, came.not_reached) == (75, True, True)
        assert not none.outcome(75, several_hosts=True).not_reached
    came = two.outcome(NOT_REACHED, several_hosts=True)
    assert (came.code, came.not_reached) == (75, False), "they had met"


def test_hosts_that_cannot_train_together_are_told_from_another_mistake(two: Ranks) -> None:
    two.end(0, ConfigurationError("x"))
    assert not two.outcome(1, several_hosts=True).unlike
    two.end(1, UnlikeHostsError("rank 1 has another torch"))
    came = two.outcome(1, several_hosts=True)
    assert (came.code, came.unlike) == (78, True)


def test_a_rank_of_this_host_that_died_without_a_word_is_its_defect(two: Ranks) -> None:
    two.end(0, LOST)
    assert not two.outcome(1, several_hosts=True).ended.in_order


def test_a_notice_is_75_unless_a_person_must_look(two: Ranks) -> None:
    assert two.outcome(-9, noticed=True).code == 75, "killed at the deadline"
    two.end(0, ZeroDivisionError("x"))
    assert two.outcome(1, noticed=True).code == 75
    two.end(1, ConfigurationError("x"))
    assert two.outcome(1, noticed=True).code == 78


def test_a_hang_is_an_error_of_the_starts_own(two: Ranks) -> None:
    two.ranks[1].place("reduce", 7)
    came = two.outcome(-9, hang="rank 1 hangs")
    assert (came.code, came.cause, came.ended.error) == (70, "rank 1 hangs", "rank 1 hangs")


def test_progress_is_the_highest_step_of_any_rank(two: Ranks) -> None:
    two.ranks[0].place("step", 3)
    two.ranks[1].place("step", 4)
    two.ranks[0].run("runs/a", 6)
    came = two.outcome(-9)
    assert (came.ended.reached, came.ended.generation, came.run) == (4, 6, "runs/a")
    assert came.cause == "torchrun was ended by SIGKILL"
