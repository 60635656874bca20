"""The training program of a trial, with a mechanism left out.

Usage: chaos_control.py CONTROL TRAINING_ARGUMENTS...
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from launch.chaos.watched import run
    from tests.controls import broken

    with broken(sys.argv[1]):
        code = run(sys.argv[2:])
    sys.exit(code)
