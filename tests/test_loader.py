"""The loader: the same rows, ahead of time; errors and time-outs reach the caller."""

import threading
from pathlib import Path

import numpy as np
import pytest

from data_service.batches import Batches, Rows
from data_service.loader import Loader
from storage.errors import DataError, StoreUnavailableError
from tests.made_sources import made_source, plan_of


@pytest.fixture
def batches(tmp_path: Path) -> Batches:
    source = made_source(tmp_path, "web", train=(900, 700))
    return Batches(
        plan=plan_of([source]), sources={"web": source}, seed=1, context=8, global_batch_size=8
    )


class Slow:
    """Batches that wait for a gate before each read, and can fail at a step."""

    def __init__(self, batches: Batches, *, fail_at: int = -1, together: int = 1) -> None:
        self._batches = batches
        self._together = together
        self.plan = batches.plan
        self.gate = threading.Event()
        self.fail_at = fail_at
        self.read: list[int] = []

    def learn(self, step: int, lo: int, hi: int) -> None:
        return None

    def steps_together(self, step: int, sequences: int) -> int:
        return step + self._together

    def rows_of_steps(self, first: int, end: int, lo: int, hi: int) -> Rows:
        self.gate.wait(30)
        if first <= self.fail_at < end:
            raise DataError(f"step {self.fail_at} is broken")
        self.read += range(first, end)
        return self._batches.rows_of_steps(first, end, lo, hi)


@pytest.mark.parametrize("depth", [1, 4])
def test_rows_come_in_the_order_of_steps_and_ranges(batches: Batches, depth: int) -> None:
    with Loader(batches, [(6, 8), (0, 3)], start_step=5, depth=depth) as loader:
        for step in range(5, 25):
            expected = batches.batch(step)[[6, 7, 0, 1, 2]]
            rows = loader.next(step)
            assert np.array_equal(rows.tokens, expected)
            assert rows.learn is None


def test_each_step_is_told_before_it_is_read(batches: Batches) -> None:
    slow, told = Slow(batches), list[tuple[int, int]]()
    slow.gate.set()

    def before(step: int) -> None:
        told.append((step, len(slow.read)))

    with Loader(slow, [(0, 8)], start_step=5, before_step=before) as loader:  # type: ignore[arg-type]
        for step in range(5, 9):
            loader.next(step)
    assert told[:4] == [(5, 0), (6, 1), (7, 2), (8, 3)]


def test_the_loss_mask_comes_with_the_rows(tmp_path: Path) -> None:
    source = made_source(tmp_path, "chat", train=(900, 700), masked=True)
    batches = Batches(
        plan=plan_of([source]), sources={"chat": source}, seed=1, context=8, global_batch_size=8
    )
    with Loader(batches, [(6, 8), (0, 3)], start_step=5) as loader:
        rows = loader.next(5)
        assert rows.learn is not None
        assert rows.learn.tolist() == (rows.tokens[:, 1:] % 3 == 0).tolist()


def test_two_threads_of_one_object_get_the_same_rows(batches: Batches) -> None:
    with (
        Loader(batches, [(0, 8)], start_step=0) as one,
        Loader(batches, [(0, 8)], start_step=0) as other,
    ):
        for step in range(60):
            assert np.array_equal(one.next(step).tokens, other.next(step).tokens)


def test_a_step_out_of_order_is_refused(batches: Batches) -> None:
    with (
        Loader(batches, [(0, 8)], start_step=3) as loader,
        pytest.raises(ValueError, match="at step 3, not 4"),
    ):
        loader.next(4)


@pytest.mark.parametrize("together", [1, 4])
def test_an_error_of_the_thread_is_raised_at_its_step_and_again(
    together: int, batches: Batches
) -> None:
    slow = Slow(batches, fail_at=2, together=together)
    slow.gate.set()
    with Loader(slow, [(0, 8)], start_step=0) as loader:  # type: ignore[arg-type]
        loader.next(0)
        loader.next(1)
        for _ in range(2):
            with pytest.raises(DataError, match="step 2 is broken"):
                loader.next(2)


def test_an_error_before_the_first_read_reaches_the_caller(batches: Batches) -> None:
    with (
        Loader(batches, [(0, 8)], start_step=-1, timeout_seconds=30) as loader,
        pytest.raises(IndexError, match="there is no step -1"),
    ):
        loader.next(-1)


def test_a_wait_ends_with_the_step_and_the_sources(batches: Batches) -> None:
    slow = Slow(batches)
    with Loader(slow, [(0, 8)], start_step=4, timeout_seconds=0.1) as loader:  # type: ignore[arg-type]
        with pytest.raises(
            StoreUnavailableError, match=r"data of step 4 did not come within 0\.1 s.*\(web\)"
        ):
            loader.next(4)
        slow.gate.set()


class NoticedError(Exception):
    """What a preemption notice raises in a wait."""


def test_a_notice_ends_a_wait(batches: Batches) -> None:
    slow = Slow(batches)

    def notice() -> None:
        raise NoticedError

    with Loader(slow, [(0, 8)], start_step=0, while_waiting=notice) as loader:  # type: ignore[arg-type]
        with pytest.raises(NoticedError):
            loader.next(0)
        slow.gate.set()
        slow_rows = loader._wait()
        assert not isinstance(slow_rows, BaseException)


def test_no_more_than_the_depth_is_fetched_ahead_and_closing_ends_the_thread(
    batches: Batches,
) -> None:
    slow = Slow(batches)
    loader = Loader(slow, [(0, 8)], start_step=0, depth=2)  # type: ignore[arg-type]
    slow.gate.set()
    loader.next(0)
    loader.close()
    loader.close()
    assert not loader._thread.is_alive()
    assert len(slow.read) <= 1 + 2 + 1  # taken, ready, in hand
    with pytest.raises(ValueError, match="the loader is closed"):
        loader.next(1)
