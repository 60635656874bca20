"""What a rank says to the supervisor of its host, over a real socket."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.reporting import VARIABLE, Place, Reporter, Reports, reporter, started_by_torchrun
from storage.errors import RunBusyError, StoreUnavailableError


@pytest.fixture
def reports(tmp_path: Path) -> Iterator[Reports]:
    with Reports(str(tmp_path / "reports")) as made:
        yield made


def heard(reports: Reports) -> list[tuple[int, str, int]]:
    news: list[tuple[int, str, int]] = []
    reports.hear(lambda rank, place: news.append((rank, place.phase, place.step)))
    return news


def test_each_phase_is_heard_once_in_order(reports: Reports) -> None:
    with Reporter(reports.path, 1) as rank:
        for phase, step in (("open", 0), ("micro_batch", 3), ("micro_batch", 3), ("step", 4)):
            rank.place(phase, step)
    assert heard(reports) == [
        (1, "start", 0),
        (1, "open", 0),
        (1, "micro_batch", 3),
        (1, "step", 4),
    ]
    assert reports.places == {1: Place(pid=os.getpid(), phase="step", step=4)}
    assert reports.highest_step == 4
    reports.begin()
    assert (reports.places, reports.highest_step) == ({}, 0)


def test_the_run_is_heard(reports: Reports) -> None:
    with Reporter(reports.path, 0) as rank:
        rank.run("gs://bucket/run", 7)
    reports.hear()
    assert (reports.run, reports.generation) == ("gs://bucket/run", 7)


def test_rows_are_sent_at_most_once_a_second_and_only_numbers(reports: Reports) -> None:
    seconds = iter([0.0, 0.0, 0.9, 1.0, 1.0])  # looked at once more where a row is sent
    with Reporter(reports.path, 0, lambda: next(seconds)) as rank:
        for loss in (3.0, 2.0, 1.0):
            rank.row({"loss": loss, "samples": [{"prompt": "x"}]})
    reports.hear()
    assert reports.row == {"loss": 1.0}


@pytest.mark.parametrize(
    ("code", "error", "own", "lost"),
    [
        (0, None, False, False),
        (75, None, False, False),
        (75, StoreUnavailableError("no  answer\nat all"), False, False),
        (75, RunBusyError("x"), False, False),
        (70, ZeroDivisionError("x"), True, False),
        (75, RuntimeError("gloo/transport/tcp/pair.cc: x"), False, True),
    ],
)
def test_the_last_word_says_code_and_error(
    code: int, error: Exception | None, own: bool, lost: bool, reports: Reports
) -> None:
    with Reporter(reports.path, 2) as rank:
        assert rank.ended(code, error) == code
    reports.hear()
    (said,) = reports.exits
    assert (said.rank, said.code, said.own, said.lost_a_peer) == (2, code, own, lost)
    assert said.kind == type(error).__name__
    assert "\n" not in said.error and (error is None) == (said.error == "")


@pytest.mark.parametrize("path", [None, "/nonexistent/reports"])
def test_without_a_supervisor_nothing_is_sent(path: str | None) -> None:
    with Reporter(path, 0) as rank:
        rank.place("step", 1)
        rank.row({"loss": 1.0})
        assert rank.ended(75) == 75


def test_a_rank_knows_that_its_supervisor_is_gone(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with Reports(path), Reporter(path, 0) as rank, Reporter(None, 0) as alone:
        assert not rank.abandoned and not alone.abandoned
    with Reporter(path, 0) as late:  # as SIGKILL leaves it: the socket is there, and nobody hears
        assert late.abandoned
        assert late.ended(75) == 75


def test_a_supervisor_that_does_not_listen_holds_up_nobody(reports: Reports) -> None:
    with Reporter(reports.path, 0) as rank:
        for step in range(10_000):  # far more than the socket takes
            rank.place("step", step)
    assert 0 < len(heard(reports)) < 10_000


def test_what_makes_no_sense_is_left_out(reports: Reports) -> None:
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    stranger.connect(reports.path)
    for data in (b"", b"\xff", b"[]", b"3", b"{}", b'{"rank": "x"}', b'{"rank": 0, "exit": null}'):
        stranger.send(data)
    for data in (
        b'{"rank": 1e999}',
        b"[" * 60_000,
        b'{"rank": 0, "row": {"x": %s}}' % (b"9" * 400),
    ):
        stranger.send(data)
        assert heard(reports) == []
    stranger.send(b'{"rank": 0, "local_rank": 0, "pid": 5, "phase": "open", "step": 0}')
    stranger.close()
    assert heard(reports) == [(0, "open", 0)]


def test_the_environment_names_socket_and_rank(
    reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, reports.path)
    monkeypatch.setenv("RANK", "3")
    with reporter():
        assert heard(reports) == [(3, "start", 0)]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert not started_by_torchrun()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert started_by_torchrun()
