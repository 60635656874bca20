"""What wakes the supervisor. Signals are real, sent by this process to itself."""

import os
import signal
import threading

import pytest

from launch.wake import Wake


class Seconds:
    """A clock that is set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_a_notice_and_a_second_one_insists(number: signal.Signals) -> None:
    with Wake() as wake:
        assert not wake.noticed
        signal.raise_signal(number)
        wake.wait(3600.0)
        assert wake.noticed and not wake.insisted
        assert wake.told[0].source == number.name
        signal.raise_signal(signal.SIGTERM)
        assert wake.insisted


def test_a_metadata_notice_and_a_signal_are_one_notice_that_becomes_more_urgent() -> None:
    clock = Seconds()
    with Wake(clock) as wake:
        assert wake.deadline(12.0) == float("inf")
        wake.tell("the cloud", 110.0)
        assert wake.deadline(12.0) == 210.0
        clock.now = 130.0
        signal.raise_signal(signal.SIGTERM)
        assert wake.deadline(12.0) == 142.0
        assert not wake.insisted


@pytest.mark.parametrize("seconds", [0.0, 3.0])
def test_a_notice_that_gives_less_than_the_grace_does_not_shorten_it(seconds: float) -> None:
    with Wake(Seconds()) as wake:
        wake.tell("the cloud", seconds)
        assert wake.deadline(12.0) == 112.0


def test_a_notice_from_another_thread_wakes() -> None:
    with Wake() as wake:
        thread = threading.Thread(target=wake.tell, args=("a file",))
        thread.start()
        assert not wake.wait_out(3600.0)
        thread.join()
        assert wake.noticed


def test_a_wait_ends_early_for_what_can_be_read_and_for_a_child_that_ends() -> None:
    reader, writer = os.pipe()
    with Wake() as wake:
        os.write(writer, b"x")
        wake.wait(3600.0, reader)
        child = os.posix_spawn("/bin/true", ["true"], {})
        wake.wait(3600.0)
        os.waitpid(child, 0)
        assert not wake.noticed
    os.close(reader)
    os.close(writer)


def test_a_child_that_ends_does_not_shorten_a_wait_between_starts() -> None:
    clock = Seconds()

    class Ticking(Wake):
        waits = 0

        def wait(self, seconds: float, *fds: int) -> None:
            self.waits += 1
            clock.now += min(seconds, 4.0)  # woken by a child each time

    with Ticking(clock) as wake:
        assert wake.wait_out(10.0)
        assert wake.waits == 3


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGCHLD)]
    with Wake():
        pass
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGCHLD)] == before
