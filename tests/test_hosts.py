"""Hosts are apart as machines are, can be cut off and lose power, and leave nothing behind."""

import json
import socket
import sys
from pathlib import Path

import pytest

from checkpointing.owner import provably_gone
from launch.chaos.hosts import GATEWAY, Network, processes_of
from launch.chaos.marked import state
from tests.hosts import Running, inside, network, python

SERVE = "import socket as s; l = s.create_server(('', 7)); print('up', flush=True); l.accept()"
REACH = """
import socket, sys
socket.create_connection((sys.argv[1], 7), timeout=float(sys.argv[2]))
"""
IDENTITY = (
    "import json; from checkpointing.owner import this_process; print(json.dumps(this_process()))"
)


def reaches(lan: Network, source: int, target: int, seconds: float = 60.0) -> bool:
    return python(lan[source], "-c", REACH, lan[target].address, str(seconds)).end() == 0


def space_of(lan: Network, number: int) -> str:
    return lan[number].call("readlink", "/proc/self/ns/pid").strip()


def test_a_link_is_cut_and_healed_and_a_host_loses_power() -> None:
    with network(3) as lan:
        servers = [python(host, "-c", SERVE) for host in lan.hosts]
        for server in servers:
            server.says("up")
        assert reaches(lan, 0, 1)
        lan[2].cut()
        assert not reaches(lan, 0, 2, 0.3) and not reaches(lan, 2, 0, 0.3)
        lan[2].heal()
        assert reaches(lan, 0, 2)
        dead = space_of(lan, 1)
        assert processes_of(dead)
        lan[1].kill()
        assert processes_of(dead) == []
        assert "up" in servers[1].output()
    assert processes_of(dead) == []


def test_a_host_is_frozen_and_thawed_and_ends_frozen() -> None:
    with network(1) as lan:
        server = python(lan[0], "-c", SERVE)
        server.says("up")
        lan[0].freeze()
        assert state(server.pid) == "T"
        here = (lan[0].address, 7)
        inside(lan, lambda: socket.create_connection(here, timeout=60.0)).close()
        lan[0].thaw()
        assert server.end() == 0
        other = python(lan[0], "-c", SERVE)
        other.says("up")
        lan[0].freeze()
        lan[0].end()
        assert other.end() != 0


def test_hosts_leave_nothing_behind_when_a_test_fails() -> None:
    spaces = []
    links = Path("/sys/class/net")
    before = {path.name for path in links.iterdir()}
    with pytest.raises(ZeroDivisionError), network(2) as lan:
        Running(lan[0], "sh", "-c", "sleep 1000 & sleep 1000 & echo begun; wait").says("begun")
        spaces = [space_of(lan, 0), space_of(lan, 1)]
        raise ZeroDivisionError
    assert [processes_of(space) for space in spaces] == [[], []]
    assert {path.name for path in links.iterdir()} == before


def test_no_host_takes_a_process_of_another_for_its_own() -> None:
    """They share the boot id; another process namespace is another host."""
    with network(2) as lan:
        identities = [json.loads(host.call(sys.executable, "-c", IDENTITY)) for host in lan.hosts]
    assert [identity["host"] for identity in identities] == ["host0", "host1"]
    assert identities[0]["boot_id"] == identities[1]["boot_id"]
    assert identities[0]["pid_namespace"] != identities[1]["pid_namespace"]
    assert not provably_gone(identities[0]), "nor does this machine"


def test_a_server_of_the_test_listens_on_the_bridge() -> None:
    with network(1) as lan, inside(lan, lambda: socket.create_server((GATEWAY, 0))) as server:
        port = server.getsockname()[1]
        call = f"import socket; socket.create_connection(('{GATEWAY}', {port})).sendall(b'hi')"
        caller = python(lan[0], "-c", call)
        connection, (address, _) = server.accept()
        with connection:
            assert (connection.recv(10), address) == (b"hi", lan[0].address)
        assert caller.end() == 0
