"""Exit codes of training, and what is said of the error behind one."""

import re
import sys
import traceback
from typing import Any

from storage.errors import FencedError, RangeFlowError

COMPLETE = 0
INTERNAL = 70
START_AGAIN = 75
FENCED = 76
PERMANENT = 78

FINAL = (COMPLETE, FENCED, PERMANENT)
"""Codes that end the supervisor as well; any other starts the program again."""


def exit_code(error: BaseException) -> int:
    """The exit code of a process that ends with this error, and one line about it on stderr.

    Only an error that is nobody's fault but the program's is shown with its traceback. That another
    process of the world was lost is no error of this one: it is to start again.
    """
    if lost_a_peer(error):
        said = " ".join(str(error).split())[:300]
        sys.stderr.write(f"error: another process of the world is gone: {said}\n")
        return START_AGAIN
    if isinstance(error, RangeFlowError):
        prefix = "FENCED" if isinstance(error, FencedError) else "error"
        sys.stderr.write(f"{prefix}: {error}\n")
        return error.exit_code
    traceback.print_exception(error)
    return INTERNAL


def own_error(error: BaseException | None) -> dict[str, Any] | None:
    """The error as a heartbeat says it, if it is this start's own: code, and one line.

    None for what came from elsewhere: a store, a peer, a notice, another incarnation.
    """
    if error is None or lost_a_peer(error) or not isinstance(error, Exception):
        return None
    code = error.exit_code if isinstance(error, RangeFlowError) else INTERNAL
    if code in (START_AGAIN, FENCED):
        return None
    return {"code": code, "line": one_line(error)}


def one_line(error: BaseException) -> str:
    """The kind and the message of an error, in at most 500 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def last_words(error: BaseException | None) -> dict[str, Any]:
    """What the last heartbeat says of the error that the incarnation ends with."""
    own = own_error(error)
    if own is not None:
        return {"error": own}
    return {"lost_a_peer": True} if error is not None and lost_a_peer(error) else {}


def lost_a_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process, or the way to it, is gone.

    Known by name and text, as torch 2.8 to 2.13 raise it: gloo has no class of its own.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"DistBackendError", "DistNetworkError", "DistStoreError", "HostLostError"}:
        return True
    return type(error) is RuntimeError and re.search(_GLOO, str(error)) is not None


_GLOO = r"gloo/|Connection (closed|reset) by peer|Broken pipe|Timed out waiting \d+ms"
