"""Work that hangs holds up nobody: its result, its error, or neither in time."""

import threading
from collections.abc import Iterator

import pytest

from launch.beside import beside


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    over = threading.Event()
    yield over
    over.set()


def test_the_result_of_the_work_is_returned() -> None:
    assert beside(lambda: threading.current_thread().name, lambda: False) == "beside"
    assert beside(lambda: None, lambda: False, 60.0) is None


def test_the_error_of_the_work_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        beside(lambda: 1 // 0, lambda: False)


def test_what_hangs_is_left_behind_at_a_notice(hanging: threading.Event) -> None:
    with pytest.raises(TimeoutError, match="it does not answer"):
        beside(hanging.wait, iter([False, False, True]).__next__)


def test_what_hangs_is_left_behind_after_a_time(hanging: threading.Event) -> None:
    with pytest.raises(TimeoutError):
        beside(hanging.wait, lambda: False, 0.1)
