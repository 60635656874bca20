"""Waiting for what may hang, such as a store, without being deaf meanwhile."""

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

_LOOK_SECONDS = 0.05


def beside(
    work: Callable[[], Result], given_up: Callable[[], bool], seconds: float | None = None
) -> Result:
    """What `work` returns or raises, on another thread.

    TimeoutError when that takes longer than `seconds`, or is `given_up`: the thread is left behind.
    """
    done: list[Result] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:  # raised again in the caller's thread
            failed.append(error)

    thread = threading.Thread(target=run, name="beside", daemon=True)
    thread.start()
    looks = 0
    while thread.is_alive() and not given_up():
        if seconds is not None and looks * _LOOK_SECONDS >= seconds:
            break
        thread.join(_LOOK_SECONDS)
        looks += 1
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError("it does not answer")
    return done[0]
