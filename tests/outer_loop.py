"""The least that a supervisor of several hosts does: agree, start torchrun, and again.

Usage: outer_loop.py TORCHRUN_ARGUMENTS...
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.elastic import Elastic, Joined, RunIsCompleteError
from storage.errors import RangeFlowError


def pause(seconds: float) -> bool:
    time.sleep(seconds)
    return True


def say(text: str) -> None:
    print(f"outer loop: {text}", flush=True)


def once(elastic: Elastic) -> int:
    """One start of torchrun; its exit code."""
    try:
        joined = elastic.join(pause)
    except RunIsCompleteError:
        return 0
    assert joined is not None, "the pause never ends it"
    command = [sys.executable, "-m", "torch.distributed.run", *joined.arguments]
    environment = {**os.environ, **joined.environment, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agent = subprocess.Popen(command, env=environment, start_new_session=True)
    while (code := agent.poll()) is None:
        pause(1.0)
        if not has_ranks(agent.pid) and (why := in_vain(elastic, joined)):
            say(f"torchrun is killed: {why}")
            os.killpg(agent.pid, signal.SIGKILL)
    return code


def in_vain(elastic: Elastic, joined: Joined) -> str:
    try:
        return elastic.outdated(joined)
    except RangeFlowError:
        return ""


def has_ranks(agent: int) -> bool:
    """Whether a rank lives. An agent that hangs leaves those that have ended as zombies."""
    try:
        ranks = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        states = [Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2] for rank in ranks]
    except OSError:
        return False
    return any(state.split()[0] != "Z" for state in states)


def main(arguments: list[str]) -> int:
    elastic = Elastic(arguments, os.environ.get, say)
    while True:
        try:
            code = once(elastic)
        except RangeFlowError as error:
            say(f"error: {error}")
            code = error.exit_code
        say(f"exit code {code}")
        if code == 0:
            return 0
        pause(1.0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
