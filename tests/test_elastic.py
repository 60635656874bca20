"""torchrun is started with what the hosts have agreed on, and with what the user said."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from checkpointing.incarnation import claim_run
from launch import elastic
from launch.agent import elsewhere
from launch.elastic import (
    JOB_VARIABLE,
    VARIABLE,
    Elastic,
    RunIsCompleteError,
    for_several_hosts,
    free_port,
    interface_of,
    own_address,
    reached,
    run_of,
)
from launch.rendezvous import Reach
from storage.canonical import canonical_json
from storage.errors import ConfigurationError, StoreUnavailableError
from storage.log import Log
from storage.store import open_store
from tests.hosts import network
from tests.made_runs import RUN

ROOT = Path(__file__).resolve().parents[1]
TRAIN = "launch/train.py"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), False),
        (("--nnodes=1",), False),
        (("--nnodes=2",), True),
        (("--nnodes", "1:4", TRAIN), True),
        (("--nnodes=1:1",), False),
        (("--nnodes=1:4", "--rdzv_endpoint=a:1"), False),
        (("--nnodes=1:4", "--rdzv-endpoint", "a:1"), False),
        (("--standalone", "--nproc-per-node=4"), False),
    ],
)
def test_hosts_agree_only_where_there_are_several_and_the_user_names_no_place(
    arguments: tuple[str, ...], expected: bool
) -> None:
    assert for_several_hosts(arguments) == expected


def test_the_run_is_found_as_training_will_find_it(tmp_path: Path) -> None:
    assert run_of([TRAIN]) == "runs/default"
    assert run_of([TRAIN, "--run", "a", "--run=gs://b/c"]) == "gs://b/c"
    config = tmp_path / "config.toml"
    config.write_text('run = "from/file"\n')
    assert run_of([TRAIN, "--config", str(config)]) == "from/file"
    assert run_of([TRAIN, f"--config={config}", "--run=x"]) == "x"
    with pytest.raises(ConfigurationError, match="cannot be read"):
        run_of([TRAIN, "--config=/nowhere.toml"])


def test_torchrun_gets_the_place_and_keeps_what_the_user_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic, "interface_of", lambda address: "eth7")
    monkeypatch.setattr(elastic, "reached", lambda address, port: Reach.REFUSED)
    user = [
        "--nnodes=1:3",
        "--local-addr=10.1.2.3",
        "--rdzv_conf",
        "join_timeout=60",
        "--rdzv-id=j",
    ]
    told: list[str] = []
    one = Elastic([*user, TRAIN, "--run", str(tmp_path)], lambda name: None, told.append)
    joined = one.join(lambda seconds: True)
    assert joined is not None
    port = joined.place.port
    assert joined.arguments == (
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=10.1.2.3:{port}",
        f"--rdzv-id=j-{joined.place.token}",
        f"--rdzv-conf={elastic.SETTINGS},join_timeout=60,is_host=1",
        "--local-addr=10.1.2.3",
        *("--nnodes=1:3", "--local-addr=10.1.2.3", TRAIN, "--run", str(tmp_path)),
    )
    assert joined.environment == {
        VARIABLE: "1",
        JOB_VARIABLE: "j",
        "GLOO_SOCKET_IFNAME": "eth7",
    }
    assert told == [f"the hosts meet at 10.1.2.3:{port}, number 1, here"]
    assert one.outdated(joined) == ""
    again = Elastic([*user, TRAIN, "--run", str(tmp_path)], lambda name: "mine", told.append)
    joined = again.join(lambda seconds: True)
    assert joined is not None and joined.environment["GLOO_SOCKET_IFNAME"] == "mine"


def test_whether_the_run_is_still_this_jobs_is_read_from_its_newest_claim(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("run.json", canonical_json(RUN))
    one = Elastic(["--rdzv-id=j", TRAIN, f"--run={tmp_path}"], lambda name: None, print)
    assert one.still_ours()
    for job, ours in (("j", True), ("another", False), ("j", True)):
        claim_run(store, Log(store), body={"job": job}, take_over=True)
        assert one.still_ours() == ours


def test_a_host_whose_job_has_ended_the_run_meanwhile_waits_for_nobody(tmp_path: Path) -> None:
    """Who was cut off while the others came to the end finds nobody to train with."""
    store = open_store(str(tmp_path))
    store.put("run.json", canonical_json(RUN))

    def host(*flags: str) -> Elastic:
        arguments = ["--local-addr=127.0.0.1", "--rdzv-id=j", TRAIN, f"--run={tmp_path}", *flags]
        return Elastic(arguments, lambda name: None, print)

    one, further, other = host(), host("--max_steps=9"), host("--rdzv-id=other")
    joined = [each.join(lambda seconds: True) for each in (one, further, other)]
    assert all(joined)
    last = claim_run(store, Log(store), body={"job": "j"}, take_over=True)
    last.append("END", lambda _: {"step": 8, "digest": "d"})
    assert joined[0] is not None and one.outdated(joined[0]) == "the run is complete"
    with pytest.raises(RunIsCompleteError):
        one.join(lambda seconds: True)
    assert host().join(lambda seconds: True), "it may have been started for more"
    assert further.join(lambda seconds: True), "as this was"
    assert other.join(lambda seconds: False) is None, "another job's end says nothing"


def test_a_host_that_has_lost_its_address_waits_until_it_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its interface is down for a while: that is no mistake of the user's."""
    answers: list[str | None] = ["10.1.2.3", None, None, "10.1.2.4"]

    def address() -> str:
        found = answers.pop(0)
        if found is None:
            raise ConfigurationError("this host's address is not known")
        return found

    monkeypatch.setattr(elastic, "own_address", address)
    told: list[str] = []
    one = Elastic([TRAIN, "--run", str(tmp_path)], lambda name: None, told.append)
    assert one.join(lambda seconds: True) is not None
    told.clear()
    one.join(lambda seconds: bool(answers))
    assert told[0] == "waiting: this host has lost its address" and not answers
    answers += [None, None]
    assert one.join(lambda seconds: len(answers) > 1) is None, "a notice"
    with pytest.raises(ConfigurationError):
        Elastic([TRAIN, f"--run={tmp_path}"], lambda name: None, print).join(lambda seconds: True)


def test_a_place_that_torchrun_cannot_reach_is_left(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = ["--local-addr=127.0.0.1", TRAIN, f"--run={tmp_path}"]
        one = Elastic(arguments, lambda name: None, print)
        place = {"address": "127.0.0.1", "port": taken.getsockname()[1], "host": "x"}
        open_store(str(tmp_path)).put("rendezvous/0000000001.json", canonical_json(place))
        joined = one.join(lambda seconds: True)
        assert joined is not None and joined.place.number == 1
        assert "--rdzv-conf=last_call_timeout=5,is_host=0" in joined.arguments
        assert elsewhere(joined.arguments) == f"127.0.0.1:{taken.getsockname()[1]}"
        one.not_reached(joined)
        joined = one.join(lambda seconds: True)
        assert joined is not None and joined.place.number == 2
        assert "--rdzv-conf=last_call_timeout=5,is_host=1" in joined.arguments
        assert elsewhere(joined.arguments) == ""


def test_a_store_that_fails_ends_no_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Elastic(["--local-addr=127.0.0.1", TRAIN, f"--run={tmp_path}"], lambda name: None, print)
    joined = one.join(lambda seconds: True)
    assert joined is not None

    def refuse(*arguments: object, **rest: object) -> None:
        raise StoreUnavailableError("no answer")

    monkeypatch.setattr(type(open_store(str(tmp_path))), "list", refuse)
    monkeypatch.setattr(elastic, "Watch", lambda store: refuse)
    assert one.outdated(joined) == ""
    assert one.still_ours()


def test_a_notice_while_hosts_have_not_met_ends_the_wait(tmp_path: Path) -> None:
    one = Elastic(["--local-addr=x", TRAIN, f"--run={tmp_path}"], lambda name: None, print)
    assert one.join(lambda seconds: False) is None


def test_a_host_knows_its_address_its_interface_and_what_answers() -> None:
    with network(2) as lan:
        program = (
            "from launch.elastic import *; a = own_address(); p = free_port();"
            "print(a, interface_of(a), interface_of('9.9.9.9') or None, p, reached(a, p).name)"
        )
        found = lan[1].call("python", "-c", program).split()
        assert found == [lan[1].address, "eth0", "None", "29400", "REFUSED"]
        program = f"from launch.elastic import *; print(reached('{lan[1].address}', 1).name)"
        assert lan[0].call("python", "-c", program).split() == ["REFUSED"]
        lan[1].cut()
        program = f"import launch.elastic as e; e.CONNECT_SECONDS = 0.1; {program}"
        assert lan[0].call("python", "-c", program).split() == ["SILENT"]


def test_a_host_without_a_way_out_is_told_to_say_its_address() -> None:
    with pytest.raises(ConfigurationError, match="give it to torchrun as --local-addr"):
        own_address("not an address")


def test_a_port_that_is_taken_is_left() -> None:

    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("", free_port()))
        taken.listen()
        number = taken.getsockname()[1]
        assert free_port() != number
        assert reached("127.0.0.1", number) is Reach.OPEN
    assert interface_of("127.0.0.1") == "lo"


def test_a_configuration_file_is_utf_8_in_any_locale(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("run = 'läufe/a'", encoding="utf-8")
    code = "import sys; from launch.elastic import run_of; print(ascii(run_of(sys.argv[1:])))"
    command = [sys.executable, "-c", code, f"--config={config}"]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | locale, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("'l\\xe4ufe/a'\n", "")


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_a_command_that_gives_torchrun_a_run_has_two_dashes_before_the_script(page: Path) -> None:
    """Without them Python 3.11 takes `--run` for the beginning of torchrun's `--run-path`."""
    commands = re.sub(r"\\\n\s*", "", page.read_text()).splitlines()
    given = [c for c in commands if re.search(r"(torchrun|supervise) .*train\.py .*--run", c)]
    assert [c for c in given if " -- launch/train.py" not in c] == []
