"""The processes below this one: found in /proc, killed, reaped.

Covers: processes in sessions and groups of their own, and orphans, which come to a process that
adopts them. Does not cover: a process that SIGKILL does not end (state D, a broken driver).
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

Process = tuple[int, int]
"""Its number, and the clock ticks at which it began: numbers are given again."""


def descendants(spared: Collection[Process] = ()) -> list[int]:
    """Every process below this one, zombies left out; and those spared, with what is below them."""
    return [pid for pid, _ in processes_below(spared)]


def processes_below(spared: Collection[Process] = ()) -> list[Process]:
    """As `descendants`, each with when it began."""
    children: dict[int, list[Process]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        threads_live = int(fields[17]) > 1  # also behind a first thread that has ended
        if fields[0] not in ("Z", "X") or threads_live:
            children.setdefault(int(fields[1]), []).append((int(entry), int(fields[19])))
    found: list[Process] = []
    above = [os.getpid()]
    while above:
        below = [process for process in children.get(above.pop(), []) if process not in spared]
        found += below
        above += [pid for pid, _ in below]
    return found


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def reap() -> dict[int, int]:
    """The children that have ended since the last call: pid to exit code, or minus the signal."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def kill_descendants(
    limit_seconds: float,
    *,
    spared: Collection[Process] = (),
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[dict[int, int], list[int]]:
    """SIGKILL until nothing is left; what was reaped, and whom SIGKILL has not ended in time.

    One that starts another meanwhile is caught in the next round.
    """
    reaped = reap()
    end = clock() + limit_seconds
    while left := descendants(spared):
        if clock() > end:
            return reaped, left
        for pid in left:
            send(pid, signal.SIGKILL)
        sleep(0.005)
        reaped |= reap()
    return reaped | reap(), []
