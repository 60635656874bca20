"""What a scenario is, what it needs, and how it is played and judged."""

import os
import random
import shutil
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_service.inputs import MemoryCorpus
from data_service.preparation import prepare
from data_service.tokenizer import make_tokenizer
from launch.chaos.hosts import why_no_hosts
from launch.chaos.small_memory import why_no_small_memory
from launch.chaos.trial import SHAPE, WATCHED, Trial, Violation
from launch.chaos.verdict import judge, reference
from launch.exit_codes import COMPLETE
from storage.store import open_store

Need = Literal["root", "network", "cgroup", "mounts", "processes", "users"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """`act` deals the faults of one trial, and brings its run to the end. `needs` are rights."""

    name: str
    about: str
    act: Callable[[Trial], None]
    needs: frozenset[Need] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One repetition. `violations` is empty unless it failed, `why_skipped` unless it was."""

    scenario: str
    repetition: int
    seed: int
    outcome: Literal["passed", "failed", "skipped"]
    seconds: float = 0.0
    faults: tuple[str, ...] = ()
    violations: tuple[str, ...] = ()
    why_skipped: str = ""
    folder: str = ""


class Ground:
    """Where trials are made: two small sources, and the unbroken run that all are compared with.

    `folder` must exist and be empty.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shape: Sequence[str] = SHAPE,
        training_program: Sequence[str] = (str(WATCHED),),
    ) -> None:
        self.folder = folder
        self._shape = tuple(shape)
        self._training_program = tuple(training_program)
        self._data = make_sources(folder / "sources")
        with Trial(folder / "unbroken", self._data, name="unbroken", shape=shape) as trial:
            trial.start(trial.alone()).end(COMPLETE)
            self.unbroken = reference(trial)

    def trial(self, folder: str, name: str = "") -> Trial:
        """A trial in a folder of its own, to be entered; its faults follow from the name."""
        return Trial(
            self.folder / folder,
            self._data,
            name=name,
            shape=self._shape,
            training_program=self._training_program,
        )

    def play(
        self, scenario: Scenario, repetition: int = 0, seed: int = 0, *, keep: bool = False
    ) -> Result:
        """Play a scenario once. Its folder remains when it fails, or to `keep` it."""
        begun = time.monotonic()
        violations: list[str] = []
        trial = self.trial(f"{scenario.name}-{repetition}", f"{seed}/{scenario.name}/{repetition}")
        folder = self.folder / f"{scenario.name}-{repetition}"
        with trial:
            try:
                scenario.act(trial)
            except Violation as violation:
                violations.append(str(violation))
            except Exception as error:
                said = "".join(traceback.format_exception(error))
                violations.append(f"the scenario itself failed: {error}")
                (folder / "scenario.txt").write_text(said)
            if not violations:  # else programs that it did not come to end are no orphans
                violations += judge(trial, self.unbroken)
        if not violations and not keep:
            shutil.rmtree(folder)
        return Result(
            scenario=scenario.name,
            repetition=repetition,
            seed=seed,
            outcome="failed" if violations else "passed",
            seconds=round(time.monotonic() - begun, 1),
            faults=tuple(trial.faults),
            violations=tuple(violations),
            folder=str(folder) if folder.exists() else "",
        )


def skipped(scenario: Scenario, repetition: int, seed: int, why: str) -> Result:
    """The result of a scenario that cannot be played here."""
    return Result(
        scenario=scenario.name,
        repetition=repetition,
        seed=seed,
        outcome="skipped",
        why_skipped=why,
    )


def make_sources(folder: Path) -> tuple[str, ...]:
    """Prepare two sources of bytes: numbers as digits, and letters at random; their flags."""
    draw = random.Random(7)
    numbers = [" ".join(str(n * k) for n in range(300)) for k in range(1, 40)]
    letters = ["".join(draw.choices("etaoin shrdlu\n", k=1500)) for _ in range(40)]
    for name, texts in (("numbers", numbers), ("letters", letters)):
        prepare(
            MemoryCorpus([(f"{name}{i}", text) for i, text in enumerate(texts)]),
            open_store(str(folder / name)),
            make_tokenizer("bytes"),
            shard_tokens=20_000,
            validation_permille=300,
        )
    return (f"--data=numbers={folder}/numbers:2", f"--data=letters={folder}/letters:1")


def lacking(needs: frozenset[Need]) -> str:
    """Why this machine does not give what is needed; "" when it does."""
    return "; ".join(why for need in sorted(needs) if (why := _WHY_NOT[need]()))


def _no_root() -> str:
    return "" if os.geteuid() == 0 else "it needs root"


def _no_mounts() -> str:
    with tempfile.TemporaryDirectory() as folder:
        return _refused("unshare", "--mount", "mount", "-t", "tmpfs", "none", folder)


def _no_processes() -> str:
    return _refused("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "true")


def _no_users() -> str:
    return _refused("unshare", "--user", "--map-user=12345", "--map-group=12345", "true")


def _refused(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return " ".join(done.stderr.split()) if done.returncode else ""


_WHY_NOT: dict[Need, Callable[[], str]] = {
    "root": _no_root,
    "network": why_no_hosts,
    "mounts": _no_mounts,
    "processes": _no_processes,
    "cgroup": why_no_small_memory,
    "users": _no_users,
}
