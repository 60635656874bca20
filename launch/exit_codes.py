"""Exit codes of training, and what is said of the error behind one."""

import sys
import traceback

from storage.errors import FencedError, RangeFlowError

COMPLETE = 0
INTERNAL = 70
START_AGAIN = 75
FENCED = 76
PERMANENT = 78


def exit_code(error: BaseException) -> int:
    """The exit code of a process that ends with this error, and one line about it on stderr.

    Only an error that is nobody's fault but the program's is shown with its traceback.
    """
    if isinstance(error, RangeFlowError):
        prefix = "FENCED" if isinstance(error, FencedError) else "error"
        sys.stderr.write(f"{prefix}: {error}\n")
        return error.exit_code
    traceback.print_exception(error)
    return INTERNAL
