"""A day of several jobs side by side, in seconds: threads, of which one goes on at a time.

A job sleeps by `Day.sleep` and reads the time by `Day.clock`; which job wakes next follows from
their sleeps alone, so that a day is the same every time.
"""

import heapq
import threading
from collections.abc import Callable, Sequence


class Over(BaseException):
    """The day is over."""


class Day:
    """`seconds` of simulated time."""

    def __init__(self, seconds: float) -> None:
        self._end = seconds
        self._now = 0.0
        self._number = 0
        self._sleepers: list[tuple[float, int, threading.Event]] = []
        self._idle = threading.Semaphore(0)
        self._failed: list[BaseException] = []

    def clock(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        woken = threading.Event()
        self._number += 1
        heapq.heappush(self._sleepers, (self._now + seconds, self._number, woken))
        self._idle.release()
        woken.wait()
        if self._now >= self._end:
            raise Over

    def run(self, jobs: Sequence[Callable[[], object]]) -> None:
        """All jobs, from midnight until the end of the day; their errors are raised."""
        threads = [threading.Thread(target=self._job, args=(job,), daemon=True) for job in jobs]
        for thread in threads:
            thread.start()
            self._idle.acquire()
        while self._sleepers:
            self._now, _, woken = heapq.heappop(self._sleepers)
            woken.set()
            self._idle.acquire()
        for thread in threads:
            thread.join()
        if self._failed:
            raise self._failed[0]

    def _job(self, job: Callable[[], object]) -> None:
        try:
            job()
        except Over:
            pass
        except BaseException as error:
            self._failed.append(error)
        self._idle.release()
