"""Everything below a process is found and killed. In processes of their own: nobody else's die."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

STUBBORN = "import signal; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]; signal.pause()"
FORKING = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
orphan = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
orphan.returncode = 0
print(orphan.pid, flush=True)
{then}
"""
PROGRAM = """
import signal, subprocess, sys
from launch.descendants import descendants, kill_descendants, send
from launch.minded import adopt_orphans
{adopt}
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdout=subprocess.PIPE)
orphan = int(child.stdout.readline())
if sys.argv[3]:
    child.wait()
before = descendants()
reaped, left = kill_descendants(60.0)
print(len(before), len(left), len(descendants()), sorted(reaped.values()))
send(orphan, signal.SIGKILL)  # a control leaves it behind
"""


def run(adopt: str, then: str, wait: str) -> str:
    command = [sys.executable, "-c", PROGRAM.format(adopt=adopt)]
    command += [FORKING.format(then=then), STUBBORN, wait]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_grandchild_in_its_own_session_that_ignores_signals_is_killed_and_reaped() -> None:
    assert run("adopt_orphans()", "signal.pause()", "") == "2 0 0 [-9, -9]\n"


def test_a_stopped_process_is_killed() -> None:
    then = "os.kill(os.getpid(), signal.SIGSTOP)"
    assert run("adopt_orphans()", then, "") == "2 0 0 [-9, -9]\n"


@pytest.mark.parametrize(
    ("adopt", "found"), [("adopt_orphans()", "1 0 0 [-9]\n"), ("", "0 0 0 []\n")]
)
def test_an_orphan_comes_to_who_adopts_and_is_lost_to_who_does_not(adopt: str, found: str) -> None:
    assert run(adopt, "", "wait") == found


def test_what_sigkill_does_not_end_is_told() -> None:
    program = """
import launch.descendants as d
d.send = lambda pid, number: None
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
now = iter(range(100))
print(d.kill_descendants(3.0, clock=lambda: next(now), sleep=lambda s: None) == ({}, [child.pid]))
child.kill()
"""
    command = [sys.executable, "-c", program, STUBBORN]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\n", done.stderr
