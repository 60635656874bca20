"""The training program, which stops itself when it enters given phases, to be killed or woken.

Usage: killable.py FIFO STOPS CONTROL TRAINING_ARGUMENTS...
STOPS is `phase=n,phase=n`: where to stop, each counted from the stop before. At each the process
writes `pid step` to FIFO and sends itself SIGSTOP. CONTROL names a negative control of
`controls.py`, or is "none".
"""

import os
import signal
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.train import main


def run(fifo: str, stops: str, control: str, arguments: list[str]) -> int:
    waiting = [(phase, int(n)) for phase, _, n in (s.partition("=") for s in stops.split(",") if s)]
    entered = 0
    one_at_a_time = threading.Lock()  # threads that save announce their phases, too

    def listener(name: str, step: int) -> None:
        with one_at_a_time:
            listen(name, step)

    def listen(name: str, step: int) -> None:
        nonlocal entered
        if os.environ.get("RANK", "0") != "0" or not waiting or name != waiting[0][0]:
            return
        entered += 1
        if entered < waiting[0][1]:
            return
        entered = 0
        del waiting[0]
        with open(fifo, "w") as file:
            file.write(f"{os.getpid()} {step}\n")
        # To this thread, which then goes no further; the rest of the process stops with it.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

    if control == "none":
        context = nullcontext()
    else:
        from tests.controls import broken

        context = broken(control)
    with context:
        return main(arguments, listener)


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:4], sys.argv[4:]))
