"""Exit codes, and which error means which."""

import logging
import sys
import traceback

from storage.errors import (
    ConfigurationError,
    FencedError,
    IntegrityError,
    RangeFlowError,
    RunBusyError,
    StoreUnavailableError,
)

COMPLETE = 0
INTERNAL = 70
START_AGAIN = 75
FENCED = 76
PERMANENT = 78

_CODES: tuple[tuple[type[RangeFlowError], int], ...] = (
    (FencedError, FENCED),
    (StoreUnavailableError, START_AGAIN),
    (RunBusyError, START_AGAIN),
    (ConfigurationError, PERMANENT),
    (IntegrityError, PERMANENT),
)

logger = logging.getLogger(__name__)


def exit_code(error: BaseException) -> int:
    """The exit code of a process that ends with this error, and one line about it on stderr.

    Only an error that is nobody's fault but the program's is shown with its traceback.
    """
    for kind, code in _CODES:
        if isinstance(error, kind):
            prefix = "FENCED" if code == FENCED else "error"
            sys.stderr.write(f"{prefix}: {error}\n")
            return code
    traceback.print_exception(error)
    return INTERNAL
