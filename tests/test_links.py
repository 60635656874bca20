"""The loss of a host is noticed by every host that is left, and nothing else is taken for it."""

import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress

import pytest

from launch import links
from launch.links import watched_hosts
from tests.groups import ThreadGroup, on_ranks
from tests.hosts import enter_network, network

HOSTS = (range(0, 2), range(2, 3), range(3, 4))
"""Ranks by host."""


def host_of(rank: int) -> int:
    return next(number for number, ranks in enumerate(HOSTS) if rank in ranks)


def member(group: ThreadGroup) -> ThreadGroup:
    group.host_ranks = HOSTS[host_of(group.rank)]  # type: ignore[attr-defined]
    return group


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels ask after one second, and once more."""
    for name, value in {"IDLE_SECONDS": 1, "ASK_SECONDS": 1, "QUESTIONS": 2}.items():
        monkeypatch.setattr(links, name, value)


def losses(patience_seconds: float) -> dict[int, str]:
    """Who misses whom when host 2 is cut off; by rank, at the end of the patience at the latest."""
    lost: dict[int, str] = {}
    seen = threading.Event()
    linked = threading.Barrier(5)
    with network(3) as lan:

        def missing(rank: int) -> Callable[[str], None]:
            def tell(host: str) -> None:
                lost[rank] = host
                if len(lost) == 3:
                    seen.set()

            return tell

        def one(group: ThreadGroup) -> None:
            enter_network(lan[host_of(group.rank)].namespace)
            with watched_hosts(member(group), lan[0].address, missing(group.rank)):  # type: ignore[arg-type]
                linked.wait(60)
                seen.wait(patience_seconds)
                group.gather(None)

        def cut() -> None:
            linked.wait(60)
            lan[2].cut()

        threading.Thread(target=cut).start()
        assert on_ranks(4, one) == [None] * 4
    return lost


def test_a_host_that_is_cut_off_is_missed_by_all_and_misses_the_others(hasty: None) -> None:
    """Rank 2 hears of it from rank 0: it may be waiting for rank 3 alone."""
    assert losses(patience_seconds=60) == {0: "10.77.0.3", 2: "10.77.0.3", 3: "10.77.0.1"}


@pytest.mark.soak
def test_without_signs_of_life_nobody_is_missed(
    hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "_kept_alive", lambda link: link)
    assert losses(patience_seconds=15) == {}


def test_processes_that_end_are_not_taken_for_lost_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In order or killed: the others' ends close their sockets. And one host watches nothing."""
    lost: list[str] = []

    def one(group: ThreadGroup) -> None:
        with ExitStack() as stack:
            stack.enter_context(watched_hosts(member(group), "127.0.0.1", lost.append))  # type: ignore[arg-type]
            if group.rank == 2:
                stack.close()
            group.gather(None)

    assert on_ranks(4, one) == [None] * 4
    monkeypatch.setattr(links, "_listener", None)

    def alone(group: ThreadGroup) -> None:
        group.host_ranks = range(2)  # type: ignore[attr-defined]
        with watched_hosts(group, "", lost.append):  # type: ignore[arg-type]
            pass

    assert on_ranks(2, alone) == [None] * 2
    assert lost == []


def test_whoever_else_calls_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    listen = links._listener
    strangers: list[socket.socket] = []

    def called() -> socket.socket:
        listener = listen()
        stranger = socket.create_connection(("127.0.0.1", listener.getsockname()[1]))
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: somebody.example\r\n\r\n")
        strangers.append(stranger)
        return listener

    monkeypatch.setattr(links, "_listener", called)

    def one(group: ThreadGroup) -> None:
        with watched_hosts(member(group), "127.0.0.1", pytest.fail):  # type: ignore[arg-type]
            group.gather(None)

    assert on_ranks(4, one) == [None] * 4
    with strangers[0] as stranger, suppress(ConnectionResetError):
        assert stranger.recv(1) == b""


def test_where_ipv6_is_switched_off_ipv4_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    create = socket.create_server

    def without(address: tuple[str, int], **rest: object) -> socket.socket:
        if rest:
            raise OSError("Cannot assign requested address")
        return create(address)

    monkeypatch.setattr(socket, "create_server", without)

    def one(group: ThreadGroup) -> None:
        with watched_hosts(member(group), "127.0.0.1", pytest.fail):  # type: ignore[arg-type]
            group.gather(None)

    assert on_ranks(4, one) == [None] * 4


def test_a_network_that_lets_no_connection_through_is_told_of_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(links, "_JOIN_SECONDS", 0.05)

    def refuse(*place: object, **rest: object) -> socket.socket:
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr(socket, "create_connection", refuse)

    def one(group: ThreadGroup) -> None:
        with watched_hosts(member(group), "127.0.0.1", pytest.fail):  # type: ignore[arg-type]
            pass

    assert on_ranks(4, one) == [None] * 4
    assert "the loss of a host will be noticed late" in caplog.text
