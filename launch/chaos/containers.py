"""Scenarios of containers: process 1, little memory, no home, nothing to write to, a wrong clock.

Covers: clocks that are set, as Python's own `time` tells them. Does not cover: other readers of the
clock, as `datetime.now`; a kernel's own clock that is set.
"""

import signal
from dataclasses import dataclass
from pathlib import Path

from launch.chaos.hosts import processes_of
from launch.chaos.scenarios import Scenario
from launch.chaos.small_memory import small_memory
from launch.chaos.trial import ROOT, Trial
from launch.exit_codes import COMPLETE, START_AGAIN

DAY_SECONDS = 86_400
_FREE_BYTES = 32 << 20

_READ_ONLY = """
set -e
mount --bind "$0" "$0"
mount --bind "$TMPDIR" "$TMPDIR"
mount -o remount,bind,ro /
grep -q ' /tmp ' /proc/self/mounts && mount -o remount,bind,ro /tmp
for place in / /tmp; do
    if touch "$place/rangeflow-chaos" 2>/dev/null; then echo "$place can be written"; exit 1; fi
done
exec "$@"
"""

_CLOCK = """
import time
from pathlib import Path

_at, _at_ns, _place = time.time, time.time_ns, Path({place!r})


def _jump():
    try:
        return int(_place.read_text())
    except (OSError, ValueError):
        return 0


time.time = lambda: _at() + _jump()
time.time_ns = lambda: _at_ns() + _jump() * 10**9
"""


@dataclass(frozen=True, slots=True)
class Behind:
    """Runs a command behind another one, which becomes it."""

    prefix: tuple[str, ...]

    def entering(self, *command: str) -> list[str]:
        """The whole command line."""
        return [*self.prefix, *command]


def _process_1(trial: Trial) -> None:
    space = Behind(("unshare", "--pid", "--fork", "--mount-proc", "--kill-child"))
    program = trial.start(trial.supervisor(2), on=space, stop=("micro_batch", 9))
    place = program.stopped()
    minder = program.process("supervisor")
    inside = ("nsenter", "--target", str(minder), "--pid", "--mount")
    orphans = trial.start([*inside, "sh", "-c", "true & true & true & true &"])
    orphans.end(COMPLETE)
    trial.fault(f"orphans, and SIGKILL of rank 0 at step {place.step}")
    program.stop("micro_batch", 9)
    place.signal(signal.SIGKILL)
    place = program.stopped()
    space_name = str(Path(f"/proc/{minder}/ns/pid").readlink())
    program.wait_for(lambda: not _zombies(space_name), "process 1 left zombies")
    trial.fault(f"SIGTERM to process 1 at step {place.step}")
    program.notice(place)
    place.go_on()
    program.end(START_AGAIN)
    trial.expect_saved(place.step + 1)
    trial.complete()


def _little_memory(trial: Trial) -> None:
    memory = trial.stack.enter_context(small_memory())
    stop = ("micro_batch", trial.random.randrange(1, 25))
    program = trial.start(trial.supervisor(2), on=memory, stop=stop)
    place = program.stopped()
    for pid in program.processes("rank"):
        memory.give_up_first(pid)
    memory.leave_free(_FREE_BYTES)
    eater = str(ROOT / "launch" / "chaos" / "small_memory.py")
    trial.start(trial.python(eater, str(memory.folder)), on=memory).end(COMPLETE)
    trial.fault(f"out of memory at step {place.step}: the kernel killed {memory.kills()}")
    place.go_on()
    program.end(COMPLETE)


def _read_only(trial: Trial) -> None:
    space = Behind(("unshare", "--mount", "sh", "-c", _READ_ONLY, str(trial.folder)))
    trial.fault("all is read-only but the run's folder and a temporary one")
    stop = ("micro_batch", 9)
    program = trial.start(trial.supervisor(2), on=space, stop=stop)
    place = program.stopped()
    program.notice(place)
    place.go_on()
    program.end(START_AGAIN)
    trial.expect_saved(place.step + 1)
    trial.start(trial.supervisor(1), on=space).end(COMPLETE)


def _nobody(trial: Trial) -> None:
    space = Behind(
        ("unshare", "--user", "--map-user=12345", "--map-group=12345", "env", "-u", "HOME")
    )
    trial.fault("user 12345, who is in no passwd, has no name and no home")
    program = trial.start(trial.supervisor(2), on=space, stop=("micro_batch", 9))
    place = program.stopped()
    program.notice(place)
    place.go_on()
    program.end(START_AGAIN)
    trial.expect_saved(place.step + 1)
    trial.start(trial.supervisor(1), on=space).end(COMPLETE)


def _clock_jumps(trial: Trial) -> None:
    """Before a kill, and between a notice and its deadline, which is told by that clock."""
    jump = trial.folder / "clock" / "jump"
    jump.parent.mkdir()
    (jump.parent / "sitecustomize.py").write_text(_CLOCK.format(place=str(jump)))
    environment = {"PYTHONPATH": str(jump.parent)}
    program = trial.start(trial.supervisor(2), environment=environment, stop=("micro_batch", 5))
    place = program.stopped()
    days = 0
    for step in (10, 15):
        days = trial.random.choice((-400, -1, 1, 400))
        trial.fault(f"the clock is {days} days off, and rank 0 killed at step {place.step}")
        jump.write_text(str(days * DAY_SECONDS))
        program.stop("micro_batch", step)
        place.signal(signal.SIGKILL)
        place = program.stopped()
    program.notice(place)
    days += trial.random.choice((1, 400))  # on: the deadline that the rank was told looks missed
    trial.fault(f"a notice at step {place.step}, then the clock is {days} days off")
    jump.write_text(str(days * DAY_SECONDS))
    place.go_on()
    program.end(START_AGAIN)
    trial.expect_saved(place.step + 1)
    trial.complete()


def _zombies(space: str) -> list[int]:
    """Processes of a namespace that have ended and that nobody has reaped."""
    found = []
    for pid in processes_of(space):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                found.append(pid)
        except OSError:
            continue
    return found


CONTAINERS = (
    Scenario(
        name="process-1",
        about="the supervisor is process 1 of a container",
        act=_process_1,
        needs=frozenset({"root", "processes"}),
    ),
    Scenario(
        name="little-memory",
        about="the memory of a container is used up",
        act=_little_memory,
        needs=frozenset({"root", "cgroup"}),
    ),
    Scenario(
        name="read-only",
        about="nothing can be written but the run and a temporary folder",
        act=_read_only,
        needs=frozenset({"root", "mounts"}),
    ),
    Scenario(
        name="nobody",
        about="a user without a name and without a home",
        act=_nobody,
        needs=frozenset({"users"}),
    ),
    Scenario(name="clock-jumps", about="the clock is set while it trains", act=_clock_jumps),
)
