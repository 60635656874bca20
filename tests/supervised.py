"""The supervisor with something else in place of torchrun, or with a mechanism left out.

Usage: supervised.py CONTROL SUPERVISOR_ARGUMENTS...
fake_torchrun.py stands for torchrun, and its arguments behind `--`. CONTROL is "fake", or says what
is left out of it all.
"""

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import launch.elastic
import launch.hang
import launch.rendezvous
import launch.reporting
import launch.start
import launch.supervise

FAKE = str(Path(__file__).with_name("fake_torchrun.py"))


def fake_command(grace_seconds: float, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, FAKE, str(os.getpid()), *arguments]


def quick_at_step_3(watch: launch.hang.HangWatch, kind: str) -> float:
    return 0.3 if [work.step for work in watch._work.values()] == [3, 3] else 1e9


def meet() -> None:
    """Several hosts are at a place, each time."""
    launch.elastic.for_several_hosts = lambda arguments: True
    launch.elastic.Elastic.outdated = lambda elastic, joined: ""
    launch.elastic.Elastic.still_ours = lambda elastic: True
    launch.elastic.Elastic.not_reached = lambda elastic, joined: print("not reached", flush=True)
    launch.elastic.Elastic.join = lambda elastic, pause: launch.elastic.Joined(
        place=launch.rendezvous.Place(number=1, address="a", port=1, host="a"),
        arguments=tuple(elastic._arguments),
        environment={},
    )


def run(control: str, arguments: list[str]) -> int:
    launch.supervise.FIRST_WAIT_SECONDS = 0.01
    if control == "fake-without-pdeathsig":
        os.environ["WITHOUT_PDEATHSIG"] = "1"
    elif control == "fake-without-clearing":
        launch.start.kill_descendants = lambda limit, spared: ({}, [])
    elif control == "fake-quick":  # not broken: two ranks at step 3 hang sooner
        launch.start.LOOK_SECONDS = 0.1
        launch.start.STACKS_SECONDS = 0.3
        launch.hang.HangWatch._limit = quick_at_step_3
    elif control == "fake-full-disk":  # not broken: the deadline's place cannot be written to
        begin = launch.reporting.Reports.begin
        launch.reporting.Reports.begin = lambda reports: (
            begin(reports),
            Path(f"{reports.path}.deadline.partial").mkdir(exist_ok=True),
        )
    elif control == "fake-hanging-store":  # not broken: the hosts are looked for without an end
        launch.elastic.for_several_hosts = lambda arguments: True
        launch.elastic.Elastic.join = lambda elastic, pause: (
            print("joining", flush=True),
            threading.Event().wait(),
        )
    elif control == "fake-several-hosts":  # not broken: they have met
        launch.start.MEET_SECONDS, launch.start.LOOK_SECONDS = 0.3, 0.1
        meet()
    elif control == "fake-other-job":  # not broken: another job has claimed the run
        meet()
        launch.elastic.Elastic.still_ours = lambda elastic: False
    elif control == "fake-hanging-question":  # not broken: whether hosts meet there is not known
        launch.start.LOOK_SECONDS, launch.start.OUTDATED_SECONDS = 0.01, 0.0
        launch.supervise.JUDGE_SECONDS = 0.1
        meet()
        launch.elastic.Elastic.outdated = lambda elastic, joined: (
            print("asking", flush=True),
            threading.Event().wait(),
        )
    elif control == "fake-impatient":  # not broken: with less patience for an agent
        launch.start.LINGER_SECONDS = 0.1
    return launch.supervise.main(arguments, fake_command)


if __name__ == "__main__":
    os._exit(run(sys.argv[1], sys.argv[2:]))
