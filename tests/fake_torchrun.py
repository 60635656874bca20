"""Stands for torchrun and its ranks, without torch: tests of the supervisor start it.

Usage: fake_torchrun.py SUPERVISOR_PID WORLD START/START...
Each START is what every rank does in that start, the last also in all later ones: words joined by
commas, each done in turn. A word for one rank alone begins with its number: `1:die`.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.agent import NOT_REACHED
from launch.exit_codes import exit_code
from launch.minded import die_with_parent, show_stacks_when_asked
from launch.notice import Notice
from launch.reporting import VARIABLE, Reporter, reporter
from storage.errors import RunBusyError, UnlikeHostsError


def agent(parent: int, world: int, starts: list[str]) -> int:
    if not os.environ.get("WITHOUT_PDEATHSIG"):
        die_with_parent(parent)
    folder = Path(os.environ[VARIABLE]).parent
    before = len(list(folder.glob("start*")))
    (folder / f"start{before}").touch()
    words = starts[min(before, len(starts) - 1)]
    if words == "unreached":
        return NOT_REACHED
    command = [sys.executable, __file__, "rank", words]
    ranks = [
        subprocess.Popen(command, env={**os.environ, "RANK": str(n)}, start_new_session=True)
        for n in range(world)
    ]
    for _ in ranks:
        _, status = os.wait()
        if status:  # as torchrun: the others are not waited for
            for rank in ranks:
                rank.kill()
            return 1
    return 0


def rank(words: list[str]) -> int:
    if not os.environ.get("WITHOUT_PDEATHSIG"):
        die_with_parent()
    if words[0] == "mute":  # it still imports
        print("mute", flush=True)
        signal.pause()
    show_stacks_when_asked()
    number = os.environ["RANK"]
    while f"{number}:late" in words and not Path(f"{os.environ[VARIABLE]}.deadline").exists():
        os.sched_yield()
    with Notice() as notice, reporter() as report:
        for word in words:
            only, _, action = word.rpartition(":")
            if only in ("", number):
                code = act(action, notice, report)
                if code is not None:
                    return code
        return report.ended(0)


def tell(line: str) -> None:
    """In one piece, also where nothing is buffered: ranks write to one file."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def act(action: str, notice: Notice, report: Reporter) -> int | None:
    name, _, value = action.partition("=")
    if name == "say":
        tell(f"rank {os.environ['RANK']} {value} {os.getpid()}")
    elif name == "step":
        report.place("micro_batch", int(value))
    elif name == "run":
        url, _, generation = value.partition("@")
        report.run(url, int(generation))
    elif name == "wait":
        while not notice.requested():
            signal.pause()
    elif name == "deadline":
        tell(f"until {Path(f'{os.environ[VARIABLE]}.deadline').read_text()}")
    elif name == "hang":
        while True:
            signal.pause()
    elif name == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif name == "agent":  # is stopped; this rank leaves
        os.kill(os.getppid(), signal.SIGSTOP)
    elif name == "variable":
        tell(f"{value}={os.environ.get(value)}")
    elif name == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "orphan":  # ignores every polite signal, in a session of its own
        code = "import signal; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 10, 12, 15)]\n"
        child = [sys.executable, "-c", f"{code}signal.pause()"]
        print("orphan", subprocess.Popen(child, start_new_session=True).pid, flush=True)
    elif name == "busy":
        error = RunBusyError("the run is in use by generation 4 on host other, at step 7")
        return report.ended(exit_code(error), error)
    elif name == "meet":
        report.place("rendezvous", 0)
    elif name == "unlike":
        unlike = UnlikeHostsError("a host with another torch")
        return report.ended(exit_code(unlike), unlike)
    elif name == "error":
        return report.ended(70, ZeroDivisionError("a defect"))
    elif name == "exit":
        return report.ended(int(value))
    elif name == "silent":
        os._exit(int(value))
    return None


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        sys.exit(rank(sys.argv[2].split(",")))
    sys.exit(agent(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split("/")))
