"""The command that plays scenarios against this installation."""

import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import tyro

from storage.commands import run_command
from storage.display import print_table
from storage.errors import ConfigurationError, StoreUnavailableError

if TYPE_CHECKING:
    from launch.chaos.scenarios import Result, Scenario

_DESCRIPTION = """Try to break runs of this installation, and judge what is left of them.

Each scenario deals faults to a small run of its own, which must then end with the bits of an
unbroken one, every sample once, a whole checkpoint, and no process left behind.

Example:
    python -m launch.chaos --list
    python -m launch.chaos --repeat 3 --seed 7 --out chaos
    python -m launch.chaos --scenario sigkill-rank
    python -m launch.chaos --faults 200 --seed 7

Exit codes: 0 when nothing was violated, 1 when something was or nothing could be played, 78 for
arguments that cannot be used."""

_NOTICES = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_VIOLATED = 1
_SHOWN = 4
"""Faults in the line of a result; the report has all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chaos:
    """What is played, how often, and where the report goes."""

    list: bool = False
    """Show the scenarios, and play none."""
    scenario: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Name of a scenario; without any, all are played."""
    repeat: int = 1
    """How often each is played, every time with other faults."""
    faults: int = 0
    """Instead of scenarios: so many random faults in one run."""
    seed: int = 0
    """Decides the faults."""
    out: str = ""
    """New or empty folder for `chaos.json` and the runs; empty for a temporary one."""
    keep: bool = False
    """Keep the folders of what passed as well."""

    def __post_init__(self) -> None:
        if self.repeat < 1:
            raise ConfigurationError(f"--repeat must be at least 1, got {self.repeat}")
        if self.faults < 0:
            raise ConfigurationError(f"--faults must be at least 0, got {self.faults}")
        if self.faults and (self.scenario or self.repeat > 1):
            raise ConfigurationError("--faults is one run: give it without --scenario and --repeat")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; what it returns is the exit code."""
    return run_command(
        Chaos, _execute, argv, prog="python -m launch.chaos", description=_DESCRIPTION
    )


def _execute(arguments: Chaos) -> int:
    if not sys.platform.startswith("linux"):
        raise ConfigurationError("launch.chaos finds processes in /proc, which only Linux has")
    scenarios = _chosen(arguments)
    if arguments.list:
        rows = [(s.name, ", ".join(sorted(s.needs)) or None, s.about) for s in scenarios]
        print_table(("scenario", "needs", "what happens"), rows)
        return 0
    folder = _folder(arguments.out)
    results: list[Result] = []
    report = folder / "chaos.json"
    try:
        for result in _results(scenarios, arguments, folder):
            _show(result)
            results.append(result)
            report.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")
    except (OSError, StoreUnavailableError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise ConfigurationError(
            f"{folder} must take the runs, some 10 MB, and a report: {error}. Name another as --out"
        ) from error
    played = [result for result in results if result.outcome != "skipped"]
    failed = [result for result in played if result.outcome == "failed"]
    print(
        f"{len(played)} played, {len(failed)} failed, {len(results) - len(played)} skipped; seed "
        f"{arguments.seed}; {report}"
    )
    return _VIOLATED if failed or not played else 0


def _results(scenarios: "Sequence[Scenario]", arguments: Chaos, folder: Path) -> "Iterator[Result]":
    """As they come. A run that fails without any fault is the only one: nothing is to be tried."""
    from launch.chaos.scenarios import Result
    from launch.chaos.trial import Violation

    try:
        if arguments.faults:
            yield from _soak(arguments, folder)
        else:
            yield from _play(scenarios, arguments, folder)
    except Violation as violation:
        yield Result(
            scenario="unbroken",
            repetition=0,
            seed=arguments.seed,
            outcome="failed",
            violations=(f"without any fault: {violation}",),
            folder=str(folder / "unbroken"),
        )


def _play(scenarios: "Sequence[Scenario]", arguments: Chaos, folder: Path) -> "Iterator[Result]":
    from launch.chaos.scenarios import Ground, lacking, skipped

    why_not = {scenario.name: lacking(scenario.needs) for scenario in scenarios}
    ground = Ground(folder) if not all(why_not.values()) else None
    for repetition in range(arguments.repeat):
        for scenario in scenarios:
            if ground is None or why_not[scenario.name]:
                yield skipped(scenario, repetition, arguments.seed, why_not[scenario.name])
            else:
                yield ground.play(scenario, repetition, arguments.seed, keep=arguments.keep)


def _soak(arguments: Chaos, folder: Path) -> "Iterator[Result]":
    from launch.chaos.scenarios import Ground
    from launch.chaos.soak import drawn, shape, soak

    blows = drawn(arguments.seed, arguments.faults)
    ground = Ground(folder, shape=shape(blows))
    yield ground.play(soak(blows), seed=arguments.seed, keep=arguments.keep)


def _show(result: "Result") -> None:
    """One line, and one more for each violation."""
    from rich.console import Console
    from rich.text import Text

    style = {"passed": "green", "failed": "bold red", "skipped": "yellow"}[result.outcome]
    line = Text(f"{result.outcome:8}", style=style)
    more = f"; and {len(result.faults) - _SHOWN} more" if len(result.faults) > _SHOWN else ""
    told = result.why_skipped or "; ".join(result.faults[:_SHOWN]) + more
    line.append(f"{result.scenario:28} {result.seconds:6.1f} s  {told}", style="default")
    console = Console(soft_wrap=True)
    with console.capture() as capture:
        console.print(line)
        for violation in result.violations:
            console.print(Text(f"         {violation}"))
        if result.violations:
            console.print(Text(f"         seed {result.seed}; kept in {result.folder}"))
    # Not by rich: where the pipe is closed it would exit with 1, as if something were violated.
    print(capture.get(), end="", flush=True)


def _chosen(arguments: Chaos) -> "list[Scenario]":
    from launch.chaos.containers import CONTAINERS
    from launch.chaos.one_host import ONE_HOST
    from launch.chaos.several_hosts import SEVERAL_HOSTS

    known = {scenario.name: scenario for scenario in (*ONE_HOST, *SEVERAL_HOSTS, *CONTAINERS)}
    unknown = [name for name in arguments.scenario if name not in known]
    if unknown:
        raise ConfigurationError(
            f"no scenario {unknown[0]!r}; --list shows them: {', '.join(known)}"
        )
    return [known[name] for name in dict.fromkeys(arguments.scenario or known)]


def _folder(out: str) -> Path:
    if not out:
        try:
            return Path(tempfile.mkdtemp(prefix="rangeflow-chaos-"))
        except OSError as error:
            raise ConfigurationError(f"{error}; name a folder as --out") from error
    if "://" in out:
        raise ConfigurationError(f"--out must be a folder of this host, got {out!r}")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigurationError(f"--out {out} is not empty; give a new folder")
    except OSError as error:
        raise ConfigurationError(f"--out {out}: {error.strerror}") from error
    return folder.resolve()


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Once: what is cleared away then is not to be left by a second ^C."""
    for notice in _NOTICES:
        signal.signal(notice, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    for notice in _NOTICES:
        if signal.getsignal(notice) != signal.SIG_IGN:  # as `nohup` has it
            signal.signal(notice, _interrupted)
    sys.exit(main())
