"""One trial: a run in a folder of its own, programs that are started on it, and their faults."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Protocol

from checkpointing.history import history
from launch.chaos.marked import Role, described, living, own_number, pending, role_of, state
from launch.chaos.watched import VARIABLE
from launch.exit_codes import COMPLETE
from storage.log import Log
from storage.store import open_store

ROOT = Path(__file__).resolve().parents[2]
WATCHED = ROOT / "launch" / "chaos" / "watched.py"

TIMEOUT_SECONDS = 300.0
"""After which what was waited for counts as never coming."""
LOOK_SECONDS = 0.01
ORPHAN_SECONDS = 10.0
"""How long a process may take to end when its program has."""

STEPS = 30
SHAPE = (
    f"--max_steps={STEPS}",
    "--eval_interval_steps=10",
    "--eval_windows=8",
    "--sample_interval_steps=0",
    "--save_interval_steps=4",
    "--keep_last=2",
    "--log_interval_steps=5",
    "--n_embd=32",
    "--context=32",
    "--global_batch_size=8",
    "--micro_batch_size=1",
    "--virtual_ranks=4",
    "--warmup_steps=5",
    "--dropout=0.1",
)
"""A model that any machine trains in a second or two."""


_OF_A_WORLD = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(PET|TORCHELASTIC|RANGEFLOW)_.*"
)
"""Variables by which a platform or torchrun tells a program who it is."""


class Violation(Exception):
    """What should not have happened, in words."""


class Host(Protocol):
    """Another place than this process's, in which a program may run."""

    def entering(self, *command: str) -> list[str]:
        """The command line that runs a command there."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where rank 0 has stopped itself: after `step` steps. `pid` is as this machine counts."""

    pid: int
    step: int

    def signal(self, *numbers: signal.Signals) -> None:
        """Send signals, for example SIGTERM and then SIGCONT."""
        for number in numbers:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def go_on(self) -> None:
        """Wake it."""
        self.signal(signal.SIGCONT)


class Program:
    """A program that a trial started; what it prints is in `output.txt` of its folder.

    Its processes, and theirs, have the folder in their environment. There a rank also learns where
    to stop (`watched.py`).
    """

    def __init__(
        self, command: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> None:
        self.folder = folder
        with open(folder / "output.txt", "xb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env=_environment(folder, environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def phase(self, name: str, step: int = 0) -> Place:
        """Make rank 0 stop when it next enters a phase, at this step or later; wait for it."""
        self.stop(name, step)
        return self.stopped()

    def stop(self, name: str, step: int = 0) -> None:
        """Ask rank 0 to stop there, without waiting for it."""
        ask_to_stop(self.folder, name, step)

    def hold(self, name: str, step: int = 0) -> None:
        """As `stop`, for the thread of rank 0 alone that comes there; until `release`."""
        ask_to_stop(self.folder, name, step, how="hold")

    def release(self) -> None:
        """Whoever is held goes on."""
        (self.folder / "released").touch()

    def stopped(self) -> Place:
        """Wait until rank 0 has stopped where it was asked to."""
        place = self.stopped_or_ended()
        if place is None:
            raise Violation(f"{self.folder.name} ended before a rank came to where it was to stop")
        return place

    def stopped_or_ended(self) -> Place | None:
        """As `stopped`; None when the program ends instead."""
        while True:
            self.wait_for(
                lambda: self._said() is not None or self.ended,
                "no rank came to where it was to stop",
            )
            said = self._said()
            if said is None:
                return None
            asked = said.read_text()
            said.unlink()
            _, number, step = said.name.split("-")
            pid = self._standing(int(number), asked)
            if pid is not None:
                return Place(pid, int(step))
            _ask(self.folder, asked)

    def _said(self) -> Path | None:
        """The request that a rank has taken."""
        return next(self.folder.glob("stopped-*"), None)

    def _standing(self, number: int, asked: str) -> int | None:
        """The process that calls itself `number`, once it stands; None when it was killed first."""
        found: list[int] = []

        def stands() -> bool:
            found[:] = [pid for pid in self.processes() if own_number(pid) == number]
            return not found or asked.endswith("hold") or state(found[0]) == "T"

        self.wait_for(stands, "a rank said that it would stop, and did not")
        return found[0] if found else None

    def says(self, text: str, times: int = 1) -> None:
        """Wait until this text has been printed so many times."""
        self.wait_for(lambda: self.output().count(text) >= times, f"it never said {text!r}")

    def processes(self, role: Role | None = None) -> list[int]:
        """Those that live, as this machine counts; all, or those that are one thing."""
        found = living(self.folder)
        return found if role is None else [pid for pid in found if role_of(pid) == role]

    def process(self, role: Role) -> int:
        """Wait for a process of this kind."""
        self.wait_for(lambda: bool(self.processes(role)), f"it never had a process as {role}")
        return self.processes(role)[0]

    def notice(self, place: Place, number: signal.Signals = signal.SIGTERM) -> None:
        """Send one to the supervisor; wait until the rank that stands there has been told as well.

        Else it could go on to the end of the run before the supervisor has looked up.
        """
        Place(self.process("supervisor"), 0).signal(number)
        told = signal.SIGUSR1
        self.wait_for(lambda: self.ended or pending(place.pid, told), "its rank was not told")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the program itself."""
        self._process.send_signal(number)

    def end(self, *codes: int, seconds: float = TIMEOUT_SECONDS) -> int:
        """Wait for the end; the exit code, which must be one of `codes` if any are given."""
        try:
            code = self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise Violation(f"{self.folder.name} did not end in {seconds:.0f} s") from None
        if codes and code not in codes:
            expected = " or ".join(map(str, codes))
            raise Violation(f"{self.folder.name} ended with {code}, expected {expected}")
        return code

    @property
    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return self._process.poll() is not None

    def output(self) -> str:
        """What it has printed so far."""
        return (self.folder / "output.txt").read_text(errors="replace")

    def gone(self, role: Role | None = None) -> None:
        """Wait until none of its processes lives, or of these; they may take a few seconds to end.

        Looked at twice: one that begins another program has no environment for an instant.
        """
        end, empty = time.monotonic() + ORPHAN_SECONDS, 0
        while empty < 2:
            left = self.processes(role)
            empty = 0 if left else empty + 1
            if left and time.monotonic() > end:
                raise Violation(f"{self.folder.name} is over, and left behind {described(left)}")
            time.sleep(5 * LOOK_SECONDS)

    def close(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.wait()

    def wait_for(self, happened: Callable[[], bool], otherwise: str) -> None:
        """Wait until something is so; that it is not when the program ends is a violation."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not happened():
            if self.ended and not happened():
                raise Violation(f"{self.folder.name}: {otherwise} before it ended")
            if time.monotonic() > deadline:
                raise Violation(f"{self.folder.name}: {otherwise} in {TIMEOUT_SECONDS:.0f} s")
            time.sleep(LOOK_SECONDS)


class Trial:
    """Use it with `with`: at the end whatever is left of it is killed.

    `data` are the flags of its sources, `training_program` is what its ranks run. `random` follows
    from `name`, so that the same name deals the same faults. `run` may be set to another place
    before anything is started; what the trial needs meanwhile is entered into `stack`.
    """

    def __init__(
        self,
        folder: Path,
        data: Sequence[str],
        *,
        name: str,
        shape: Sequence[str] = SHAPE,
        training_program: Sequence[str] = (str(WATCHED),),
    ) -> None:
        folder.mkdir(parents=True)
        self.folder = folder.resolve()
        self.run = str(self.folder / "run")
        self.stack = ExitStack()
        self._temporary = ""
        self.random = random.Random(name)
        self.programs: list[Program] = []
        self.faults: list[str] = []
        self.may_show_tracebacks = False
        self._data = tuple(data)
        self._shape = tuple(shape)
        self._training_program = tuple(training_program)

    def __enter__(self) -> "Trial":
        made = TemporaryDirectory(prefix="rangeflow-chaos-", ignore_cleanup_errors=True)
        self._temporary = self.stack.enter_context(made)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for program in self.programs:
            program.close()
        while left := living(self.folder):
            for pid in left:
                Place(pid, 0).signal(signal.SIGKILL)
            time.sleep(LOOK_SECONDS)
        self.stack.close()

    @property
    def curves(self) -> Path:
        """The run's metrics.jsonl."""
        return Path(self.run, "metrics.jsonl")

    @property
    def flags(self) -> list[str]:
        """The training program's."""
        return ["--run", self.run, *self._data, *self._shape]

    def alone(self, *flags: str) -> list[str]:
        """The command line of training as one process."""
        return self.python(*self._training_program, *self.flags, *flags)

    def python(self, *words: str) -> list[str]:
        """The command line of a Python program."""
        return [sys.executable, *words]

    def torchrun(self, *arguments: str, flags: Sequence[str] = ()) -> list[str]:
        """torchrun's arguments and, behind them, the training program with its own."""
        return [*arguments, "--", *self._training_program, *self.flags, *flags]

    def supervisor(
        self,
        world: int = 1,
        *,
        own: Sequence[str] = (),
        torchrun: Sequence[str] = ("--standalone",),
        flags: Sequence[str] = (),
    ) -> list[str]:
        """The command line of training under the supervisor, whose own flags are `own`."""
        minded = ["-m", "launch.supervise", "--metadata=none", "--grace_seconds=120", *own, "--"]
        ranks = self.torchrun(*torchrun, f"--nproc_per_node={world}", flags=flags)
        return self.python(*minded, *ranks)

    def start(
        self,
        command: Sequence[str] | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        on: Host | None = None,
        stop: tuple[str, int] | None = None,
        holds: tuple[str, int] | None = None,
    ) -> Program:
        """Start a program, by default a supervisor over one rank.

        Rank 0 stops at `stop`, a phase and a step; at `holds` only the thread that is there.
        """
        folder = self.folder / f"program-{len(self.programs)}"
        folder.mkdir()
        if stop is not None:
            ask_to_stop(folder, *stop)
        if holds is not None:
            ask_to_stop(folder, *holds, how="hold")
        words = self.supervisor() if command is None else list(command)
        words = words if on is None else on.entering(*words)
        self.programs.append(
            Program(words, folder, {"TMPDIR": self._temporary, **(environment or {})})
        )
        return self.programs[-1]

    def complete(self, world: int = 1) -> None:
        """Mind the run to its end."""
        self.start(self.supervisor(world)).end(COMPLETE)

    def expect_saved(self, step: int) -> None:
        """That the next start finds a checkpoint of this step, or of a later one; 0 for none."""
        live = history(Log(open_store(self.run)).refresh()).live
        found = live[-1].step if live else 0
        if found < step:
            raise Violation(f"the newest checkpoint is of step {found}, expected step {step}")

    def fault(self, words: str) -> None:
        """Note what is dealt now."""
        self.faults.append(words)


def _environment(folder: Path, more: Mapping[str, str]) -> dict[str, str]:
    """This process's, with the mark, and without devices and the place in some other world."""
    own = {name: value for name, value in os.environ.items() if not _OF_A_WORLD.fullmatch(name)}
    paths = (more.get("PYTHONPATH"), str(ROOT), own.get("PYTHONPATH"))
    alike = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return {**own, **more, **alike, VARIABLE: str(folder)}


def ask_to_stop(folder: Path, phase: str, step: int = 0, how: str = "stop") -> None:
    """Ask rank 0 of the program in this folder to stop when it enters a phase.

    With "hold" only the thread that enters it does, until it is released.
    """
    _ask(folder, f"{phase} {step} {how}")


def _ask(folder: Path, asked: str) -> None:
    partial = folder / "stop.partial"
    partial.write_text(asked)
    partial.rename(folder / "stop")
