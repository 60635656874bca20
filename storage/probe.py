"""Finds out whether a store can fence, before a run trusts it."""

import uuid

from storage.errors import ConfigurationError
from storage.store import Store


def probe(store: Store) -> None:
    """Raise ConfigurationError unless a second creation of a key fails and the first is listed.

    Leaves nothing behind. Does not cover stores that keep the condition only some of the time.
    """
    key = f"probe/{uuid.uuid4().hex}"
    try:
        first = store.put_if_absent(key, b"first")
        second = store.put_if_absent(key, b"second")
        content = store.get(key) if first else b""
        listed = key in store.list("probe/")
    finally:
        store.delete(key)
    if not first or second or content != b"first":
        raise ConfigurationError(
            f"{store.url} cannot fence: creating a key twice must fail the second time, and it did "
            "not, so two processes could both believe that they own the run. Keep the run in a "
            "local folder, gs:// or s3:// bucket, or pass --allow_unfenced_store to take the risk"
        )
    if not listed:
        raise ConfigurationError(
            f"{store.url} cannot fence: a listing does not show a key just created, so a restart "
            "could miss the newest checkpoint. Use another store, or pass --allow_unfenced_store"
        )
