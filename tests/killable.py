"""The training program, which stops and waits to be killed when it enters a given phase.

Usage: killable.py FIFO PHASE NTH CONTROL TRAINING_ARGUMENTS...
CONTROL is the name of a negative control of `controls.py`, or "none".
"""

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.train import main


def run(arguments: list[str]) -> int:
    fifo, phase, nth, control = arguments[:4]
    entered = 0

    def listener(name: str, step: int) -> None:
        nonlocal entered
        if name != phase or os.environ.get("RANK", "0") != "0":
            return
        entered += 1
        if entered == int(nth):
            with open(fifo, "w") as file:
                file.write(f"{os.getpid()} {step}\n")
            while True:
                signal.pause()

    if control != "none":
        from tests.controls import broken

        with broken(control):
            return main(arguments[4:], listener)
    return main(arguments[4:], listener)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
