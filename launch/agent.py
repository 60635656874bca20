"""torchrun below a supervisor: it dies with it, and its exit code tells more than torchrun's 1.

Usage: python -m launch.agent SUPERVISOR_PID TORCHRUN_ARGUMENTS...
"""

import sys
from collections.abc import Sequence

from launch.exit_codes import COMPLETE, INTERNAL, PERMANENT, START_AGAIN
from launch.minded import die_with_parent
from storage.ending import end_process

RANKS_FAILED = 1
"""torchrun's own: what the ranks have told the supervisor says more."""
NOT_REACHED = 69
"""The place where the hosts meet could not be connected to, or not any more."""


def main(arguments: Sequence[str]) -> int:
    """Be torchrun until it ends; on the main thread, which starts the ranks and so is theirs."""
    die_with_parent(int(arguments[0]))
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
        met = not isinstance(error, RendezvousConnectionError | DistNetworkError | DistStoreError)
        return START_AGAIN if met else NOT_REACHED
    except SignalException as error:
        sys.stderr.write(f"error: torchrun was stopped: {error}\n")
        return START_AGAIN
    except Exception:
        import traceback

        traceback.print_exc()
        return INTERNAL
    return COMPLETE


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
