"""What the training loop is given: saves, metrics, and what this process tells the others."""

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from checkpointing.asks import STOP
from checkpointing.beats import Beats, read_beat
from checkpointing.group import Group
from checkpointing.history import Checkpoint, history
from checkpointing.incarnation import Incarnation
from checkpointing.interval import (
    GUESS_SECONDS,
    MINIMUM_SECONDS,
    SaveCost,
    interval_seconds,
    lives,
    mean_time_to_preemption,
)
from checkpointing.naming import read_run
from checkpointing.retention import RetentionConfig, retire
from checkpointing.save import Saver, TrainingState
from checkpointing.tier import (
    adopt,
    claim_tier,
    clear_tier,
    drop_records_before,
    for_tier,
    tier_context,
    tier_store,
)
from data_service.edits import KIND as EDIT
from launch.config import RunConfig
from launch.editing import ASKED, LiveData
from launch.grace import Grace
from launch.phase import Phase
from launch.proof import Proof, nothing_recorded, recorded_steps
from launch.world import World
from storage.canonical import sha256_hex
from storage.errors import FencedError, StoreUnavailableError
from storage.requests import Inbox, Request
from storage.store import Store
from trainer.loop import LoopConfig, Surroundings
from trainer.metrics import Metrics, has_rows
from trainer.state import with_unsaid
from trainer.step import Flags, StepResult

logger = logging.getLogger(__name__)

_MOST_COST_SECONDS = 3600.0


class Keeper:
    """Keeps a run's checkpoints and curves. Only rank 0 has an incarnation and metrics.

    `capture` gives the state after so many finished steps, which must be those of now.

    Rows reach the curves before every commit, and with every heartbeat, both on other threads than
    the loop's, so that a store that hangs does not hold up training.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        store: Store,
        incarnation: Incarnation | None,
        metrics: Metrics | None,
        capture: Callable[[int], TrainingState],
        phase: Phase,
        parent: int | None,
        tier: "Tier | None" = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._world = world
        self._store = store
        self._incarnation = incarnation
        self._metrics = metrics
        self._capture = capture
        self._phase = phase
        self._clock = clock
        self._last_save = clock()
        self._put_off = 0
        self._curves_wait = False
        self._tokens_in_step = config.batch.global_batch_size * config.model.context
        self._cost = SaveCost(_cost_before(store, incarnation))
        self._begun = False
        self._prepared = False
        self._loss = math.nan
        self._inbox = Inbox(store, ASKED)
        self._asked: list[Request] = []
        self._told: list[Request] = []
        self._answering: list[Request] = []
        self._edits: list[Request] = []
        self._edits_taken: set[str] = set()
        self._lock = threading.Lock()
        self._past = history(incarnation.records if incarnation is not None else ())
        self._mean_seconds = mean_time_to_preemption(*lives(self._past, time.time()))
        self._saver = Saver(
            store,
            incarnation,
            world.another(),
            parent=parent,
            arenas=2 if tier is None else 1,
            announce=phase.aside,
            before_commit=self.flush,
            after_commit=self._committed,
        )
        self._tier = tier
        self._local: Saver | None = None
        if tier is not None:
            self._local = Saver(
                tier.store,
                tier.owner,
                tier.group,
                arenas=1,
                before_commit=self.flush,
                after_commit=lambda _: tier.retire(),
            )

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._saver.__exit__(kind, error, traceback)
        if self._local is not None:
            self._local.__exit__(kind, error, traceback)

    def record(self, row: dict[str, Any]) -> None:
        """Remember the row of a step until the next flush, and what it cost."""
        if row.get("tokens_per_second"):
            seconds = self._tokens_in_step / row["tokens_per_second"]
            self._cost.step(seconds, saving=self._begun or self._saver.busy)
        self._begun = False
        self._loss = row.get("loss", math.nan)
        if not self._prepared:
            self._prepared = True
            self._saver.prepare(self._capture(row["step"]))
        if self._metrics is not None:
            self._metrics.add(row)

    @property
    def stalled_seconds(self) -> float:
        """What saves have taken from steps so far."""
        return self._cost.total_seconds

    def told(self) -> dict[str, Any]:
        """For the heartbeat: the newest loss, and what saves cost."""
        saves = {
            "count": self._cost.saves,
            "seconds": round(self._cost.seconds, 3),
            "stalled_seconds": round(self.stalled_seconds, 3),
            "durable_seconds": round(self._saver.seconds_until_durable, 3),
        }
        return {"loss": self._loss if math.isfinite(self._loss) else None, "saves": saves}

    def beat(self) -> None:
        """What is done with every heartbeat: curves are written, requests looked for."""
        self.flush()
        found = self._inbox.pending()
        with self._lock:
            answering = {request.key for request in self._answering}
            news = [r for r in found if r.key not in answering | self._edits_taken]
            self._asked = [request for request in news if request.kind != EDIT]
            self._edits = [request for request in news if request.kind == EDIT]

    def take_edits(self) -> list[Request]:
        """The requests for edits that were found and not taken before; who takes them answers."""
        with self._lock:
            taken, self._edits = self._edits, []
            self._edits_taken |= {request.key for request in taken}
            return taken

    def flush(self) -> None:
        """Write the rows so far. Only while the incarnation is known to own the run."""
        if self._metrics is None:
            return
        try:
            self._metrics.flush()
            self._curves_wait = False
        except StoreUnavailableError as error:
            level = logging.DEBUG if self._curves_wait else logging.WARNING
            logger.log(level, "the curves wait for a later time: %s", error)
            self._curves_wait = True

    def flags(self) -> Flags:
        """What this process tells the others; rank 0 has the clock and the requests."""
        interval = self._interval_seconds()
        with self._lock:
            self._told = list(self._asked)
            asked = {request.kind for request in self._told}
            edit = bool(self._edits)
        due = interval > 0 and self._clock() - self._last_save >= interval
        local = self._local
        return Flags(
            stop=STOP in asked or self._saver.broken,
            saving=self._saver.busy,
            saving_locally=local is not None and local.busy,
            save_due=self._incarnation is not None and (due or "save" in asked),
            edit=edit,
        )

    def save(
        self,
        step: int,
        *,
        validation_loss: float | None,
        healthy: bool,
        wait: bool,
        unsaid: dict[str, Any] | None = None,
    ) -> bool:
        """Begin to save; wait for the end of it if asked to, here or by the configuration."""
        self._last_save = self._clock()
        self._begun = True
        with self._lock:
            self._answering += self._told  # not what was asked since: nobody has acted on that
            self._asked = [request for request in self._asked if request not in self._told]
            self._told = []
        state = self._capture(step)
        if unsaid is not None:
            state = with_unsaid(state, unsaid)
        self._saver.begin(state, step=step, healthy=healthy, validation_loss=validation_loss)
        if wait or self._config.wait_for_saves:
            self._phase("wait_for_save")
            return self._saver.finish() == step
        return True

    def finish_saves(self) -> int | None:
        """Wait for the saves in flight; the newest step that was committed in this start."""
        self._phase("wait_for_save")
        return self._saver.finish()

    def stopped(self) -> bool:
        """Whether this start ends because an operator asked for it, which is answered now.

        For rank 0, once the loop has left; not before, or a start that is killed until then would
        be started again and go on.
        """
        return self._answer(lambda request: request.kind == STOP)

    def completed(self) -> None:
        """Answer what was asked until the run's end: all is saved, nothing trains. For rank 0.

        A stop that came too late must not stop the start that goes on with more steps one day. An
        edit waits for that start.
        """
        for request in Inbox(self._store, ASKED).pending():
            if request.kind != EDIT:
                self._inbox.answered(request)

    @property
    def saved_step(self) -> int | None:
        """The newest step that was committed in this start."""
        return self._saver.newest_step

    def save_seconds(self) -> float:
        """How long a save that begins now takes, behind that in flight; 0 before the first."""
        return self._saver.seconds_left + self._saver.seconds_until_durable

    def save_locally(self, step: int, healthy: bool) -> None:
        """Begin a snapshot to the local tier, if there is one."""
        if self._tier is None:
            return
        context = tier_context(self._past)  # rank 0's, which alone knows the run's past
        if not self._world.one_host:
            self.flush()  # another host's snapshot may be all that is left: its curve must be too
            context = self._world.broadcast(context)
        if self._local is None:
            return
        state = self._capture(step)
        if self._tier.owner is not None:
            state = for_tier(state, context)
        try:
            self._local.begin(state, step=step, healthy=healthy)
        except FencedError:
            logger.warning("another process has taken the local tier: no more local snapshots here")
            self._local.__exit__(None, None, None)
            self._local = None

    def forget_tier(self) -> None:
        """Remove what the local tier holds, once the run is complete."""
        if self._local is not None and self._tier is not None:
            self._local.__exit__(None, None, None)
            if self._tier.owner is not None:
                self._tier.clear()

    def put_off(self, step: int) -> None:
        """A save is due and another in flight: that one is not tried again if it fails."""
        self._put_off += 1
        self._saver.give_up()

    def wait_for_copy(self) -> None:
        """Wait until the state may change."""
        self._saver.wait_for_copy()
        if self._local is not None:
            self._local.wait_for_copy()

    def _interval_seconds(self) -> float:
        if self._config.save_interval == "fixed":
            return self._config.save_interval_seconds
        return interval_seconds(
            self._cost.seconds,
            self._mean_seconds,
            minimum_seconds=max(MINIMUM_SECONDS, self._saver.seconds_until_durable),
        )

    def _answer(self, which: Callable[[Request], bool]) -> bool:
        """Answer these of the requests that a save was begun for; whether there was one."""
        with self._lock:
            answered = [request for request in self._answering if which(request)]
            self._answering = [r for r in self._answering if r not in answered]
        for request in answered:
            self._inbox.answered(request)
        return bool(answered)

    def _committed(self, checkpoint: Checkpoint) -> None:
        """Tell, and retire what is old; on the saving thread of rank 0."""
        put_off = f"; {self._put_off} saves put off so far" if self._put_off else ""
        logger.info(
            "step %d is saved, digest %s%s", checkpoint.step, checkpoint.digest[:12], put_off
        )
        incarnation = self._incarnation
        assert incarnation is not None, "rank 0 commits"
        self._past = history(incarnation.records)
        self._mean_seconds = mean_time_to_preemption(*lives(self._past, time.time()))
        self._answer(lambda request: request.kind != STOP)
        retire(self._store, incarnation, self._config.retention, announce=self._phase.aside)
        incarnation.shorten(lambda: self._store.list("checkpoints/"))


def _cost_before(store: Store, incarnation: Incarnation | None) -> float:
    """What a save cost the incarnation before, by its last heartbeat; a guess without one."""
    if incarnation is None:
        return GUESS_SECONDS
    try:
        saves = read_beat(store, incarnation.generation - 1).get("saves")
    except StoreUnavailableError:
        return GUESS_SECONDS
    told = saves.get("seconds") if isinstance(saves, dict) else None
    if not isinstance(told, int | float) or not 0 <= told < _MOST_COST_SECONDS:
        return GUESS_SECONDS
    return float(told)


def loop_config(config: RunConfig) -> LoopConfig:
    """The loop's; an interval that chooses itself takes the place of the one in steps."""
    if config.save_interval == "fixed":
        return config.loop
    return replace(config.loop, save_interval_steps=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tier:
    """The local tier of this host, written by its `group`, whose first rank owns it."""

    store: Store
    owner: Incarnation | None
    group: Group

    def retire(self) -> None:
        """Keep the newest snapshots."""
        assert self.owner is not None, "the first rank of a host commits"
        retire(self.store, self.owner, RetentionConfig(keep_last=2))
        base = self.owner.shorten(lambda: self.store.list("checkpoints/"))
        if base is not None:
            drop_records_before(self.store, base)

    def clear(self) -> None:
        """Remove everything. For its owner."""
        try:
            clear_tier(self.store)
        except StoreUnavailableError as error:
            logger.warning("the local tier was not removed: %s", error)


def open_tier(
    config: RunConfig, world: World, store: Store, owner: Incarnation | None, generation: int
) -> Tier | None:
    """The local tier, if one is asked for; what any host's holds of the run is first committed."""
    if not config.local_tier:
        return None
    run = world.on_rank_0(lambda: read_run(store)["run"])
    tier, host = tier_store(config.local_tier, run, store), world.of_host()
    curve = store.local_path("metrics.jsonl")

    def refused(committed: int, step: int) -> str:
        """A start without the tier went on from an older step, and dropped the rows after it."""
        if curve is None or has_rows(curve, committed, step):
            return ""
        return "a later start has dropped its curve"

    mine: Incarnation | None = None
    why_not = ""
    try:
        adopt(tier, store, owner, world, holds=host.rank == 0, refused=refused)
    except StoreUnavailableError as error:
        why_not = str(error)
    else:
        if host.rank == 0:
            try:
                mine = claim_tier(tier, generation)
            except StoreUnavailableError as error:
                why_not = str(error)
    reasons = [reason for reason in world.gather(why_not) if reason]
    if reasons:
        logger.warning("no local snapshots in this start: %s", reasons[0])
        return None
    return Tier(store=tier, owner=mine, group=host)


def surroundings(
    world: World,
    keeper: Keeper,
    data: LiveData,
    grace: Grace,
    phase: Phase,
    beats: Beats | None,
    proof: Proof,
    measured: Callable[[], dict[str, float]] = dict,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Surroundings:
    """The loop's view of this process. A fenced process stops as one that got a notice.

    `measured` gives what is added to the row of each step, and `report` takes the whole of it.
    """

    def record(row: dict[str, Any]) -> None:
        keeper.record(row)
        report(row)

    def flags() -> Flags:
        told = keeper.flags()
        stop = told.stop or grace.requested() or (beats is not None and beats.fenced)
        held = proof.holds_back
        return replace(
            told,
            stop=stop,
            saving=told.saving or held,
            saving_locally=told.saving_locally or held,
            no_time=grace.no_time() or (held and grace.requested()),
        )

    def stepped(step: int, position: int, result: StepResult) -> None:
        grace.step_is_over()
        proof.step(
            step, lambda: data.batches.sample_digest(position), result.loss, result.gradient_norm
        )

    return Surroundings(
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        gather=world.gather,
        announce=phase,
        flags=flags,
        record=record,
        save=keeper.save,
        put_off=keeper.put_off,
        save_locally=keeper.save_locally,
        wait_for_copy=keeper.wait_for_copy,
        data_metrics=measured,
        finish_saves=keeper.finish_saves,
        abandon=grace.gives_up,
        stopping=grace.requested,
        stepped=stepped,
        edited=lambda step: data.answer(keeper.take_edits(), step),
    )


def resume_proof(
    config: RunConfig,
    world: World,
    store: Store,
    owner: Incarnation | None,
    step: int,
    committed_by: int,
) -> Proof:
    """The proof of a resume from `step`, which generation `committed_by` had committed, 0 for none.

    The generation before may have recorded as much: a snapshot of it may have been adopted.
    """

    def look() -> dict[str, Any]:
        assert owner is not None, "rank 0 owns the run"
        if owner.generation == 1:
            return nothing_recorded()
        oldest = min(committed_by, owner.generation) - 1
        return recorded_steps(store, owner.records, owner.generation, step, oldest)

    return Proof(
        world.on_rank_0(look),
        restored_step=step,
        stop=config.on_divergence == "stop",
        leader=world.rank == 0,
    )


def open_metrics(
    config: RunConfig, store: Store, owner: Incarnation, step: int, stack: ExitStack
) -> Metrics:
    """The curves of this incarnation: in the run, or in `runs/<name>-<hash>` for a remote one."""
    inside = store.local_path("metrics.jsonl")
    place = config.run.rstrip("/")
    name = f"{place.rpartition('/')[2]}-{sha256_hex(place.encode())[:8]}"
    folder = inside.parent if inside else Path("runs") / name
    logger.info("curves: tensorboard --logdir %s", folder / "tensorboard")
    metrics = Metrics(folder, generation=owner.generation, step=step, check=owner.check)
    return stack.enter_context(metrics)


def finish(incarnation: Incarnation) -> None:
    """Record that the run is complete."""
    newest = history(incarnation.check()).live[-1]
    body = {"step": newest.step, "digest": newest.digest}
    incarnation.append("END", lambda _: body)
    logger.info("complete: %d steps, digest %s", newest.step, newest.digest)
