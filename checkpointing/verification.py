"""Finds out whether a checkpoint is whole, by reading every byte of it, and records that it is."""

from collections.abc import Sequence
from typing import Literal

from checkpointing.history import Checkpoint, History, history
from checkpointing.pins import pinned
from storage.errors import ConfigurationError, IntegrityError
from storage.log import Draft, Log, Record
from storage.store import Store

Verdict = Literal["whole", "damaged", "retired"]


def verify(store: Store, log: Log, index: int) -> tuple[Verdict, str]:
    """Whether the checkpoint of COMMIT `index` is whole, and what is damaged if it is not.

    What looks damaged is read a second time before it is called so; what is retired, also while it
    is read, is nobody's damage. Raises StoreUnavailableError when the store fails.
    """
    from checkpointing.load import load  # torch takes seconds, and `ls` and `show` need none of it

    with pinned(store, log, lambda past: _committed(past, index)) as checkpoint:
        if checkpoint.retired:
            return "retired", ""
        for again in (True, False):
            try:
                load(store, checkpoint)
                return "whole", ""
            except IntegrityError as error:
                if again:
                    continue
                if _committed(history(log.refresh()), index).retired:
                    return "retired", ""  # read without a pin, or stopped for longer than a lease
                return "damaged", str(error)
    raise AssertionError("the second reading always returns")


def record_verified(log: Log, index: int) -> bool:
    """Append VERIFIED for a checkpoint; False when that would say nothing new."""

    def draft(records: Sequence[Record]) -> Draft | None:
        checkpoint = _committed(history(records), index)
        if checkpoint.retired or (checkpoint.verified and not checkpoint.quarantined):
            return None
        return Draft(kind="VERIFIED", generation=0, body={"checkpoints": [index]})

    return log.append(draft) is not None


def damaged_unnoticed(log: Log) -> list[int]:
    """Records that were damaged after they had a successor; a torn one is voided by its own."""
    voided = {index for record in log.records for index in record.voids}
    return [index for index in log.damaged if index not in voided]


def _committed(past: History, index: int) -> Checkpoint:
    for checkpoint in past.checkpoints:
        if checkpoint.index == index:
            return checkpoint
    raise ConfigurationError(f"the log has no checkpoint at record {index}")
