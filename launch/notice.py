"""The notice that this process will be stopped: SIGTERM, SIGINT, or SIGUSR1.

The first one sets a flag, which the training loop reads; a second one ends the process at once.
Installed before torch is imported, so that no notice is missed.
"""

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from launch.exit_codes import START_AGAIN

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Notice:
    """Whether somebody has asked this process to save and leave."""

    def __init__(self) -> None:
        self._requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Notice":
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether a notice has come."""
        return self._requested

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            os._exit(START_AGAIN)
        self._requested = True
