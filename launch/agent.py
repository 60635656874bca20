"""torchrun below a supervisor: it dies with it, and its exit code tells more than torchrun's 1.

Usage: python -m launch.agent SUPERVISOR_PID TORCHRUN_ARGUMENTS...

torchrun waits for ever, whatever its time-outs (2.13), where a connection is taken and nobody
answers: a host that is frozen, another program's port. So while it has no rank, the place where the
hosts meet is asked for an answer beside it.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta

from launch.descendants import descendants
from launch.exit_codes import COMPLETE, INTERNAL, PERMANENT, START_AGAIN
from launch.minded import die_with_parent
from storage.ending import end_process

RANKS_FAILED = 1
"""torchrun's own: what the ranks have told the supervisor says more."""
NOT_REACHED = 69
"""Nobody has answered in time at the place where the hosts meet."""
ANSWER_SECONDS = 20.0
ASK_SECONDS = 30.0


def main(arguments: Sequence[str]) -> int:
    """Be torchrun until it ends; on the main thread, which starts the ranks and so is theirs."""
    die_with_parent(int(arguments[0]))
    if place := elsewhere(arguments):
        threading.Thread(target=mind_place, args=(place,), daemon=True).start()
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(list(arguments[1:]))
    except ChildFailedError as error:
        sys.stderr.write(f"{error}\n")
        return RANKS_FAILED
    except SystemExit as stop:  # of argparse: --help, or arguments that are none
        return PERMANENT if stop.code else COMPLETE
    except (RendezvousError, DistNetworkError, DistStoreError) as error:
        sys.stderr.write(f"error: the hosts did not come together: {error}\n")
        return NOT_REACHED if isinstance(error, RendezvousConnectionError) else START_AGAIN
    except SignalException as error:
        sys.stderr.write(f"error: torchrun was stopped: {error}\n")
        return START_AGAIN
    except Exception:
        import traceback

        traceback.print_exc()
        return INTERNAL
    return COMPLETE


def elsewhere(arguments: Sequence[str]) -> str:
    """Where the hosts meet, ADDRESS:PORT, when that is another host; "" when it is this one."""
    given = dict(word.partition("=")[::2] for word in arguments if word.startswith("--rdzv-"))
    another = given.get("--rdzv-conf", "").endswith("is_host=0")
    return given.get("--rdzv-endpoint", "") if another else ""


def mind_place(place: str, end: Callable[[int], object] = os._exit) -> None:
    """End this process when nobody answers at a place, and no rank lives that needs no answer."""
    while descendants() or answers(place, ANSWER_SECONDS) or descendants():
        time.sleep(ASK_SECONDS)
    sys.stderr.write(f"error: {place}, where the hosts meet, takes connections and answers none\n")
    sys.stderr.flush()
    end(NOT_REACHED)


def answers(place: str, seconds: float) -> bool:
    """Whether torchrun's store is at this place. What hangs is left behind."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address, _, port = place.rpartition(":")
    answered = threading.Event()

    def ask() -> None:
        with suppress(RuntimeError, ValueError):
            TCPStore(
                address,
                int(port),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=seconds),
            )
            answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return answered.is_set()


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
