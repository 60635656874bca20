"""The notice that this process will be stopped: SIGTERM, SIGINT, or SIGUSR1.

The first one sets a flag, which the training loop reads; a second one ends the process at once,
but not a rank of torchrun's, which gets a SIGTERM as soon as another rank has left.

Installed before torch is imported, so that no notice is missed. Python runs a signal's handler only
between two instructions of the main thread; a thread hears it as well, through the pipe into which
the interpreter writes each signal, so that none is missed while the main thread waits for another
process or for a device.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from launch.exit_codes import START_AGAIN

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_END = b"\0"  # no signal has the number 0


class Notice:
    """Whether, and when, somebody has asked this process to save and leave.

    `heard` is called once, on another thread than the main one. `second_ends` when a second signal
    ends the process.
    """

    def __init__(self, *, second_ends: bool = True) -> None:
        self._second_ends = second_ends
        self.asked_at: float | None = None
        """`time.monotonic()` of the first signal."""
        self.heard: Callable[[], None] = lambda: None
        self._before: dict[int, Any] = {}
        self._handled = 0

    def __enter__(self) -> "Notice":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="notice", daemon=True)
        self._thread.start()
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
        signal.set_wakeup_fd(self._fd_before)
        os.write(self._write, _END)
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def requested(self) -> bool:
        """Whether a notice has come."""
        return self.asked_at is not None

    def _received(self, number: int, frame: FrameType | None) -> None:
        self._handled += 1
        self._note(self._handled)

    def _listen(self) -> None:
        """On the thread: count the same signals, which the main thread may be kept from."""
        count = 0
        while True:
            for number in os.read(self._read, 64):
                if number == 0:
                    return
                if number in _SIGNALS:
                    count += 1
                    self._note(count)
                    if count == 1:
                        self.heard()

    def _note(self, count: int) -> None:
        if count > 1 and self._second_ends:
            os._exit(START_AGAIN)
        if self.asked_at is None:
            self.asked_at = time.monotonic()
