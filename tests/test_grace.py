"""What fits between a notice and the deadline, by clocks that the tests hold."""

import logging
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from data_service.batches import Batches
from launch.grace import RESERVE_SECONDS, Grace, deadlines
from launch.phase import Phase
from launch.reporting import deadline_file
from storage.errors import StopRequestedError, StoreUnavailableError
from tests.made_sources import made_source, plan_of
from tests.test_loop import Recorder, made_training
from trainer.step import BatchConfig, TrainStep

WALL = 1.7e9
"""The wall's clock when the monotonic one is 0."""


class Clock:
    """Both clocks, which only the test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.ahead = WALL

    def __call__(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.ahead + self.now


class Asked:
    """A notice that the test gives."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.asked_at: float | None = None
        self.heard: Callable[[], None] = lambda: None

    def requested(self) -> bool:
        return self.asked_at is not None

    def give(self) -> None:
        self.asked_at = self._clock.now
        self.heard()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def notice(clock: Clock) -> Asked:
    return Asked(clock)


@pytest.fixture
def make(clock: Clock, notice: Asked) -> Callable[..., Grace]:
    def made(**options: Any) -> Grace:
        phase = options.pop("phase", Phase())
        seconds = options.pop("seconds", 12.0)
        fixed: Any = {"clock": clock, "wall_clock": clock.wall}
        return Grace(notice, phase, seconds=seconds, **fixed, **options)  # type: ignore[arg-type]

    return made


def measured(grace: Grace, clock: Clock, *seconds: float) -> None:
    """Steps that took so long."""
    for one in seconds:
        grace.gives_up(0, 4)
        clock.now += one
        grace.step_is_over()


def test_without_a_notice_nothing_ends(make: Callable[..., Grace], clock: Clock) -> None:
    grace = make()
    grace.save_seconds = lambda: 1e9
    measured(grace, clock, 1e9)
    assert not grace.gives_up(1, 2) and not grace.no_time()
    assert grace.left() == math.inf
    assert grace.beat() == {}
    grace.check()
    grace.settle()
    assert grace.beat() == {}


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (None, 12.0),
        (f"{WALL + 100.0 + 25.5}", 25.5),
        (f"{WALL + 100.0 + 25.5}\n", 25.5),
        (f"{WALL + 100.0 - 3.0}", 12.0),
        (f"{WALL + 100.0 + 7 * 86400}", 12.0),
        ("soon", 12.0),
        ("nan", 12.0),
        ("", 12.0),
    ],
    ids=[
        "none",
        "a file",
        "with a line end",
        "an old one",
        "a wrong clock",
        "words",
        "nan",
        "torn",
    ],
)
def test_the_deadline_is_what_the_supervisor_wrote_or_the_grace(
    written: str | None,
    seconds: float,
    make: Callable[..., Grace],
    notice: Asked,
    tmp_path: Path,
) -> None:
    place = tmp_path / "socket.deadline"
    if written is not None:
        place.write_text(written)
    grace = make(deadline_file=place)
    notice.give()
    assert grace.left() == pytest.approx(seconds - RESERVE_SECONDS, abs=1e-5)  # doubles near 1.7e9


def test_a_clock_that_is_set_moves_no_deadline(
    make: Callable[..., Grace], notice: Asked, clock: Clock, tmp_path: Path
) -> None:
    place = tmp_path / "socket.deadline"
    place.write_text(str(clock.wall() + 30))
    grace = make(deadline_file=place)
    notice.give()
    before = grace.left()
    clock.ahead += 3600.0
    assert grace.left() == before


def test_a_deadline_that_comes_nearer_is_heeded(
    make: Callable[..., Grace], notice: Asked, clock: Clock, tmp_path: Path
) -> None:
    place = tmp_path / "socket.deadline"
    place.write_text(str(clock.wall() + 115))  # a cloud's
    grace = make(deadline_file=place)
    notice.give()
    assert grace.left() == pytest.approx(115 - RESERVE_SECONDS, abs=1e-5)
    place.write_text(str(clock.wall() + 12))  # then a signal
    assert grace.left() == pytest.approx(12 - RESERVE_SECONDS, abs=1e-5)
    place.unlink()
    assert grace.left() == pytest.approx(12 - RESERVE_SECONDS, abs=1e-5)


def test_the_deadline_file_lies_beside_the_supervisors_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANGEFLOW_SUPERVISOR", raising=False)
    assert deadline_file() is None
    monkeypatch.setenv("RANGEFLOW_SUPERVISOR", "/run/a/socket")
    assert deadline_file() == Path("/run/a/socket.deadline")


def test_before_anything_was_measured_it_is_tried(
    make: Callable[..., Grace], notice: Asked, clock: Clock
) -> None:
    grace = make()
    assert not grace.gives_up(0, 4)
    notice.give()
    assert not grace.gives_up(0, 4)
    assert not grace.no_time()


@pytest.mark.parametrize(
    ("step", "save", "waited", "done", "gives_up"),
    [
        (8.0, 2.0, 0.0, 0, False),  # 8 + 2 of 11
        (10.0, 2.0, 0.0, 0, True),
        (10.0, 2.0, 0.0, 1, False),  # 7.5 + 2
        (10.0, 0.0, 0.0, 0, False),  # no save was measured
        (12.0, 0.0, 0.0, 0, True),
        (10.0, 2.0, 8.0, 3, True),  # 2.5 + 2 of 3 that are left
        (4.0, 8.0, 0.0, 3, False),  # 1 + 8
        (4.0, 8.0, 2.5, 3, True),
    ],
)
def test_a_step_is_given_up_when_its_rest_and_the_save_do_not_fit(
    step: float,
    save: float,
    waited: float,
    done: int,
    gives_up: bool,
    make: Callable[..., Grace],
    notice: Asked,
    clock: Clock,
) -> None:
    grace = make()
    grace.save_seconds = lambda: save
    measured(grace, clock, step / 9, step, step * 9)
    grace.gives_up(0, 4)
    notice.give()
    clock.now += waited
    grace._step_began = clock.now - step * done / 4  # as fast as the others
    assert grace.gives_up(done, 4) is gives_up


def test_a_step_that_is_slower_than_the_others_is_judged_by_itself(
    make: Callable[..., Grace], notice: Asked, clock: Clock
) -> None:
    grace = make()
    measured(grace, clock, 1.0, 1.0, 1.0)
    grace.gives_up(0, 4)
    clock.now += 9.0  # for the first of four micro-batches
    notice.give()
    assert grace.gives_up(1, 4)


def test_there_is_no_time_for_a_save_that_takes_longer(
    make: Callable[..., Grace], notice: Asked, clock: Clock
) -> None:
    grace = make()
    grace.save_seconds = lambda: 4.0
    notice.give()
    clock.now += 7.0
    assert not grace.no_time()
    clock.now += 0.5
    assert grace.no_time()


@pytest.mark.parametrize(
    ("saved", "waited", "met"), [(7, 5.0, True), (6, 5.0, False), (7, 12.5, False)]
)
def test_a_deadline_is_met_when_all_finished_steps_are_saved_before_it(
    saved: int,
    waited: float,
    met: bool,
    make: Callable[..., Grace],
    notice: Asked,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "launch.grace")
    phase = Phase()
    phase.step = 7
    grace = make(phase=phase)
    grace.saved_step = lambda: saved
    clock.now += 3.0
    notice.give()
    clock.now += waited
    said = {
        "asked": WALL + 103.0,
        "deadline_seconds": 12.0,
        "left_seconds": 12.0 - waited,
        "met": None,
        "saved_step": saved,
    }
    assert grace.beat() == {"notice": said}
    grace.settle()
    clock.now += 1.0
    grace.settle()
    assert grace.beat() == {"notice": {**said, "met": met}}
    [line] = [record.getMessage() for record in caplog.records]
    word = "met" if met else "missed"
    assert line == (
        f"notice: the deadline of 12.0 s is {word} with {12.0 - waited:.1f} s left; step {saved} "
        "is saved, step 7 was reached"
    )


def test_deadlines_are_counted_from_the_last_beats() -> None:
    beats = [
        {"notice": {"met": True}},
        {"notice": {"met": False}},
        {"notice": {"met": None}},  # stopped before it could say so
        {},
        {"notice": "garbled"},
        {"notice": {"met": True}},
    ]
    assert deadlines(beats) == (2, 2)


class Ended:
    """What ends a process, which tells that it was called."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.happened = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.happened.set()


def test_at_the_deadline_the_process_ends_though_the_last_beat_hangs(
    make: Callable[..., Grace], notice: Asked, clock: Clock
) -> None:
    ended, release, asked = Ended(), threading.Event(), threading.Event()

    def hang() -> None:
        asked.set()
        release.wait(60)

    grace = make(end=ended)
    grace.leave = hang
    grace.saved_step = lambda: -1
    with grace:
        clock.now += 5.0
        notice.asked_at = clock.now - 12.0
        notice.heard()
        assert ended.happened.wait(60)
    release.set()
    assert ended.codes == [75]
    assert asked.is_set()
    assert grace.beat()["notice"]["met"] is False


def test_the_last_beat_is_written_before_the_process_ends(
    make: Callable[..., Grace], notice: Asked, clock: Clock
) -> None:
    order: list[object] = []
    ended = threading.Event()

    def end(code: int) -> None:
        order.append(code)
        ended.set()

    grace = make(end=end)
    grace.leave = lambda: order.append(grace.beat()["notice"]["met"])
    with grace:
        notice.asked_at = clock.now - 12.0 + RESERVE_SECONDS
        notice.heard()
        assert ended.wait(60)
    assert order == [True, 75]


def test_a_process_that_leaves_in_time_is_not_ended(
    make: Callable[..., Grace], notice: Asked
) -> None:
    ended = Ended()
    with make(end=ended):
        notice.give()
    assert ended.codes == []


def test_a_notice_while_nobody_depends_on_the_process_ends_it_at_once(
    make: Callable[..., Grace], notice: Asked
) -> None:
    ended = Ended()
    with make(end=ended) as grace, grace.at_once():
        notice.give()
        assert ended.happened.wait(60)
    assert ended.codes == [75]


def test_a_notice_that_came_before_is_heard_as_well(
    make: Callable[..., Grace], notice: Asked, clock: Clock
) -> None:
    ended = Ended()
    notice.asked_at = clock.now - 100.0
    with make(end=ended) as grace:
        assert ended.happened.wait(60)
        with pytest.raises(StopRequestedError, match="asked to stop in phase 'start', with noth"):
            grace.check()
        with pytest.raises(StopRequestedError), grace.at_once():
            raise AssertionError("entered after a notice")


# In the loop: a step of four micro-batches, each of which takes five seconds; a save takes three.


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    source = made_source(tmp_path_factory.mktemp("sources"), "code")
    options: Any = {"seed": 5, "context": 8, "global_batch_size": 4}
    return Batches(plan=plan_of([source]), sources={"code": source}, **options)


class Slow(Recorder):
    """The loop with a clock that its phases move, and a notice at one of them."""

    def __init__(
        self,
        batches: Batches,
        clock: Clock,
        notice: Asked,
        *,
        at: tuple[str, int, int],
        save_seconds: float = 3.0,
        seconds: float = 12.0,
        **options: Any,
    ) -> None:
        """`at` is (phase, finished steps, which of that name in the step)."""
        self.clock, self.notice = clock, notice
        self._at, self._entered = at, 0
        small = BatchConfig(global_batch_size=4, micro_batch_size=1, virtual_ranks=2)
        training = made_training(batches, small)
        super().__init__(training, batches, announce=self._hear_notice, save=self._slow, **options)
        training.forward = self._forward
        self.grace = self._grace = Grace(
            notice,  # type: ignore[arg-type]
            self.phase,
            seconds=seconds,
            clock=clock,
            wall_clock=clock.wall,
        )
        self.save_seconds = save_seconds
        self.grace.save_seconds = lambda: save_seconds
        self.grace.saved_step = lambda: max([0, *(s for s, _, _ in self.saves)])

    def _hear_notice(self, phase: str, step: int) -> None:
        name, at_step, nth = self._at
        if (phase, step) == (name, at_step):
            self._entered += 1
            if self._entered == nth:
                self.notice.give()

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.clock.now += 5.0
        logits: torch.Tensor = self.training.model(tokens)
        return logits

    def _slow(self, step: int) -> bool:
        self.clock.now += self.save_seconds
        return True

    def told(self) -> dict[str, Any]:
        self.grace.settle()
        said: dict[str, Any] = self.grace.beat()["notice"]
        return said


def test_a_step_longer_than_the_grace_is_given_up_and_the_last_boundary_saved(
    batches: Batches, clock: Clock, notice: Asked
) -> None:
    slow = Slow(batches, clock, notice, at=("micro_batch", 3, 2))
    assert not slow.loop(9).run(0, 0)
    assert slow.saves == [(3, None, True)]
    assert slow.events[-2:] == [(3, "reduce"), (3, "save")], "no update"
    said = slow.told()
    assert (said["met"], said["saved_step"]) == (True, 3)
    assert said["left_seconds"] >= 0


def test_without_giving_up_the_deadline_is_missed(
    batches: Batches, clock: Clock, notice: Asked
) -> None:
    slow = Slow(batches, clock, notice, at=("micro_batch", 3, 2))
    with patch.object(Grace, "gives_up", lambda grace, done, of: False):
        slow.loop(9).run(0, 0)
    assert not slow.told()["met"]


def test_a_step_that_still_fits_is_finished_and_saved(
    batches: Batches, clock: Clock, notice: Asked
) -> None:
    slow = Slow(batches, clock, notice, at=("micro_batch", 3, 4))
    assert not slow.loop(9).run(0, 0)
    assert slow.saves == [(4, None, True)]
    assert slow.told()["met"]


def test_a_save_slower_than_the_grace_is_not_begun_and_counts_as_missed(
    batches: Batches, clock: Clock, notice: Asked
) -> None:
    slow = Slow(batches, clock, notice, at=("micro_batch", 3, 2), save_seconds=60.0)
    assert not slow.loop(9).run(0, 0)
    assert slow.saves == []
    assert slow.steps_of("finish_saves") == [3], "what is in flight is waited for"
    said = slow.told()
    assert (said["met"], said["saved_step"]) == (False, 0)
    assert said["left_seconds"] > 0, "it left in time"


def test_a_boundary_that_is_being_saved_is_not_saved_twice(
    batches: Batches, clock: Clock, notice: Asked
) -> None:
    slow = Slow(batches, clock, notice, at=("micro_batch", 3, 2))
    assert not slow.loop(9, save_interval_steps=3).run(0, 0)
    assert [step for step, _, _ in slow.saves] == [3]
    assert slow.steps_of("finish_saves") == [3]
    assert slow.told()["met"]


def test_a_start_that_is_stopped_in_its_first_step_saves_nothing_again(
    batches: Batches, clock: Clock, notice: Asked
) -> None:
    slow = Slow(batches, clock, notice, at=("micro_batch", 0, 2), seconds=4.0)
    slow.grace._steps.append(20.0)
    assert not slow.loop(9).run(0, 0)
    assert slow.saves == []
    assert slow.told()["met"], "step 0 needs no save"


def test_a_save_that_fails_after_a_step_was_given_up_is_an_error(
    batches: Batches, clock: Clock, notice: Asked
) -> None:
    slow = Slow(batches, clock, notice, at=("micro_batch", 3, 2))
    slow._save = lambda step: False
    with pytest.raises(StoreUnavailableError, match=r"^step 3 could not be saved"):
        slow.loop(9).run(0, 0)


def test_a_wait_for_data_that_ends_with_a_notice_gives_the_step_up(
    batches: Batches, clock: Clock, notice: Asked
) -> None:
    def rows(step: int) -> Any:
        if step == 3:
            notice.give()
            raise StopRequestedError("while waiting for data")
        return SimpleNamespace(tokens=batches.batch(step), learn=None)

    slow = Slow(batches, clock, notice, at=("", 0, 1), rows=rows)
    assert not slow.loop(9).run(0, 0)
    assert slow.steps_of("micro_batch").count(3) == 0
    assert slow.saves == [(3, None, True)]
    assert slow.told()["met"]


@pytest.mark.parametrize("phase", ["evaluate", "sample"])
def test_evaluation_and_samples_are_given_up_and_said_by_the_next_start(
    phase: str, batches: Batches, clock: Clock, notice: Asked
) -> None:
    config = {"eval_interval_steps": 2, "sample_interval_steps": 4}
    whole = Slow(batches, Clock(), Asked(Clock()), at=("", 0, 1))
    assert whole.loop(6, **config).run(0, 0)
    slow = Slow(batches, clock, notice, at=(phase, 4, 1))
    assert not slow.loop(6, **config).run(0, 0)
    assert [step for step, _, _ in slow.saves] == [4]
    [unsaid] = slow.unsaid
    assert unsaid is not None and unsaid["step"] == 4
    assert ("validation_loss" in unsaid) == (phase == "sample")
    assert [row["step"] for row in slow.rows] == [1, 2, 3]
    then = Recorder(slow.training, batches)
    assert then.loop(6, **config).run(4, 4, unsaid)
    assert then.unsaid == [None]
    for row in (rows := [*slow.rows, *then.rows]) + whole.rows:
        del row["tokens_per_second"]
    assert rows == whole.rows
    assert then.saves == whole.saves


def test_what_was_not_said_is_saved_again_once_it_is_where_a_save_is_due(
    batches: Batches, clock: Clock, notice: Asked
) -> None:
    """So that the log knows the validation loss of the step, as it would have."""
    config = {"eval_interval_steps": 2, "save_interval_steps": 4}
    slow = Slow(batches, clock, notice, at=("evaluate", 4, 1))
    assert not slow.loop(5, **config).run(0, 0)
    assert [(step, loss) for step, loss, _ in slow.saves] == [(4, None)]
    then = Recorder(slow.training, batches)
    assert then.loop(5, **config).run(4, 4, slow.unsaid[0])
    assert [step for step, _, _ in then.saves] == [4, 5]
    assert then.saves[0][1] == then.rows[0]["validation_loss"]


def test_the_last_step_says_everything_in_spite_of_a_notice(
    batches: Batches, clock: Clock, notice: Asked
) -> None:
    slow = Slow(batches, clock, notice, at=("evaluate", 2, 1))
    assert slow.loop(2, eval_interval_steps=2).run(0, 0)
    assert "validation_loss" in slow.rows[-1]
    assert slow.unsaid == [None]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


def bits(training: TrainStep) -> list[torch.Tensor]:
    return [p.detach().clone() for p in training.model.parameters()]


def test_a_run_whose_steps_were_given_up_ends_with_the_same_bits(
    batches: Batches, clock: Clock, notice: Asked
) -> None:
    whole = Slow(batches, Clock(), Asked(Clock()), at=("", 0, 1))
    assert whole.loop(6).run(0, 0)
    slow = Slow(batches, clock, notice, at=("micro_batch", 3, 3))
    assert not slow.loop(6).run(0, 0)
    assert slow.saves[-1][0] == 3
    then = Recorder(slow.training, batches)
    assert then.loop(6).run(3, 3)
    assert all(map(torch.equal, bits(slow.training), bits(whole.training)))
