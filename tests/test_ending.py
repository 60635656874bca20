"""A program that is over is over, whatever hangs beside it."""

import os
import subprocess
import sys

import pytest

from tests.programs import ROOT, TIMEOUT_SECONDS

HANGING = """
import runpy, sys, threading
threading.Thread(target=threading.Event().wait).start()  # not a daemon: it would be waited for
sys.argv = [sys.argv[1], *sys.argv[2:]]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "program", ["launch.train", "launch.supervise", "launch.agent", "data_service.explain"]
)
def test_a_program_that_is_over_does_not_wait_for_a_thread_that_hangs(program: str) -> None:
    parent = [str(os.getpid())] if program == "launch.agent" else []
    done = subprocess.run(
        [sys.executable, "-c", HANGING, program, *parent, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout  # a pipe, so it was flushed
