"""How far work on data is: a bar with ETA and tokens/s on a terminal, else a line now and then."""

import logging
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


class PreparationProgress:
    """A context manager whose `advance` is what `prepare` calls after each unit."""

    def __init__(
        self,
        total_bytes: int,
        *,
        console: Console,
        title: str = "preparing",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_bytes = total_bytes
        self._title = title
        self._clock = clock
        self._started = self._last_line = clock()
        self._bytes = self._work_bytes = self._tokens = 0
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn(title),
                BarColumn(),
                DownloadColumn(),
                TextColumn("{task.fields[rate]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("", total=total_bytes, rate="")

    def __enter__(self) -> "PreparationProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, size_bytes: int, tokens: int, is_new: bool) -> None:
        """One more batch: its bytes of text, its tokens, and whether this start did it."""
        self._bytes += size_bytes
        self._tokens += tokens if is_new else 0
        self._work_bytes += size_bytes if is_new else 0
        rate = f"{self._tokens / max(1e-9, self._clock() - self._started):,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._bytes, rate=rate)
        elif self._clock() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = self._clock()
            logger.info(
                "%s: %.1f of %.1f MB, %s, ETA %.0f s",
                self._title,
                self._bytes / 1e6,
                self._total_bytes / 1e6,
                rate,
                self._seconds_left(),
            )

    def _seconds_left(self) -> float:
        seconds = self._clock() - self._started
        return seconds * (self._total_bytes - self._bytes) / max(1, self._work_bytes)
