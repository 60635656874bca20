"""The place that a run is copied to: what it may hold before, and how it takes what is sent once.

It may be empty, or hold an earlier or unfinished copy of the same run, which its log tells: its
last record names, by digest, the one before it, and so all of them.
"""

import re
from collections.abc import Sequence

from checkpointing.naming import RUN_KEY
from storage.errors import ConfigurationError
from storage.store import Store

RECORD_KEY = re.compile(r"log/(\d{10,})\.json")


def refuse_overlap(source: Store, destination: Store) -> None:
    """Refuse a destination that is the source, lies in it, or holds it."""
    places = []
    for store in (source, destination):
        path = store.local_path(RUN_KEY)
        places.append(str(path.parent.resolve()) if path else store.url.rstrip("/"))
    one, other = (f"{place}/" for place in places)
    if one.startswith(other) or other.startswith(one):
        raise ConfigurationError(
            f"the destination {destination.url} and the run {source.url} lie in each other; "
            "give another place"
        )


def refuse_other(source: Store, destination: Store, records: Sequence[str]) -> None:
    """Refuse a destination whose log is no prefix of `records`.

    Its last record tells: it names, by digest, the one before it, and so all of them.
    """
    keys = [key for key in destination.list("") if not key.startswith("probe/")]
    if not keys:
        return
    theirs = sorted(key for key in keys if RECORD_KEY.fullmatch(key))
    if not theirs and RUN_KEY not in keys:
        raise ConfigurationError(
            f"{destination.url} holds something that is no copy of the run ({keys[0]}); give a new "
            "or empty place"
        )
    if not theirs or not _is_ours(source, destination, theirs[0], records):
        raise another_run(destination)
    if RUN_KEY in keys and not _is_ours(source, destination, RUN_KEY, [RUN_KEY]):
        raise another_run(destination)
    if not _is_ours(source, destination, theirs[-1], records):
        raise _gone_on(destination)


def _is_ours(source: Store, destination: Store, key: str, sent: Sequence[str]) -> bool:
    """Whether an object is a copy, whole or torn, of one that the source has."""
    return key in sent and source.get(key).startswith(destination.get(key))


def another_run(destination: Store) -> ConfigurationError:
    return ConfigurationError(f"{destination.url} holds another run; give a new or empty place")


def _gone_on(destination: Store) -> ConfigurationError:
    return ConfigurationError(
        f"{destination.url} has gone on by itself since it was copied: its log is not a beginning "
        "of the source's. Give a new place"
    )


def put_record(destination: Store, key: str, data: bytes) -> None:
    if not put_once(destination, key, data):
        raise _gone_on(destination)


def put_once(destination: Store, key: str, data: bytes) -> bool:
    """Create an object, or find it there; False when it has another content.

    Where creation is not atomic, a killed copy leaves the beginning of an object: that is replaced.
    """
    if destination.put_if_absent(key, data):
        return True
    there = destination.get(key)
    if there != data and data.startswith(there):
        destination.put(key, data)
        return True
    return there == data
