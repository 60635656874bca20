"""Rows fetched ahead of the training loop by one background thread.

Covers: rows in step order, ready before they are asked for; an error of the thread raised at the
next call; every wait ends.
Does not cover: a plan edited for a step that is already fetched. Close the loader and open another.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple

import numpy as np

from data_service.batches import Batches, Learn, Rows
from storage.errors import StoreUnavailableError

TIMEOUT_SECONDS = 600.0
_CLOSE_SECONDS = 5.0  # a hung read must not keep a preempted process
_LOOK_SECONDS = 0.2  # how often a wait looks whether it should end


class StepRows(NamedTuple):
    """A rank's rows of one step."""

    tokens: Rows
    """(rows, T+1) int64"""
    learn: Learn | None
    """(rows, T) bool: which targets the model is trained to predict; None: all."""


class Loader:
    """The rows of one rank, step after step. Use it with `with`; call it from one thread."""

    def __init__(
        self,
        batches: Batches,
        ranges: Sequence[tuple[int, int]],
        *,
        start_step: int,
        depth: int = 4,
        timeout_seconds: float = TIMEOUT_SECONDS,
        while_waiting: Callable[[], None] = lambda: None,
        before_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        """`ranges` are the [lo, hi) of the global batch that this rank needs, in its own order.

        Steps are read several at once where they are small; at most `depth` such reads are ready at
        a time. `while_waiting` is called five times a second during a wait; what it raises ends the
        wait. `before_step` is told each step before it is read, in the loader's thread.
        """
        self._batches = batches
        self._ranges = tuple(ranges)
        self._timeout_seconds = timeout_seconds
        self._while_waiting = while_waiting
        self._before_step = before_step
        self.waited_seconds = 0.0
        """How long `next` has waited for data, all calls together."""
        self._step = start_step
        self._error: BaseException | None = None
        self._ready: queue.Queue[list[StepRows] | BaseException] = queue.Queue(max(1, depth))
        self._taken: deque[StepRows] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._fetch, args=(start_step,), name="data loader", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def next(self, step: int) -> StepRows:
        """The ranges of `step`, one after the other.

        Steps are asked for in order. Raises the error that stopped the thread, or
        StoreUnavailableError when nothing came within the time-out.
        """
        if step != self._step:
            raise ValueError(f"the loader is at step {self._step}, not {step}: steps come in order")
        if self._error is not None:
            raise self._error
        if not self._taken:
            found = self._wait()
            if isinstance(found, BaseException):
                self._error = found
                raise found
            self._taken.extend(found)
        self._step += 1
        return self._taken.popleft()

    def close(self) -> None:
        """Stop the thread, waiting up to 5 s for the read it is in; closing twice is fine."""
        self._stop.set()
        self._thread.join(min(self._timeout_seconds, _CLOSE_SECONDS))
        self._error = self._error or ValueError("the loader is closed")

    def _wait(self) -> list[StepRows] | BaseException:
        begun = time.monotonic()
        try:
            return self._ready_by(begun + self._timeout_seconds)
        finally:
            self.waited_seconds += time.monotonic() - begun

    def _ready_by(self, deadline: float) -> list[StepRows] | BaseException:
        while True:
            try:
                return self._ready.get(timeout=min(_LOOK_SECONDS, self._timeout_seconds))
            except queue.Empty:
                self._while_waiting()
            if time.monotonic() >= deadline:
                raise StoreUnavailableError(
                    f"the data of step {self._step} did not come within "
                    f"{self._timeout_seconds:g} s; look at the store of the sources "
                    f"({', '.join(self._batches.plan.sources)})"
                )

    def _fetch(self, step: int) -> None:
        sequences = sum(hi - lo for lo, hi in self._ranges)
        alone = False
        while not self._stop.is_set():
            end = step + 1
            try:
                if not alone:
                    end = self._batches.steps_together(step, sequences)
                found = self._read(step, end)
            except BaseException as error:
                if alone or end == step + 1:
                    self._hand_over(error)  # raised again in the caller's thread
                    return
                alone = True  # so that what fails is told at its own step
                continue
            self._hand_over(found)
            step = end

    def _read(self, first: int, end: int) -> list[StepRows]:
        for step in range(first, end):
            self._before_step(step)
        parts = [self._batches.rows_of_steps(first, end, lo, hi) for lo, hi in self._ranges]
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        return [StepRows(tokens[step - first], self._learn(step)) for step in range(first, end)]

    def _learn(self, step: int) -> Learn | None:
        learn = [self._batches.learn(step, lo, hi) for lo, hi in self._ranges]
        masks = [mask for mask in learn if mask is not None]  # of all ranges, or of none
        return np.concatenate(masks) if masks else None

    def _hand_over(self, item: list[StepRows] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=_LOOK_SECONDS)
                return
            except queue.Full:
                continue
