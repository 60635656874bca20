"""One start below the supervisor, with real processes that stand for torchrun and its ranks."""

import json
import re
import signal
from pathlib import Path
from socket import AF_UNIX, SOCK_DGRAM, socket

import pytest

from launch.reporting import Reports
from launch.start import Limits, Start
from launch.wake import Wake
from tests.minding import Supervised, children

READY = "step=3,say=ready"


def test_a_complete_start_ends_with_0_and_its_output_passes_through() -> None:
    with Supervised(2, "say=hello") as program:
        assert program.end() == 0
        lines = program.output().splitlines()
    assert sorted(line.rpartition(" ")[0] for line in lines[:2]) == ["rank 0 hello", "rank 1 hello"]
    assert lines[2:] == ["supervise: complete; exit code 0"]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.soak),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.soak),
    ],
)
def test_a_notice_reaches_every_rank_once_with_a_deadline(number: signal.Signals) -> None:
    with Supervised(2, f"{READY},wait,deadline,exit=75", "--grace_seconds=60") as program:
        for _ in range(2):
            program.pid_of("ready")
        program.send(number)
        assert program.end() == 75
        assert program.left() == 0
        until = re.findall(r"^until ([\d.]+)$", program.output(), re.MULTILINE)
    assert len(until) == 2 and until[0] == until[1]
    assert float(until[0]) > 1.7e9, "seconds of the clock on the wall"
    assert f"supervise: {number.name}: the ranks have " in program.output()


def test_a_rank_that_begins_after_the_notice_is_told_as_well() -> None:
    late = "1:late,1:wait,1:say=told,1:exit=75,step=3,say=ready,hang"
    with Supervised(2, late, "--grace_seconds=60") as program:
        program.pid_of("ready")
        program.send(signal.SIGTERM)
        assert program.end() == 75
        assert "told" in program.output()


def test_a_run_that_completes_in_the_grace_is_complete() -> None:
    with Supervised(1, f"{READY},wait", "--grace_seconds=60") as program:
        program.pid_of("ready")
        program.send(signal.SIGTERM)
        assert program.end() == 0


def test_what_has_not_ended_by_the_deadline_is_killed() -> None:
    with Supervised(2, f"{READY},hang", "--grace_seconds=0.2") as program:
        for _ in range(2):
            program.pid_of("ready")
        program.send(signal.SIGTERM)
        assert program.end() == 75
        assert program.left() == 0
        assert "the grace is over: what has not ended is killed" in program.output()


def test_what_a_shell_began_before_it_became_the_supervisor_lives_on() -> None:
    shell = ("sh", "-c", 'sleep 1000 & echo began $!; exec "$@"', "sh")
    with Supervised(1, "orphan,exit=75/orphan", prefix=shell) as program:
        before = program.pidfd(int(program.line("began").rpartition(" ")[2]))
        orphans = [int(program.line("orphan").rpartition(" ")[2]) for _ in range(2)]
        assert program.end_of_supervisor() == 0
        assert not any(Path(f"/proc/{orphan}").exists() for orphan in orphans)
        signal.pidfd_send_signal(before, signal.SIGKILL)  # which fails once it has ended


def test_a_deadline_that_cannot_be_written_keeps_no_rank_from_saving() -> None:
    starts = f"{READY},wait,say=saved,exit=75"
    with Supervised(2, starts, "--grace_seconds=60", control="fake-full-disk") as program:
        for _ in range(2):
            program.pid_of("ready")
        program.send(signal.SIGTERM)
        assert program.end() == 75
        assert program.output().count("saved") == 2
        assert "the ranks go by their own --grace_seconds: " in program.output()


def test_a_second_signal_ends_everything_at_once() -> None:
    with Supervised(2, f"{READY},hang", "--grace_seconds=86400") as program:
        for _ in range(2):
            program.pid_of("ready")
        program.send(signal.SIGTERM)
        program.line("the ranks have")
        program.send(signal.SIGTERM)
        assert program.end() == 75
        assert program.left() == 0


def test_a_notice_before_any_rank_has_begun_waits_for_nobody() -> None:
    with Supervised(2, "mute", "--grace_seconds=86400") as program:
        program.line("mute")
        program.send(signal.SIGTERM)
        assert program.end() == 75
        assert "no rank has begun: nothing is to be saved" in program.output()


@pytest.mark.parametrize("control", ["fake", "fake-without-pdeathsig"])
def test_sigkill_of_the_supervisor_leaves_no_orphan_unless_nobody_is_told(control: str) -> None:
    with Supervised(2, f"{READY},hang", control=control) as program:
        ranks = [program.pid_of("ready") for _ in range(2)]
        program.watch(*children(program.pid))
        program.send(signal.SIGKILL)
        if control == "fake":
            assert program.left() == 0
        else:
            program.end_of_supervisor()
            assert program.left(0.0) == len(ranks) + 1


def test_sigkill_of_the_agent_ends_its_ranks_and_the_next_start_goes_on() -> None:
    with Supervised(2, f"{READY},hang/step=4") as program:
        for _ in range(2):
            program.pid_of("ready")
        (agent,) = children(program.pid)
        signal.pidfd_send_signal(program.pidfd(agent), signal.SIGKILL)
        assert program.end() == 0
        assert program.left() == 0
        assert "torchrun was ended by SIGKILL; starting again" in program.output()


def test_an_agent_that_is_stopped_after_its_ranks_have_ended_is_not_waited_for_for_ever() -> None:
    """The ranks have said that the run is complete: that counts."""
    with Supervised(1, "step=3,agent", control="fake-impatient") as program:
        assert program.end() == 0


@pytest.mark.parametrize("control", ["fake", "fake-without-clearing"])
def test_orphans_of_a_start_are_gone_before_the_next_begins(control: str) -> None:
    with Supervised(1, "step=3,orphan,die/say=second", control=control) as program:
        program.pid_of("orphan")
        program.line("second")
        assert program.left(0.0) == (control != "fake")
        assert program.end_of_supervisor() == 0


def test_a_hang_shows_all_stacks_and_is_killed_and_started_again() -> None:
    with Supervised(2, f"{READY},hang/step=4", control="fake-quick") as program:
        assert program.end() == 0
        assert program.output().count("Current thread 0x") == 2
        assert re.search(
            r"supervise: rank \d hangs in phase 'micro_batch' at step 3", program.output()
        )


def test_a_rank_that_is_stopped_is_killed_as_well() -> None:
    with Supervised(2, f"{READY},0:hang,1:stop/step=4", control="fake-quick") as program:
        for _ in range(2):
            program.pid_of("ready")
        assert program.end() == 0
        assert program.left() == 0


def test_a_world_that_is_made_anew_may_compile_again(tmp_path: Path) -> None:
    """torchrun itself starts other ranks: how quick steps were before says nothing of theirs."""
    now = 0.0
    place = str(tmp_path / "reports")
    limits = Limits(grace_seconds=1.0, start_seconds=1000.0)
    told: list[str] = []

    def look(seconds: float) -> str:
        nonlocal now
        for _ in range(int(seconds)):
            now += 1.0
            start._watch.hang()
        start._hear()
        return str(start._watch.hang() or "")

    with Wake() as wake, Reports(place) as reports, socket(AF_UNIX, SOCK_DGRAM) as rank:
        start = Start((), wake, reports, limits, say=told.append, clock=lambda: now)
        rank.connect(place)

        def say(pid: int, phase: str, step: int) -> None:
            said = {"rank": 0, "pid": pid, "local_rank": 0, "phase": phase, "step": step}
            rank.send(json.dumps(said).encode())

        for step in range(5):
            for phase in ("step", "micro_batch"):
                say(100, phase, step)
                assert look(1.0) == ""
        say(200, "start", 0)
        say(200, "step", 5)
        say(200, "micro_batch", 5)
        assert look(1.0) == ""
        assert look(900.0) == "", "the first step of the second world"
        assert look(200.0).startswith("rank 0 hangs in phase 'micro_batch' at step 5: no news for ")


def test_the_environment_says_what_torchrun_needs_to_grow() -> None:
    with Supervised(1, "variable=TORCH_DISABLE_SHARE_RDZV_TCP_STORE") as program:
        assert program.end() == 0
        assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in program.output()
