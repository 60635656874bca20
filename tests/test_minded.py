"""What makes a process mindable, on real processes."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=sys.stdout)
child.wait()
"""
CHILD = """
import os, signal
{first}
print(os.getpid(), flush=True)
signal.pause()
"""


def ended(pidfd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


@pytest.mark.parametrize("minded", [True, False])
def test_a_child_dies_with_its_parent_and_not_without_being_told(minded: bool) -> None:
    """Without the mechanism an orphan remains, which is what it is there for."""
    first = "from launch.minded import die_with_parent; die_with_parent()" if minded else ""
    command = [sys.executable, "-c", PARENT, CHILD.format(first=first)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        pidfd = os.pidfd_open(child)
        parent.kill()
        try:
            if minded:
                assert ended(pidfd, 60.0)
            else:
                parent.wait()
                stat = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                assert stat[0] not in "ZX" and int(stat[1]) != os.getpid()
        finally:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL) if not minded else None
            assert ended(pidfd, 60.0)
            os.close(pidfd)


def test_a_child_whose_parent_is_gone_already_dies_at_once() -> None:
    code = "from launch.minded import die_with_parent; die_with_parent(1); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


def test_stacks_are_shown_on_request_and_the_process_goes_on() -> None:
    code = """
import signal, threading
from launch.minded import show_stacks_when_asked
show_stacks_when_asked()
def somewhere():
    print("ready", flush=True)
    threading.Event().wait()
threading.Thread(target=somewhere, daemon=True).start()
signal.sigwait([signal.SIGUSR1])
"""
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    block = {signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, block)  # the program inherits it
    try:
        process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)  # type: ignore[call-overload]
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, block)
    with process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR2)
        shown = process.stderr.readline()
        process.send_signal(signal.SIGUSR1)
        shown += process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert "Thread 0x" in shown and "in somewhere" in shown and "Current thread" in shown
