"""How the incarnations of a run ended, as its log and heartbeats tell."""

from checkpointing.beats import read_beat, read_error
from checkpointing.history import history
from launch.crash_loop import Ended
from storage.log import Log
from storage.store import Store

_LOOK_BACK = 10
"""Incarnations whose heartbeats are read."""


def recorded_ends(store: Store) -> tuple[list[Ended], int]:
    """How the newest incarnations of a run ended, and the highest step before them."""
    past = history(Log(store).refresh())
    spans = past.lifespans[-_LOOK_BACK:]
    committed: dict[int, int] = {}
    for checkpoint in past.checkpoints:
        generation, step = checkpoint.generation, checkpoint.step
        committed[generation] = max(step, committed.get(generation, 0))
    first = spans[0].generation if spans else 0
    before = max((step for g, step in committed.items() if g < first), default=0)
    ends = []
    for span in spans:
        beat = read_beat(store, span.generation)
        step = int(beat.get("step", 0))
        error = read_error(store, span.generation, beat)
        ends.append(
            Ended(
                generation=span.generation,
                phase=str(beat.get("phase", "claim")),
                step=step,
                reached=max(step, committed.get(span.generation, 0)),
                error=str(error.get("line", "")),
                in_order=span.ended
                or bool(beat.get("left") and not error and not beat.get("lost_a_peer")),
            )
        )
    return ends, before
