"""Edits of the plan that operators ask for, made by all ranks together between two steps.

An edit is a PLAN record from a step that no rank has begun, or it is refused and training goes on.
Rank 0 works it out, every rank opens the data as it would then be, and only when all of them can is
it recorded: from then on it is part of the run, whoever dies next.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any

from checkpointing.asks import KINDS
from checkpointing.history import history
from checkpointing.incarnation import Incarnation
from data_service.batches import Batches
from data_service.edits import KIND, Edit, edited
from data_service.loader import Loader, StepRows
from data_service.plan import Plan
from data_service.recorded import RecordedPlan, located, recorded_plans
from launch.caching import RemoteData
from launch.config import RunConfig
from launch.data import batches_of, record_plan
from launch.phase import Phase
from launch.world import World
from storage.errors import RangeFlowError, StoreUnavailableError
from storage.requests import Inbox, Request, refusal
from storage.store import Store
from trainer.evaluate import held_out

logger = logging.getLogger(__name__)

ASKED = {*KINDS, KIND}
"""What can be asked of a process that trains."""


class Editor:
    """Answers requests for edits. Every rank calls the same methods at the same time."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        store: Store,
        incarnation: Incarnation | None,
        announce: Phase,
        remote: RemoteData,
    ) -> None:
        self._config = config
        self._world = world
        self._store = store
        self._incarnation = incarnation
        self._announce = announce
        self._remote = remote
        self._inbox = Inbox(store, ASKED)

    def answer_waiting(self, batches: Batches) -> Batches:
        """Answer what was asked while nobody trained, from the newest checkpoint's step on."""
        waiting: list[Request] = []

        def look() -> int:
            waiting.extend(request for request in self._inbox.pending() if request.kind == KIND)
            live = history(self._owner.records).live
            return live[-1].step if live else 0

        earliest = self._world.on_rank_0(look)
        return self.answer(batches, waiting, earliest)

    def answer(self, batches: Batches, waiting: Sequence[Request], earliest: int) -> Batches:
        """The batches after these requests, those given when none of them changes the plan.

        `earliest` is the first step that no rank has begun; only rank 0 knows what is `waiting`.
        A store that fails while a PLAN is appended is an error: it may be there or not.
        """
        left = list(waiting)
        while True:
            proposed = self._world.on_rank_0(lambda: self._next_proposal(left, earliest))
            if proposed is None:
                return batches
            self._announce("edit")
            tried, why_not = self._try(Plan.from_json(proposed["plan"]), batches)
            reasons = [reason for reason in self._world.gather(why_not) if reason]
            if tried is not None and not reasons:
                self._world.on_rank_0(partial(self._record, proposed, left))
                batches = tried
            elif left:
                self._refuse(left.pop(0), reasons[0])

    @property
    def _owner(self) -> Incarnation:
        assert self._incarnation is not None, "rank 0 owns the run"
        return self._incarnation

    def _next_proposal(self, left: list[Request], earliest: int) -> dict[str, Any] | None:
        """The plan after the next request that can be; those before it are refused."""
        while left:
            request = left[0]
            plans = recorded_plans(self._owner.records)
            if _is_recorded(request, plans) or refusal(self._store, request.key) is not None:
                self._delete(left.pop(0))  # its owner died before it could
                continue
            try:
                edit = Edit.from_body(request.body)
                plan, from_step = edited(
                    [one.plan for one in plans], edit, earliest, self._fingerprint
                )
                plan = plan.with_anchors(self._config.batch.global_batch_size)
            except RangeFlowError as error:
                self._refuse(left.pop(0), str(error))
                continue
            body = {"request": request.key, "edit": edit.to_body()}
            said = f"from step {from_step} on: {edit}"
            return {"plan": plan.to_json(), "from_step": from_step, "edit": body, "said": said}
        return None

    def _fingerprint(self, name: str, url: str) -> str:
        return self._remote.open(name, located(self._config.run, url)).fingerprint

    def _try(self, plan: Plan, batches: Batches) -> tuple[Batches | None, str]:
        """The batches of a plan, or why this rank cannot have them."""
        try:
            tried = batches_of(self._config, plan, self._remote, batches.sources)
            held_out(tried, self._config.loop.eval_windows, list(plan.sources))
        except RangeFlowError as error:
            where = f"rank {self._world.rank}: " if self._world.size > 1 else ""
            return None, f"{where}{error}"
        return tried, ""

    def _record(self, proposed: dict[str, Any], left: list[Request]) -> None:
        record_plan(
            self._config,
            self._owner,
            Plan.from_json(proposed["plan"]),
            started_with=recorded_plans(self._owner.records)[-1].started_with,
            from_step=proposed["from_step"],
            edit=proposed["edit"],
        )
        logger.info("%s", proposed["said"])
        self._announce("edit:recorded")
        self._delete(left.pop(0))

    def _refuse(self, request: Request, why: str) -> None:
        logger.warning("an edit of the plan is refused: %s", why)
        try:
            self._inbox.refuse(request, why)
        except StoreUnavailableError as error:
            logger.warning("the next start answers the refused edit again: %s", error)

    def _delete(self, request: Request) -> None:
        """Delete a request whose answer is in the log, which is what counts."""
        with suppress(StoreUnavailableError):
            self._inbox.answered(request)


class LiveData:
    """The batches of a run and this process's rows of them, exchanged when the plan is edited."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        batches: Batches,
        editor: Editor,
        remote: RemoteData,
        position: int,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """`while_waiting` is called while data is waited for; what it raises ends the wait."""
        self.batches = batches
        self._while_waiting = while_waiting
        self._editor = editor
        self._remote = remote
        self._waited_before = 0.0
        self._mine = config.batch.rows_of(world.rank, world.size)
        self._loader = self._loaded(batches, position)

    def __enter__(self) -> "LiveData":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loader.close()

    @property
    def waited_seconds(self) -> float:
        """How long data has been waited for so far."""
        return self._waited_before + self._loader.waited_seconds

    def next(self, step: int) -> StepRows:
        """This process's part of the step's global batch."""
        return self._loader.next(step)

    def answer(self, waiting: Sequence[Request], step: int) -> Batches:
        """Answer requests for edits before `step`, which no rank has begun; the batches from it on.

        Every rank calls it at the same step.
        """
        batches = self._editor.answer(self.batches, waiting, step)
        if batches is not self.batches:
            self._loader.close()
            self._waited_before = self.waited_seconds
            self.batches, self._loader = batches, self._loaded(batches, step)
        return batches

    def _loaded(self, batches: Batches, step: int) -> Loader:
        self._remote.follow(batches, step)
        mine = [(self._mine.start, self._mine.stop)]
        return Loader(
            batches,
            mine,
            start_step=step,
            while_waiting=self._while_waiting,
            before_step=self._remote.at,
        )


def _is_recorded(request: Request, plans: Sequence[RecordedPlan]) -> bool:
    return any(one.edit is not None and one.edit["request"] == request.key for one in plans)
