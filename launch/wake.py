"""What wakes the supervisor: signals and notices, all through one pipe that it waits on."""

import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

_NOTICES = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True, slots=True)
class Told:
    """One notice: from whom, when (monotonic), and after how many seconds the machine goes."""

    source: str
    at: float
    seconds: float | None = None


class Wake:
    """Hears notices from its first line on; use it with `with`, on the main thread.

    Child processes that end, and `fds` that can be read, wake it as well.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._signals = 0
        self._before: dict[int, Any] = {}
        self.told: list[Told] = []

    def __enter__(self) -> "Wake":
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (*_NOTICES, signal.SIGCHLD):
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
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._reader)
        os.close(self._writer)

    @property
    def noticed(self) -> bool:
        """Whether there is a notice."""
        return bool(self.told)

    @property
    def insisted(self) -> bool:
        """Whether a second signal came: end at once. A metadata service and a signal are one."""
        return self._signals > 1

    def tell(self, source: str, seconds: float | None = None) -> None:
        """A notice that is no signal; from any thread."""
        self.told.append(Told(source, self._clock(), seconds))
        os.write(self._writer, b"\0")

    def deadline(self, grace_seconds: float) -> float:
        """When everything must have ended, on the monotonic clock; infinite without a notice.

        A notice may give more time than the grace. Less is not heeded: who is killed by the machine
        a little later has lost nothing.
        """
        ends = [t.at + max(grace_seconds, t.seconds or 0.0) for t in self.told]
        return min(ends, default=float("inf"))

    def wait(self, seconds: float, *fds: int) -> None:
        """Return after so long, or as soon as something came."""
        poll = select.poll()
        for fd in (self._reader, *fds):
            poll.register(fd, select.POLLIN)
        poll.poll(max(0.0, seconds) * 1000)
        try:
            while os.read(self._reader, 4096):
                pass
        except BlockingIOError:
            pass

    def wait_out(self, seconds: float) -> bool:
        """Return after so long, however many children end; False at a notice."""
        end = self._clock() + seconds
        while not self.noticed and (left := end - self._clock()) > 0:
            self.wait(left)
        return not self.noticed

    def _received(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            self._signals += 1
            self.told.append(Told(signal.Signals(number).name, self._clock()))
