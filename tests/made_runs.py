"""A small run without training: a real log, real checkpoints, and nothing that trained them."""

from collections.abc import Callable
from typing import Any

from checkpointing.group import Solo
from checkpointing.incarnation import Incarnation, claim_run
from checkpointing.save import save
from storage.canonical import canonical_json
from storage.log import Log
from storage.store import Store
from tests.test_save import state

RUN = {"format": 1, "run": "made", "identity": {"seed": 0}}


def make_run(store: Store, *steps: int, claim: dict[str, Any] | None = None) -> Incarnation:
    """A run with a checkpoint at each of the steps, and its owner."""
    store.put("run.json", canonical_json(RUN))
    return go_on(store, *steps, claim=claim)


def go_on(
    store: Store,
    *steps: int,
    claim: dict[str, Any] | None = None,
    after: Callable[[int], None] = lambda step: None,
) -> Incarnation:
    """One more incarnation of a run, with a checkpoint at each of the steps."""
    owner = claim_run(store, Log(store), body=claim or {}, take_over=True)
    for step in steps:
        save(store, owner, Solo(), state(step), step=step, parent=None)
        after(step)
    return owner


def contents(store: Store) -> dict[str, bytes]:
    """Everything in a store, by key."""
    return {key: store.get(key) for key in store.list("")}
