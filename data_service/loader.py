"""Rows fetched ahead of the training loop by one background thread.

Covers: rows in step order, ready before they are asked for; an error of the thread raised at the
next call; every wait ends.
Does not cover: a plan edited for a step that is already fetched. Close the loader and open another.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import numpy as np

from data_service.batches import Batches, Rows
from storage.errors import StoreUnavailableError

TIMEOUT_SECONDS = 600.0
_CLOSE_SECONDS = 5.0  # a hung read must not keep a preempted process
_LOOK_SECONDS = 0.2  # how often a wait looks whether it should end


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
    ) -> None:
        """`ranges` are the [lo, hi) of the global batch that this rank needs, in its own order.

        At most `depth` steps are ready at a time. `while_waiting` is called five times a second
        during a wait; what it raises ends the wait.
        """
        self._batches = batches
        self._ranges = tuple(ranges)
        self._timeout_seconds = timeout_seconds
        self._while_waiting = while_waiting
        self._step = start_step
        self._error: BaseException | None = None
        self._ready: queue.Queue[tuple[int, Rows] | BaseException] = queue.Queue(max(1, depth))
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

    def next(self, step: int) -> Rows:
        """(rows, T+1) int64: the ranges of `step`, one after the other.

        Steps are asked for in order. Raises the error that stopped the thread, or
        StoreUnavailableError when nothing came within the time-out.
        """
        if step != self._step:
            raise ValueError(f"the loader is at step {self._step}, not {step}: steps come in order")
        if self._error is not None:
            raise self._error
        found = self._wait()
        if isinstance(found, BaseException):
            self._error = found
            raise found
        self._step += 1
        return found[1]

    def close(self) -> None:
        """Stop the thread, waiting up to 5 s for the read it is in; closing twice is fine."""
        self._stop.set()
        self._thread.join(min(self._timeout_seconds, _CLOSE_SECONDS))
        self._error = self._error or ValueError("the loader is closed")

    def _wait(self) -> tuple[int, Rows] | BaseException:
        deadline = time.monotonic() + self._timeout_seconds
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
        while not self._stop.is_set():
            item: tuple[int, Rows] | BaseException
            try:
                parts = [self._batches.rows(step, lo, hi) for lo, hi in self._ranges]
                item = step, np.concatenate(parts)
            except BaseException as error:  # raised again in the caller's thread
                item = error
            self._hand_over(item)
            if isinstance(item, BaseException):
                return
            step += 1

    def _hand_over(self, item: tuple[int, Rows] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=_LOOK_SECONDS)
                return
            except queue.Full:
                continue
