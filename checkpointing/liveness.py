"""Whether anybody trains a run now: judged as a starter judges it, without claiming."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from checkpointing.beats import BEAT_SECONDS, read_beat
from checkpointing.history import History
from checkpointing.owner import provably_gone, this_process
from storage.store import Store

State = Literal["never claimed", "complete", "alive", "gone", "silent"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Liveness:
    """What is known of the newest incarnation. `beat` is its last heartbeat, empty for none.

    `gone`: it said so, or this host can prove it. `silent`: no heartbeat came while we waited.
    `here` when it is a process of this machine.
    """

    state: State
    generation: int = 0
    owner: Mapping[str, Any] = field(default_factory=dict)
    beat: Mapping[str, Any] = field(default_factory=dict)
    here: bool = False

    @property
    def host(self) -> str:
        """Where it is or was."""
        return str(self.owner.get("host", "unknown"))


def judge(store: Store, past: History, sleep: Callable[[float], None]) -> Liveness:
    """Takes two beat intervals where only the heartbeats can tell."""
    if past.generation == 0:
        return Liveness(state="never claimed")
    owner = past.claim.body.get("owner") if past.claim else None
    owner = owner if isinstance(owner, dict) else {}
    beat = read_beat(store, past.generation)

    def found(state: State) -> Liveness:
        here = _is_here(owner)
        return Liveness(state=state, generation=past.generation, owner=owner, beat=beat, here=here)

    if past.end is not None and past.end.generation == past.generation:
        return found("complete")
    if beat.get("left") is True or provably_gone(owner):
        return found("gone")
    if _is_here(owner):
        return found("alive")
    sleep(2 * BEAT_SECONDS)
    before, beat = beat, read_beat(store, past.generation)
    if beat.get("left") is True:
        return found("gone")
    return found("alive" if beat != before else "silent")


def _is_here(owner: Mapping[str, Any]) -> bool:
    """Whether a process that is not provably gone is one of this machine, and so alive."""
    here = this_process()
    places = ("boot_id", "pid_namespace")
    return all(here[name] and owner.get(name) == here[name] for name in places)
