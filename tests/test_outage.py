"""A store that is slow, fails, is full, refuses or hangs: training goes on, and ends the same."""

import errno
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import storage.store
from storage.store import Store, open_store
from tests.faulty_store import Delay, Fault, FaultyStore, Hang, Operation, Refuse, Script
from tests.gcs_server import GcsServer, running
from tests.places import HASTY, opened, reached
from tests.programs import checkpoints, final_digest, rows, train_here
from tests.server_faults import Fault as ServerFault
from tests.server_faults import Faults, Silence, Status
from tests.test_bad_input import fill, small_disk

__all__ = ["small_disk"]

STEPS = 24
BEGIN, END = 6, 14
"""The steps between which the store fails."""

SHAPE = (
    f"--max_steps={STEPS}",
    "--eval_interval_steps=0",
    "--sample_interval_steps=0",
    "--save_interval_steps=2",
    "--keep_last=2",
    "--n_embd=32",
    "--context=32",
    "--global_batch_size=8",
    "--warmup_steps=4",
)
WAIT_SECONDS = 60.0
"""After which a test that hangs has failed."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...]) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train_here("--run", run, *data, *SHAPE) == 0
    return run


class Told(logging.Handler):
    """What the operator is told of saves and curves; `failing` is set by the first failure."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[tuple[int, str]] = []
        self.failing = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.levelno, record.getMessage()))
        if "failed, and training goes on" in record.msg or "the curves wait" in record.msg:
            self.failing.set()

    def warnings(self) -> list[str]:
        return [message for level, message in self.said if level >= logging.WARNING]


@pytest.fixture
def told() -> Iterator[Told]:
    handler = Told()
    loggers = [logging.getLogger(name) for name in ("checkpointing.save", "launch.running")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)


@dataclass
class Outage:
    """A listener that begins an outage at a step, and ends it at another, once it was noticed."""

    begin: Callable[[], object]
    end: Callable[[], object]
    noticed: threading.Event
    steps: list[int] = field(default_factory=list)

    def __call__(self, phase: str, step: int) -> None:
        if phase != "step":
            return
        self.steps.append(step)
        if step == BEGIN:
            self.begin()
        if step == END:
            assert self.noticed.wait(WAIT_SECONDS), "no save failed in all this time"
            self.end()


def assert_told_once(told: Told, reason: str) -> None:
    """One warning that saves fail, one that they succeed again."""
    failed, again = told.warnings()
    assert failed.startswith("the save of step ") and reason in failed
    assert again.startswith("saves succeed again, with step ")


def assert_same(run: Path | str, folder: Path, undisturbed: Path) -> None:
    """As if nothing had happened. `folder` has the curves."""
    assert final_digest(run) == final_digest(undisturbed)
    assert rows(folder) == rows(undisturbed)
    assert checkpoints(run)[-1].step == STEPS


def curves(below: Path) -> Path:
    """The folder of the curves of a run that is not on this machine."""
    (found,) = below.glob("runs/*/metrics.jsonl")
    return found.parent


@contextmanager
def through(script: Script, run: Path) -> Iterator[None]:
    """The training program opens its run's store with faults."""

    def faulty(url: str) -> Store:
        store = open_store(url)
        return FaultyStore(store, script) if url == str(run) else store

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.store, "open_store", faulty)
        patch.chdir(run.parent)  # curves of a store without files go there
        yield


def test_training_goes_on_beside_a_slow_store(
    tmp_path: Path, data: tuple[str, ...], undisturbed: Path, told: Told
) -> None:
    run, arrived = tmp_path / "run", threading.Event()
    waiting = threading.Event()
    steps: list[int] = []

    def transfer() -> None:
        waiting.set()
        assert arrived.wait(WAIT_SECONDS), "training has waited for the store"

    def script(operation: Operation) -> Fault | None:
        slow = operation.name == "put" and operation.key.endswith(".safetensors")
        return Delay(transfer) if slow else None

    def listener(phase: str, step: int) -> None:
        if phase == "step":
            steps.append(step)
            if step == 10:
                assert waiting.is_set() and not checkpoints(run), "nothing is saved yet"
                arrived.set()

    with through(script, run):
        assert train_here("--run", run, *data, *SHAPE, listener=listener) == 0
    assert steps == list(range(STEPS))
    saved = [message for _, message in told.said if "is saved, digest" in message]
    assert saved[0].startswith("step 2 is saved") and "; 1 saves put off so far" in saved[0]
    assert told.warnings() == []
    assert_same(run, curves(tmp_path), undisturbed)


def test_a_store_that_fails_for_long_is_told_once_and_used_again(
    tmp_path: Path, data: tuple[str, ...], undisturbed: Path, told: Told
) -> None:
    run, out = tmp_path / "run", threading.Event()

    def script(operation: Operation) -> Fault | None:
        return Refuse("the network is down") if out.is_set() else None

    outage = Outage(out.set, out.clear, told.failing)
    with through(script, run):
        assert train_here("--run", run, *data, *SHAPE, listener=outage) == 0
    assert outage.steps == list(range(STEPS))
    assert_told_once(told, "the ")
    assert_same(run, curves(tmp_path), undisturbed)


def test_without_an_outage_nobody_is_told_anything(
    tmp_path: Path, data: tuple[str, ...], undisturbed: Path, told: Told
) -> None:
    """The control of the tests beside it."""
    run = tmp_path / "run"
    assert train_here("--run", run, *data, *SHAPE) == 0
    assert told.warnings() == []
    assert_same(run, run, undisturbed)


def test_a_disk_that_is_full_for_a_while_is_told_once_and_used_again(
    small_disk: Path, data: tuple[str, ...], undisturbed: Path, told: Told
) -> None:
    run = small_disk / "run"
    shutil.rmtree(run, ignore_errors=True)
    outage = Outage(
        lambda: fill(small_disk), lambda: (small_disk / "filler").unlink(), told.failing
    )
    assert train_here("--run", run, *data, *SHAPE, listener=outage) == 0
    assert outage.steps == list(range(STEPS))
    assert_told_once(told, "no space left")
    assert_same(run, run, undisturbed)


def test_curves_on_a_full_disk_wait_and_are_told_once(
    tmp_path: Path,
    data: tuple[str, ...],
    undisturbed: Path,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run is elsewhere, and its saves go on; its curves are beside the program."""
    monkeypatch.setattr("checkpointing.beats.BEAT_SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)
    disk = pytest.MonkeyPatch()

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    outage = Outage(lambda: disk.setattr(os, "fsync", no_space), disk.undo, told.failing)
    url = "memory://outage/run"
    try:
        assert train_here("--run", url, *data, *SHAPE, listener=outage) == 0
    finally:
        disk.undo()
    (warning,) = told.warnings()
    assert warning == "the curves wait for a later time: metrics: No space left on device"
    assert_same(url, curves(tmp_path), undisturbed)


class Switched(Faults):
    """Every request goes wrong in one way while `on`."""

    def __init__(self, fault: ServerFault, *operations: str) -> None:
        super().__init__()
        self._fault = fault
        self._operations = operations
        self.on = threading.Event()

    def next(self, operation: str) -> ServerFault | None:
        hit = self.on.is_set() and (not self._operations or operation in self._operations)
        return self._fault if hit else None


def test_a_permission_that_is_revoked_for_a_while_is_told_once(
    tmp_path: Path,
    data: tuple[str, ...],
    undisturbed: Path,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    revoked = Switched(Status(403))
    with running(GcsServer("bucket")) as server, reached("gs", server.url):
        server.faults = revoked
        outage = Outage(revoked.on.set, revoked.on.clear, told.failing)
        assert train_here("--run", "gs://bucket/run", *data, *SHAPE, listener=outage) == 0
        assert outage.steps == list(range(STEPS))
        assert_told_once(told, "")
        assert_same("gs://bucket/run", curves(tmp_path), undisturbed)


def test_a_notice_while_the_store_hangs_for_good_still_ends_the_program(
    tmp_path: Path,
    data: tuple[str, ...],
    undisturbed: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    url, release = "gs://bucket/run", threading.Event()
    hanging = Switched(Silence(release), "write", "begin", "part")

    def listener(phase: str, step: int) -> None:
        if phase == "step" and step == BEGIN:
            hanging.on.set()
        if phase == "step" and step == END:
            os.kill(os.getpid(), signal.SIGTERM)

    with (
        running(GcsServer("bucket")) as server,
        reached("gs", server.url),
        opened(url, HASTY) as store,
    ):
        server.faults = hanging
        with monkeypatch.context() as patch:
            patch.setattr(
                storage.store, "open_store", lambda u: store if u == url else open_store(u)
            )
            patience = "--grace_seconds=600"  # the store's time-outs end it, not the deadline
            assert train_here("--run", url, *data, *SHAPE, patience, listener=listener) == 75
        assert "could not be saved, for the reason in the warning above" in capsys.readouterr().err
        hanging.on.clear()
        release.set()
        assert train_here("--run", url, *data, *SHAPE, "--take_over") == 0
        assert_same(url, curves(tmp_path), undisturbed)


def test_training_goes_on_while_the_heartbeat_hangs(
    tmp_path: Path, data: tuple[str, ...], undisturbed: Path, told: Told
) -> None:
    run, release, hung = tmp_path / "run", threading.Event(), threading.Event()
    steps: list[int] = []

    def script(operation: Operation) -> Fault | None:
        if threading.current_thread().name != "beats":
            return None
        hung.set()
        return Hang(release)

    def listener(phase: str, step: int) -> None:
        if phase == "step":
            steps.append(step)
            if step == STEPS - 1:
                assert hung.is_set() and not release.is_set()
                release.set()

    with through(script, run):
        assert train_here("--run", run, *data, *SHAPE, listener=listener) == 0
    assert steps == list(range(STEPS))
    assert told.warnings() == []
    assert_same(run, curves(tmp_path), undisturbed)
