"""Notices of three clouds' metadata services, over HTTP, however badly these behave."""

import threading
from datetime import datetime
from pathlib import Path

import pytest

import launch.metadata
from launch.metadata import (
    FIRST_RETRY_SECONDS,
    LONGEST_RETRY_SECONDS,
    MARGIN_SECONDS,
    Aws,
    Azure,
    Gce,
    NoticeWatch,
    clouds,
    watch,
    watch_file,
)
from tests.metadata_server import MetadataServer

CLOUDS = ("gce", "aws", "azure")
NOON = datetime.fromisoformat("2026-11-21T12:00:00Z").timestamp()


class Watcher:
    """Watches in this thread, with waits that only count, until there was a notice or enough."""

    def __init__(self, looks: int = 20) -> None:
        self.told: list[tuple[str, float | None]] = []
        self.said: list[str] = []
        self.waits: list[float] = []
        self._looks = looks

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        return len(self.waits) >= self._looks

    def tell(self, source: str, seconds: float | None) -> None:
        self.told.append((source, seconds))

    def watch(self, asked: list[launch.metadata.Cloud]) -> "Watcher":
        watch(asked, self.tell, self.wait, say=self.said.append)
        return self


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that hangs is given up at once."""
    monkeypatch.setattr(launch.metadata, "SHORT_SECONDS", 0.05)


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("name", ["auto", "the cloud's"])
@pytest.mark.parametrize(
    "script",
    [
        ["notice"],
        ["no", "no", "notice"],
        ["no", "500", "no", "nonsense", "404", "no", "401", "reset", "no", "notice"],
        ["404", "401", "500", "nonsense", "reset", "notice"],
    ],
    ids=["at once", "later", "flapping", "refusing"],
)
def test_a_notice_is_heard_through_all_that_a_service_does(
    cloud: str, name: str, script: list[str]
) -> None:
    with MetadataServer(cloud, script) as server:
        chosen = cloud if name != "auto" else name
        watcher = Watcher(60).watch(clouds(chosen, server.url))
    ((source, _),) = watcher.told
    assert source.lower().startswith(f"the metadata service of {cloud}")


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_service_that_hangs_is_asked_again(cloud: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.metadata, "SHORT_SECONDS", 0.2)
    with MetadataServer(cloud, ["hang", "notice"]) as server:
        watcher = Watcher().watch(clouds(cloud, server.url))
    assert len(watcher.told) == 1
    assert watcher.waits == [FIRST_RETRY_SECONDS]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_no_notice_is_none(cloud: str) -> None:
    with MetadataServer(cloud, ["no"]) as server:
        watcher = Watcher().watch(clouds(cloud, server.url))
    assert watcher.told == []


def test_without_a_service_the_waits_grow_to_a_minute() -> None:
    watcher = Watcher().watch(clouds("auto", "http://127.0.0.1:9"))
    assert watcher.told == []
    assert watcher.waits[:4] == [1.0, 2.0, 4.0, 8.0]
    assert max(watcher.waits) == watcher.waits[-1] == LONGEST_RETRY_SECONDS


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with MetadataServer("gce", ["notice"]) as server:
        assert Watcher().watch([Gce(server.url)]).told


def test_gce_is_asked_by_a_long_poll_once_it_has_answered() -> None:
    with MetadataServer("gce", ["no", "no", "no", "notice"]) as server:
        Watcher().watch([Gce(server.url)])
        assert (server.looks, server.long_polls) == (4, 3)


def test_aws_is_asked_with_one_token_until_it_is_refused() -> None:
    with MetadataServer("aws", ["no", "no", "401", "no", "notice"]) as server:
        Watcher().watch([Aws(server.url)])
        assert (server.looks, server.tokens) == (5, 2)


def test_the_time_that_a_cloud_names_is_the_grace_less_a_margin() -> None:
    with MetadataServer("aws", ["notice"]) as aws, MetadataServer("azure", ["notice"]) as azure:
        for cloud, left in (
            (Aws(aws.url, lambda: NOON), 120.0),
            (Azure(azure.url, lambda: NOON), 30.0),
            (Azure(azure.url, lambda: NOON + 3600), 0.0),
        ):
            ((_, seconds),) = Watcher().watch([cloud]).told
            assert seconds == max(0.0, left - MARGIN_SECONDS)


def test_an_event_of_another_machine_of_the_scale_set_is_not_ours() -> None:
    with MetadataServer("azure", ["notice"]) as server:
        server.resources = ["another"]
        assert Watcher().watch([Azure(server.url)]).told == []


def test_the_first_cloud_that_answers_is_the_only_one_asked_from_then_on() -> None:
    with MetadataServer("aws", ["no", "no", "500", "notice"]) as server:
        watcher = Watcher().watch(clouds("auto", server.url))
    assert watcher.said == ["the metadata service of aws answers; its notices are heeded"]
    assert len(watcher.told) == 1


def test_no_cloud_is_asked_when_none_is_wanted() -> None:
    assert clouds("none", "http://127.0.0.1:9") == []


def test_a_file_is_a_notice_when_it_appears(tmp_path: Path) -> None:
    path = tmp_path / "leave"
    watcher = Watcher()

    def wait(seconds: float) -> bool:
        assert not watcher.told
        path.touch()
        return False

    watch_file(str(path), watcher.tell, wait)
    assert watcher.told == [
        (f"the notice file {path} is there (remove it before the next start)", None)
    ]


def test_the_watch_runs_beside_and_ends(tmp_path: Path) -> None:
    heard = threading.Event()
    with MetadataServer("gce", ["notice"]) as server:
        asked = clouds("auto", server.url)
        with NoticeWatch(asked, "", lambda *notice: heard.set(), lambda text: None):
            assert heard.wait(60.0)
    path = tmp_path / "leave"
    path.touch()
    heard.clear()
    with NoticeWatch([], str(path), lambda *notice: heard.set(), lambda text: None):
        assert heard.wait(60.0)


class Answering:
    """A cloud that does and says what the test wants."""

    name, pause_seconds = "cloud", 1.0

    def __init__(self, *answers: object) -> None:
        self._answers = list(answers)

    def look(self) -> tuple[str, float | None] | None:
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[return-value]


@pytest.mark.parametrize("error", [RecursionError("nested"), OverflowError("the year 1")])
def test_an_answer_that_cannot_be_read_ends_no_watch(error: Exception) -> None:
    assert Watcher().watch([Answering(error, ("taken", 30.0))]).told == [("taken", 25.0)]


def test_a_time_that_only_a_wrong_clock_gives_is_not_waited_for() -> None:
    assert Watcher().watch([Answering(("taken", 1e9))]).told == [("taken", None)]


def test_a_notice_file_where_nobody_may_look_is_not_there() -> None:
    watcher = Watcher()
    watch_file("/" + "x" * 300, watcher.tell, watcher.wait)
    assert watcher.told == [] and len(watcher.waits) == 20
