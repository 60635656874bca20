"""The training program, which stops itself where a trial asks it to.

Usage: watched.py TRAINING_ARGUMENTS..., with the folder of its trial in the environment. There a
trial writes in `stop` a phase, a step, and "stop" or "hold"; the first rank 0 that comes so far
renames the file to `stopped-PROCESS-STEP`. Then it sends itself SIGSTOP, or the thread that came
there goes no further until there is a file `released`. The phases are those of the training
program, with "import" before and "exit" after all of them.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

if __name__ == "__main__":  # torchrun runs this file, with its folder in front of the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

VARIABLE = "RANGEFLOW_TRIAL"
"""Names the folder; whoever has it in its environment is a process of that trial."""


def stop_where_asked(phase: str, step: int) -> None:
    """Stop this thread, and the process with it, if that is asked for. For any thread."""
    folder = Path(os.environ[VARIABLE])
    try:
        asked, at_least, how = (folder / "stop").read_text().split()
    except FileNotFoundError:
        return
    if os.environ.get("RANK", "0") != "0" or asked != phase or step < int(at_least):
        return
    try:
        (folder / "stop").rename(folder / f"stopped-{os.getpid()}-{step}")
    except FileNotFoundError:  # another thread or process was faster
        return
    if how == "hold":
        while not (folder / "released").exists():
            time.sleep(0.01)
        return
    # To this thread, which then goes no further; the rest of the process stops with it.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def run(arguments: list[str]) -> int:
    """Train; returns the exit code."""
    stop_where_asked("import", 0)
    from launch.train import main

    code = main(arguments, stop_where_asked)
    stop_where_asked("exit", 0)
    return code


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
