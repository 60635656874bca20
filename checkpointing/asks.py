"""What operators ask of the incarnation that saves: which requests of `storage` mean what to it."""

from storage.errors import ConfigurationError
from storage.requests import put_request
from storage.store import Store

STOP = "stop"
KINDS = {
    "save": "save at the next step boundary",
    STOP: "save, and leave with exit code 0: nothing starts it again but a person",
}
"""What can be asked, and what the owner then does. A request is answered once that is done."""


def ask(store: Store, kind: str) -> str:
    """Ask the owner of the run for `kind`; returns the key, which is gone once it is answered."""
    if kind not in KINDS:
        raise ConfigurationError(f"a request must be one of {', '.join(KINDS)}; got {kind!r}")
    return put_request(store, kind)
