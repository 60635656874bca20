"""What a process does so that whoever started it can mind it: dies with it, shows its stacks."""

import ctypes
import faulthandler
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(parent: int | None = None) -> None:
    """Be killed when the thread that started this process ends; at once if `parent` is gone.

    Without `parent` it is who is the parent now. Does nothing where Linux is not.
    """
    expected = os.getppid() if parent is None else parent
    if _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) and os.getppid() != expected:
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, as process 1 is anyway."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def show_stacks_when_asked() -> None:
    """SIGUSR2 writes the stacks of all threads to stderr, also of a process that hangs in C."""
    faulthandler.register(signal.SIGUSR2, all_threads=True)


def _prctl(option: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
    return True
