"""Saves beside training: the loop hands over its state and goes on.

`begin` starts the copy of the state and returns; `wait_for_copy` comes before the next update; a
thread of its own uploads and commits. A thread, because digests, file writes and sockets release
the interpreter, and because the memory of a GPU's copy can be pinned only in the process that owns
it; docs/benchmarks.md has the figures.

Covers: one save in flight, in memory allocated once; a save that begins while another is in flight
(the last one before leaving) takes the second arena and its turn.
Does not cover: deciding when to save; the loop does.
"""

import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch

from checkpointing.group import Group
from checkpointing.history import Checkpoint, history
from checkpointing.incarnation import Incarnation
from checkpointing.layout import Spec, share, specs_of
from checkpointing.snapshot import Arena, Snapshot
from checkpointing.write import Around, Job, write
from storage.errors import FencedError, StoreUnavailableError
from storage.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """What a checkpoint holds. `exact`, `extra` and `cursor` are JSON.

    `tensors` and `exact` decide the digest; `extra` (states of random generators) is stored and
    verified, and left out of the digest. `cursor` says where the data stands in a few hundred
    bytes, and goes into the COMMIT as it is: the log outlives the checkpoints.
    """

    tensors: Mapping[str, torch.Tensor]
    exact: Mapping[str, Any]
    extra: Mapping[str, Any]
    cursor: Mapping[str, Any] | None = None


class Saver:
    """Saves one run's state, the same on every rank; only rank 0 has an `incarnation`.

    `group` must not be used by anybody else meanwhile. Every rank makes the same calls in the same
    order. With one arena a second `begin` waits for the end of the first save. `before_commit` and
    `after_commit` are called on the writing thread of rank 0, the first when everything is
    uploaded, the second with the checkpoint; a store that fails the second ends nothing.
    """

    def __init__(
        self,
        store: Store,
        incarnation: Incarnation | None,
        group: Group,
        *,
        parent: int | None = None,
        arenas: int = 2,
        announce: Callable[[str], None] = lambda phase: None,
        before_commit: Callable[[], None] = lambda: None,
        after_commit: Callable[[Checkpoint], None] = lambda checkpoint: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._incarnation = incarnation
        self._group = group
        self._parent = parent
        self._arenas = arenas
        self._announce = announce
        self._before_commit = before_commit
        self._after_commit = after_commit
        self._clock = clock
        self._specs: dict[str, Spec] | None = None  # not known yet
        self._free: list[Arena] = []
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._copying: list[Snapshot] = []
        self._unhealthy = False
        self._writes: list[tuple[Future[None], threading.Event]] = []
        self._begun = 0.0  # when the newest save began
        self._durable_after: deque[float] = deque(maxlen=5)
        self._error: BaseException | None = None
        self._outage = False
        self._left_over = False
        self.newest: Checkpoint | None = None
        """The newest checkpoint that this saver has committed; on rank 0."""
        self.newest_step: int | None = None
        """Its step, on every rank."""

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.give_up()
        self._copier.shutdown()
        self._writer.shutdown(cancel_futures=kind is not None)

    @property
    def busy(self) -> bool:
        """Whether a save is in flight on this rank."""
        return any(not future.done() for future, _ in self._writes)

    @property
    def seconds_until_durable(self) -> float:
        """How long a save takes from `begin`: the median of the newest five; 0 before the first."""
        return statistics.median(list(self._durable_after) or [0.0])

    @property
    def seconds_left(self) -> float:
        """How long the save in flight will still take, by that median; 0 when there is none."""
        if not self.busy:
            return 0.0
        return max(0.0, self._begun + self.seconds_until_durable - self._clock())

    @property
    def broken(self) -> bool:
        """Whether a save has ended the incarnation: `begin` and `finish` raise the reason."""
        return self._error is not None

    def prepare(self, state: TrainingState) -> None:
        """Make memory for saves of such a state ready, beside training."""
        arena = self._take_arena(state)
        self._free.append(arena)
        self._copier.submit(arena.make_ready)

    def begin(
        self,
        state: TrainingState,
        *,
        step: int,
        healthy: bool = True,
        validation_loss: float | None = None,
    ) -> None:
        """Start to save the state after `step` steps. Its tensors may change after `wait_for_copy`.

        Raises what an earlier save raised: FencedError, DivergenceError, or a defect.
        """
        self._raise_error()
        arena = self._take_arena(state)
        compare = self._group.size > 1
        snapshot = Snapshot(arena, state.tensors, self._copier, compare=compare)
        self._copying.append(snapshot)
        job = Job(
            step=step,
            snapshot=snapshot,
            specs=self._specs or {},
            exact=dict(state.exact),
            extra=dict(state.extra),
            cursor=None if state.cursor is None else dict(state.cursor),
            parent=self._parent,
            healthy=healthy,
            validation_loss=validation_loss,
        )
        self.give_up()
        given_up = threading.Event()
        self._writes = [pair for pair in self._writes if not pair[0].done()]
        self._begun = begun = self._clock()
        self._writes.append((self._writer.submit(self._write, job, given_up, begun), given_up))

    def wait_for_copy(self) -> None:
        """Wait until the state may change; call before every update."""
        while self._copying:
            self._copying.pop(0).wait()

    def give_up(self) -> None:
        """A newer state waits: if the save in flight fails, do not try it again."""
        for _, given_up in self._writes:
            given_up.set()

    def finish(self) -> int | None:
        """Wait for the saves in flight; the newest step that this saver has committed.

        A save that fails now is not tried again. Raises as `begin` does.
        """
        self.give_up()
        self.wait_for_copy()
        self._drain()
        self._writes = []
        self._raise_error()
        return self.newest_step

    def _write(self, job: Job, given_up: threading.Event, begun: float) -> None:
        """One save, on the writing thread; its error is kept for the next call."""
        try:
            if self._error is not None:
                return
            around = Around(
                announce=self._announce,
                before_commit=self._before_commit,
                failing=lambda reason: self._failing(job.step, reason),
                give_up=given_up,
            )
            job = replace(job, healthy=job.healthy and not self._unhealthy)
            index = write(self._store, self._incarnation, self._group, job, around)
            self._unhealthy = index is None and not job.healthy  # what was given up still happened
            if index is None:
                return
            self.newest_step = job.step
            self._durable_after.append(self._clock() - begun)
            if self._incarnation is not None:
                self._recovered(job.step)
                committed = history(self._incarnation.records).checkpoints
                self.newest = next(c for c in committed if c.index == index)
                self._follow(self.newest)
        except BaseException as error:
            self._error = error
        finally:
            self._free.append(job.snapshot.arena)

    def _take_arena(self, state: TrainingState) -> Arena:
        """Memory for this state; a new layout, after the first step, needs new arenas."""
        specs = specs_of(state.tensors)
        if specs != self._specs:
            self._drain()
            self._specs = specs
            objects = share(specs, self._group.rank, self._group.size)
            pinned = any(tensor.is_cuda for tensor in state.tensors.values())
            self._free = [Arena(objects, pinned=pinned) for _ in range(self._arenas)]
        while not self._free:
            self._wait_a_while()
        return self._free.pop()

    def _drain(self) -> None:
        while self.busy:
            self._wait_a_while()

    def _wait_a_while(self) -> None:
        """Until a save ends, or a second: signals are heard only between waits."""
        saves = [future for future, _ in self._writes if not future.done()]
        wait(saves, timeout=1.0, return_when=FIRST_COMPLETED)

    def _follow(self, checkpoint: Checkpoint) -> None:
        """What comes after a commit; what fails of it is done after the next."""
        try:
            self._after_commit(checkpoint)
            self._left_over = False
        except StoreUnavailableError as error:
            # Once is the beginning of an outage, of which the next save tells.
            level = logging.WARNING if self._left_over else logging.INFO
            what = "step %d is saved, and not all that follows: %s"
            logger.log(level, what, checkpoint.step, error)
            self._left_over = True
        except FencedError:
            return  # the next save says so, on all ranks together

    def _failing(self, step: int, reason: str) -> None:
        """Tell the operator once; what follows until a save succeeds is the same outage."""
        level = logging.DEBUG if self._outage else logging.WARNING
        logger.log(level, "the save of step %d failed, and training goes on: %s", step, reason)
        self._outage = True

    def _recovered(self, step: int) -> None:
        if self._outage:
            logger.warning("saves succeed again, with step %d", step)
        self._outage = False

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def save(
    store: Store,
    incarnation: Incarnation | None,
    group: Group,
    state: TrainingState,
    *,
    step: int,
    parent: int | None = None,
    healthy: bool = True,
    validation_loss: float | None = None,
    announce: Callable[[str], None] = lambda phase: None,
) -> Checkpoint | None:
    """Save and wait; the checkpoint on rank 0, None elsewhere or, with a warning, when it failed.

    Raises FencedError on every rank when a later incarnation owns the run.
    """
    with Saver(store, incarnation, group, parent=parent, announce=announce) as saver:
        saver.begin(state, step=step, healthy=healthy, validation_loss=validation_loss)
        saver.finish()
        return saver.newest
