"""The three pages over HTTP, and what they say of a run."""

import json
import socket
import struct
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from launch.health import SILENT_SECONDS, Condition, Health
from launch.outcome import outcome
from launch.reporting import Reporter, Reports
from storage.errors import ConfigurationError


class World:
    """A supervisor's view of one rank, with a clock that is set."""

    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.condition = Condition(lambda: self.now)
        self.reports = Reports(str(folder / "reports"))
        self.rank = Reporter(self.reports.path, 0)

    def look(self) -> None:
        self.reports.hear()
        self.condition.looked(self.reports)

    def close(self) -> None:
        for each in (self.reports, self.rank):
            each.__exit__(None, None, None)


@pytest.fixture
def world(tmp_path: Path) -> "object":
    made = World(tmp_path)
    yield made
    made.close()


def ask(health: Health, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{health.port}{path}") as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_the_pages_follow_a_start(world: World) -> None:
    with Health(0, world.condition) as health:
        assert ask(health, "/healthz") == (200, "ok\n")
        assert ask(health, "/readyz")[0] == 503, "nothing has begun"
        world.condition.started()
        for phase, step, ready in (("restore", 0, 503), ("step", 40, 503), ("step", 41, 200)):
            world.rank.place(phase, step)
            world.look()
            assert ask(health, "/readyz")[0] == ready, (phase, step)
            assert ask(health, "/healthz")[0] == 200
        world.condition.ended(outcome(world.reports, 1, noticed=False))
        assert ask(health, "/readyz")[0] == 503
        assert ask(health, "/elsewhere")[0] == 404


def test_liveness_never_judges_the_speed_of_steps(world: World) -> None:
    world.condition.started()
    world.rank.place("step", 40)
    for _ in range(100):
        world.now += SILENT_SECONDS / 2
        world.look()
        assert world.condition.alive


def test_a_supervisor_that_waits_for_other_hosts_is_alive(world: World) -> None:
    world.condition.started()
    world.now += 10 * SILENT_SECONDS
    assert world.condition.alive


def test_a_supervisor_that_looks_no_more_is_not_alive(world: World) -> None:
    world.condition.started()
    world.look()
    world.now += SILENT_SECONDS + 1
    assert not world.condition.alive
    world.look()
    assert world.condition.alive
    world.condition.ended(outcome(world.reports, 1, noticed=False))
    world.now += 10 * SILENT_SECONDS
    assert world.condition.alive, "between starts there is nothing to look at"


def test_prometheus_reads_the_metrics(world: World) -> None:
    world.condition.started()
    world.rank.place("step", 40)
    world.rank.run("runs/a", 3)
    world.rank.row({"step": 41, "loss": 2.5, "samples": ["text"]})
    world.look()
    world.condition.ended(outcome(world.reports, 1, noticed=False))
    world.condition.started()
    world.look()
    with Health(0, world.condition) as health:
        status, text = ask(health, "/metrics")
    found = {
        (s.name, *s.labels.values()): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    assert status == 200
    assert found == {
        ("rangeflow_starts_total",): 2,
        ("rangeflow_ends_total", "70"): 1,
        ("rangeflow_ranks",): 1,
        ("rangeflow_ready",): 0,
        ("rangeflow_generation",): 3,
        ("rangeflow_step",): 40,
        ("rangeflow_row", "loss"): 2.5,
        ("rangeflow_row", "step"): 41,
    }, json.dumps({str(k): v for k, v in found.items()})


def test_without_the_extra_the_page_names_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with Health(0, world.condition) as health:
        status, text = ask(health, "/metrics")
        assert status == 501 and "pip install 'rangeflow[health]'" in text
        assert ask(health, "/healthz")[0] == 200


def test_a_port_that_is_taken_is_refused(world: World) -> None:
    with (
        Health(0, world.condition) as health,
        pytest.raises(ConfigurationError, match=r"--health_port \d+ cannot be used: Address"),
    ):
        Health(health.port, world.condition)


def test_a_client_that_goes_away_leaves_no_trace(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    with Health(0, world.condition) as health:
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", health.port)) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert ask(health, "/healthz")[0] == 200  # whoever came before has been heard
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="the host has no IPv6")
def test_it_is_served_by_ipv6_as_well(world: World) -> None:
    with Health(0, world.condition) as health:
        socket.create_connection(("::1", health.port), 30).close()
        assert ask(health, "/healthz")[0] == 200
