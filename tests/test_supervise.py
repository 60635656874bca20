"""The supervisor's loop with starts that are told, and the whole program with stand-in ranks."""

import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

import launch.recorded_ends
from launch.crash_loop import Ended
from launch.exit_codes import COMPLETE, FENCED, INTERNAL, PERMANENT, START_AGAIN
from launch.outcome import Outcome, not_begun
from launch.supervise import (
    BUSY_WAIT_SECONDS,
    LONGEST_WAIT_SECONDS,
    Backoff,
    Judge,
    main,
    mind,
    torchrun_command,
)
from storage.canonical import canonical_json
from storage.store import open_store
from tests.made_runs import RUN
from tests.metadata_server import MetadataServer
from tests.minding import ROOT, Supervised

ENDED = Ended(generation=0, phase="reduce", step=7, reached=7, in_order=True)
FAILED = Outcome(code=INTERNAL, cause="it failed", ended=ENDED)
STUCK = replace(FAILED, ended=replace(ENDED, reached=0))
READY = "step=3,say=ready"


class Minded:
    """The loop over outcomes that are told; `noticed_after` so many starts a notice comes."""

    def __init__(self, outcomes: Iterable[Outcome], noticed_after: int = 10**9) -> None:
        self._outcomes = iter(outcomes)
        self._noticed_after = noticed_after
        self.starts = 0
        self.waits: list[float] = []
        self.said: list[str] = []

    def run(self, judge: Callable[[Outcome], str | None] = lambda came: None) -> int:
        return mind(
            self._start,
            judge,
            wait=self._wait,
            noticed=lambda: self.starts >= self._noticed_after,
            say=self.said.append,
            backoff=Backoff(lambda low, high: high),
        )

    def _start(self) -> Outcome:
        self.starts += 1
        return next(self._outcomes)

    def _wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        return True


@pytest.mark.parametrize("code", [COMPLETE, FENCED, PERMANENT])
def test_what_no_restart_helps_ends_the_supervisor_with_that_code(code: int) -> None:
    minded = Minded([FAILED, replace(FAILED, code=code)])
    assert minded.run() == code
    assert minded.starts == 2


@pytest.mark.parametrize("code", [START_AGAIN, INTERNAL])
def test_what_a_restart_may_help_is_started_again(code: int) -> None:
    minded = Minded([*[replace(FAILED, code=code)] * 5, replace(FAILED, code=COMPLETE)])
    assert minded.run() == COMPLETE
    assert minded.said[:2] == [
        "it failed; starting again at once",  # it had reached step 7
        "it failed; starting again in 1.0 s",
    ]


def test_a_start_that_a_notice_ended_is_the_last() -> None:
    minded = Minded([replace(FAILED, code=START_AGAIN)] * 3, noticed_after=1)
    assert minded.run() == START_AGAIN
    assert minded.starts == 1


def test_a_notice_right_after_a_start_that_failed_is_75() -> None:
    assert Minded([FAILED] * 3, noticed_after=1).run() == START_AGAIN


def test_a_notice_while_the_log_is_read_is_not_kept_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, release = threading.Event(), threading.Event()

    def hang(store: object) -> None:
        reading.set()
        release.wait()

    monkeypatch.setattr(launch.recorded_ends, "recorded_ends", hang)
    said: list[str] = []
    judge = Judge(said.append, reading.is_set)
    died = replace(FAILED, run=str(tmp_path), ended=replace(ENDED, in_order=False))
    assert judge(died) is None
    release.set()
    assert "it does not answer" in said[0]


def test_a_start_that_left_in_order_needs_no_judgement() -> None:
    said: list[str] = []
    assert Judge(said.append)(replace(FAILED, run="gopher://nowhere/run")) is None
    assert said == []


def test_a_notice_before_the_first_start_starts_nothing() -> None:
    minded = Minded([], noticed_after=0)
    assert minded.run() == START_AGAIN


def test_a_crash_loop_is_permanent() -> None:
    minded = Minded([FAILED] * 5)
    assert minded.run(lambda came: "crash loop: x" if minded.starts == 3 else None) == PERMANENT
    assert minded.said[-1] == "crash loop: x"


def test_after_progress_nothing_is_waited_for_and_then_twice_as_long_each_time() -> None:
    ends = [replace(FAILED, ended=replace(ENDED, reached=step)) for step in [7] * 12 + [8, 8, 9]]
    minded = Minded([*ends, replace(FAILED, code=COMPLETE)])
    minded.run()
    assert minded.waits[:6] == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0]
    assert minded.waits[11] == LONGEST_WAIT_SECONDS
    assert minded.waits[12:] == [0.0, 1.0, 0.0]


def test_a_start_that_never_made_a_step_is_not_started_again_at_once() -> None:
    assert Backoff(lambda low, high: low).after(STUCK) == 0.5


def test_a_wait_for_hosts_in_vain_after_a_world_that_trained_is_progress() -> None:
    backoff = Backoff(lambda low, high: high)
    waits = [backoff.after(not_begun("gone", reached=r)) for r in (0, 0, 7, 7, 9)]
    assert waits == [1.0, 2.0, 0.0, 1.0, 0.0]


def test_waits_have_jitter() -> None:
    waits = {Backoff(random.Random(seed).uniform).after(STUCK) for seed in range(50)}
    assert len(waits) == 50
    assert 0.5 <= min(waits) < max(waits) <= 1.0


def test_another_owner_is_given_more_time_than_an_error() -> None:
    busy = replace(FAILED, code=START_AGAIN, busy=True)
    minded = Minded([FAILED, busy, busy, FAILED, replace(FAILED, code=COMPLETE)])
    minded.run()
    assert minded.waits == [0.0, BUSY_WAIT_SECONDS, 2 * BUSY_WAIT_SECONDS, 1.0]


def test_the_judge_counts_starts_that_never_claimed_a_run() -> None:
    judge = Judge(lambda text: None)
    failed = replace(ENDED, error="torchrun itself failed", in_order=False, reached=0)
    verdicts = [judge(replace(FAILED, ended=failed)) for _ in range(3)]
    assert verdicts[:2] == [None, None]
    assert verdicts[2] is not None and "torchrun itself failed" in verdicts[2]


def test_the_judge_adds_what_other_supervisors_recorded(tmp_path: Path) -> None:
    from tests.test_recorded_ends import beats_of

    store = open_store(str(tmp_path))
    store.put("run.json", canonical_json(RUN))
    for _ in range(2):
        beats_of(store, "restore", 0, ZeroDivisionError("x"))
    judge = Judge(lambda text: None)
    mine = Ended(generation=3, phase="restore", step=0, reached=0, error="ZeroDivisionError: x")
    beats_of(store, "restore", 0)
    verdict = judge(replace(FAILED, ended=mine, run=str(tmp_path)))
    assert verdict is not None and "3 starts in a row" in verdict


def test_a_log_that_cannot_be_read_is_done_without() -> None:
    said: list[str] = []
    died = replace(ENDED, in_order=False)
    assert Judge(said.append)(replace(FAILED, run="gopher://nowhere/run", ended=died)) is None
    assert len(said) == 1 and "the run's log could not be read" in said[0]


def test_torchrun_takes_the_users_own_values() -> None:
    from torch.distributed.run import parse_args

    own = ["--nproc_per_node=2", "--", "launch/train.py", "--run", "runs/a"]
    given = parse_args(torchrun_command(12.5, own)[4:])
    assert (given.max_restarts, given.shutdown_timeout) == (0, 12)
    assert given.training_script_args == ["--run", "runs/a"]
    given = parse_args(torchrun_command(0.0, ["--max_restarts=3", *own])[4:])
    assert (given.max_restarts, given.shutdown_timeout) == (3, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected `--` and torchrun's arguments"),
        (["--"], "expected `--` and torchrun's arguments"),
        (["--no_such_flag", "--", "x"], "Unrecognized options: --no_such_flag"),
        (["--grace_seconds=-1", "--", "x"], "grace_seconds must be a number from 0"),
        (["--metadata_url=169.254.169.254", "--", "x"], "metadata_url must begin with http"),
        (["--health_port=70000", "--", "x"], "health_port must be from 0 to 65535; got 70000"),
    ],
)
def test_bad_arguments_are_one_line_and_78(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == PERMANENT
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1


def test_a_temporary_folder_that_takes_no_socket_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    for folder in (long, tmp_path / "nowhere"):
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        assert main(["--metadata=none", "--", "1", "say=hello"]) == 78
        said = capsys.readouterr().err
        assert said.startswith("error: the temporary folder must take") and said.count("\n") == 1


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == COMPLETE
    assert "python -m launch.supervise -- --nproc_per_node=1 launch/train.py" in (
        capsys.readouterr().out
    )


def test_handlers_come_before_anything_heavy_and_torch_never() -> None:
    code = """
import sys, launch.supervise as s
assert not {"tyro", "torch", "numpy", "fsspec"} & set(sys.modules)
def fake(grace, arguments): return ["/bin/true"]
assert s.main(["--metadata=none", "--health_port=0", "--", "x"], fake) == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_deaths_and_errors_are_started_again_until_the_run_is_complete() -> None:
    with Supervised(2, "step=1,1:die,hang/step=2,0:error,hang/step=3,silent=9/step=4") as program:
        assert program.end() == COMPLETE
        said = [line for line in program.output().splitlines() if "starting again" in line]
    assert len(said) == 3 and all(line.startswith("supervise: ") for line in said)
    assert "rank 0: ZeroDivisionError: a defect" in said[1]


def test_three_errors_without_progress_end_with_78() -> None:
    with Supervised(2, "step=1,1:error,hang") as program:
        assert program.end() == PERMANENT
        assert program.output().count("starting again") == 3, "the first made a step"
        assert "crash loop: 3 starts in a row ended without a new step, the last in phase" in (
            program.output()
        )


@pytest.mark.parametrize("code", [FENCED, PERMANENT])
def test_what_a_rank_says_decides_the_exit_code(code: int) -> None:
    with Supervised(2, f"0:exit={code},hang") as program:
        assert program.end() == code


def test_another_owner_is_named_and_a_notice_ends_the_wait_for_it() -> None:
    with Supervised(1, "busy") as program:
        said = program.line("starting again")
        assert "in use by generation 4 on host other, at step 7" in said
        program.send(signal.SIGTERM)
        assert program.end() == START_AGAIN


def test_a_notice_while_a_store_hangs_is_heard_at_once() -> None:
    with Supervised(1, "say=hello", control="fake-hanging-store") as supervised:
        supervised.line("joining")
        supervised.send(signal.SIGTERM)
        assert supervised.end() == START_AGAIN
        assert "a notice before the hosts met; exit code 75" in supervised.output()


def test_ranks_are_minded_though_a_store_hangs() -> None:
    with Supervised(1, "step=3", control="fake-hanging-question") as supervised:
        supervised.line("asking")
        assert supervised.end() == COMPLETE


@pytest.mark.parametrize("code", [FENCED, START_AGAIN, INTERNAL])
def test_a_host_whose_run_another_job_has_claimed_stops(code: int) -> None:
    """Whatever it noticed first. One that only waited has not been fenced."""
    starts = f"exit=75/run=r@1,step=3,exit={code}"
    with Supervised(1, starts, control="fake-other-job") as program:
        assert program.end() == FENCED
        assert "another job has claimed the run; " in program.output()
        assert program.output().count("starting again") == 1


def test_ranks_do_not_wait_half_an_hour_for_those_of_a_host_that_was_lost_meanwhile() -> None:
    starts = "meet,hang/meet,hang/meet,hang/meet,step=3"
    with Supervised(1, starts, control="fake-several-hosts") as program:
        assert program.end() == COMPLETE, "nor is it a crash loop"
        assert program.output().count("the ranks of other hosts have not come in") == 3


def test_a_place_that_torchrun_did_not_reach_is_told_of() -> None:
    with Supervised(1, "unreached/exit=75/step=3", control="fake-several-hosts") as program:
        assert program.end() == COMPLETE
        assert program.output().count("not reached") == 1


def test_a_host_that_has_trained_goes_on_without_a_newcomer_that_does_not_fit() -> None:
    with Supervised(1, "unlike", control="fake-several-hosts") as newcomer:
        assert newcomer.end() == PERMANENT
    with Supervised(1, "step=3,unlike/unlike/step=4", control="fake-several-hosts") as veteran:
        assert veteran.end() == COMPLETE
        assert veteran.output().count("with another torch; starting again") == 2


def test_a_notice_file_is_a_notice(tmp_path: Path) -> None:
    path = tmp_path / "leave"
    with Supervised(1, f"{READY},wait,exit=75", f"--notice_file={path}") as program:
        program.pid_of("ready")
        path.touch()
        assert program.end() == START_AGAIN
        assert f"the notice file {path} is there" in program.output()


@pytest.mark.parametrize(
    "cloud",
    [
        "gce",
        pytest.param("aws", marks=pytest.mark.soak),  # each waits for its own interval
        pytest.param("azure", marks=pytest.mark.soak),
    ],
)
def test_a_metadata_service_is_a_notice(cloud: str) -> None:
    with MetadataServer(cloud, ["no", "500", "notice"]) as server:
        flags = (f"--metadata={cloud}", f"--metadata_url={server.url}")
        with Supervised(1, f"{READY},wait,exit=75", *flags) as program:
            assert program.end() == START_AGAIN
            assert "supervise: the metadata service of " in program.output()


def test_as_process_1_it_hears_signals_and_leaves_nothing() -> None:
    unshare = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this user cannot make a PID namespace: unshare --pid needs root")
    shell = ("sh", "-c", 'exec "$0" "$@"')
    with Supervised(2, f"{READY},orphan,wait,exit=75", prefix=(*unshare, *shell)) as program:
        for _ in range(2):
            program.line("orphan")
        (first,) = program.children()
        status = Path(f"/proc/{first}/status").read_text()
        assert re.search(rf"^NSpid:\t{first}\t1$", status, re.MULTILINE), "it is process 1"
        program.watch(first)
        signal.pidfd_send_signal(program.pidfd(first), signal.SIGTERM)
        assert program.end() == START_AGAIN
        assert program.left() == 0
