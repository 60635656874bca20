"""A run with a plan and real checkpoints in its log, and the consumption of its data, without
training."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from checkpointing.group import Solo
from checkpointing.history import history
from checkpointing.incarnation import Incarnation, claim_run
from checkpointing.save import save
from data_service.batches import Batches
from data_service.plan import Plan
from data_service.recorded import KIND, RecordedPlan, committed_cursor
from data_service.run_data import batches_of
from data_service.source import Source
from storage.canonical import canonical_json
from storage.log import Log
from storage.store import Store, open_store
from tests.test_save import state

SHAPE = {"seed": 7, "context": 8, "global_batch_size": 6, "lanes": 3}


class DataRun:
    """A run that consumes its data and saves; each `start` is one more incarnation."""

    def __init__(self, place: str, sources: Mapping[str, Source], plan: Plan) -> None:
        self.place = place
        self.store: Store = open_store(place)
        self.sources = sources
        identity = {"model.n_layer": 2, "model.n_embd": 128, "model.context": SHAPE["context"]}
        content = {"format": 1, "run": "made", "identity": identity}
        self.store.put("run.json", canonical_json(content))
        self.owner: Incarnation
        self.batches: Batches
        self.start()
        self.edit(plan)

    def start(self) -> int | None:
        """One more incarnation; the step of the newest checkpoint, that it goes on from."""
        body = {"schedule": {"schedule.max_steps": 400}}
        self.owner = claim_run(self.store, Log(self.store), body=body, take_over=True)
        live = history(self.owner.records).live
        self.parent = live[-1].index if live else None
        return live[-1].step if live else None

    def edit(self, plan: Plan, **changes: Any) -> None:
        """Record a plan, from its last segment on."""
        recorded = RecordedPlan(
            **{"plan": plan, "from_step": plan.segments[-1].from_step, **SHAPE, **changes}
        )
        self.owner.append(KIND, lambda _: recorded.to_body())
        self.batches = batches_of(recorded, self.sources)

    def save(self, *steps: int, cursor: Mapping[str, Any] | None = None, old: bool = False) -> None:
        """Commit the state at each of the steps; `old` as a version without cursors would."""
        for step in steps:
            said = None if old else cursor or committed_cursor(self.batches.cursor(step))
            content = replace(state(step), cursor=said)
            save(self.store, self.owner, Solo(), content, step=step, parent=self.parent)

    def quarantine(self, step: int) -> None:
        """Find the newest checkpoint of a step damaged."""
        index = [c.index for c in history(self.owner.check()).live if c.step == step][-1]
        self.owner.append("QUARANTINE", lambda _: {"checkpoints": [index]})
