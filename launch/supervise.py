"""Minds a run: passes notices on, starts it again after what a restart helps, ends it otherwise."""

import math
import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch.exit_codes import COMPLETE, FENCED, FINAL, PERMANENT, START_AGAIN
from launch.wake import Wake
from storage.ending import end_process
from storage.errors import ConfigurationError, RunBusyError, StoreUnavailableError

if TYPE_CHECKING:
    from launch.outcome import Outcome

DESCRIPTION = """Start torchrun, and mind the run until it is complete.

Notices (SIGTERM, SIGINT, SIGUSR1, the clouds' metadata services, a file) reach every rank; what a
restart helps is started again; nothing is left behind. What stands behind `--` is torchrun's.

Examples:
  python -m launch.supervise -- --nproc_per_node=1 launch/train.py
  python -m launch.supervise --health_port 8080 -- --standalone --nproc_per_node=4 --
      launch/train.py --run gs://bucket/runs/a --preset gpt2-124m --data c4=gs://bucket/tokens/c4

Exit codes: 0 complete (or stopped, as an operator asked), 75 start again (after a notice), 76
fenced by another incarnation, 78 change something first (also after a crash loop), 70 a defect."""

FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 300.0
BUSY_WAIT_SECONDS = 15.0
JUDGE_SECONDS = 60
"""How long a store may take to answer while something is minded, which goes on without it then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flags:
    """What the supervisor itself may be told."""

    grace_seconds: float = 12.0
    """After a notice, what has not ended in this time is killed. A GKE spot pod has 15 s."""
    start_limit_seconds: float = 1800.0
    """How long a start may be without news before its first step is done (it may compile)."""
    metadata: Literal["auto", "gce", "aws", "azure", "none"] = "auto"
    """Whose metadata service is asked whether this machine will be taken."""
    metadata_url: str = "http://169.254.169.254"
    """Where it is."""
    notice_file: str = ""
    """A file whose presence is a notice."""
    health_port: int = 0
    """Port of /healthz, /readyz and /metrics; 0 for none."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.grace_seconds < math.inf or not self.start_limit_seconds > 0.0:
            raise ConfigurationError(
                "grace_seconds must be a number from 0, and start_limit_seconds above 0; got "
                f"{self.grace_seconds} and {self.start_limit_seconds}"
            )
        if not self.metadata_url.startswith(("http://", "https://")):
            raise ConfigurationError(
                f"metadata_url must begin with http:// or https://; got {self.metadata_url!r}"
            )
        if not 0 <= self.health_port <= 65535:
            raise ConfigurationError(f"health_port must be from 0 to 65535; got {self.health_port}")


class Backoff:
    """How long to wait before the next start: nothing after progress, then doubling, with jitter.

    Progress is a new highest step, so that a start that fails at once is not started at once.
    """

    def __init__(self, uniform: Callable[[float, float], float] = random.uniform) -> None:
        self._uniform = uniform
        self._tries = 0
        self._was_busy = False
        self._reached = 0

    def after(self, ended: "Outcome") -> float:
        """Seconds to wait after this start. Another owner of the run is given more time."""
        progress = ended.ended.reached > self._reached
        if progress or ended.busy != self._was_busy:
            self._tries = 0
        self._reached = max(self._reached, ended.ended.reached)
        self._was_busy = ended.busy
        if progress and not ended.busy:
            return 0.0
        first = BUSY_WAIT_SECONDS if ended.busy else FIRST_WAIT_SECONDS
        longest = min(first * 2.0 ** min(self._tries, 30), LONGEST_WAIT_SECONDS)
        self._tries += 1
        return self._uniform(longest / 2, longest)


def mind(
    start: "Callable[[], Outcome]",
    judge: "Callable[[Outcome], str | None]",
    *,
    wait: Callable[[float], bool],
    noticed: Callable[[], bool],
    say: Callable[[str], None],
    backoff: Backoff,
) -> int:
    """Start again and again, until the run is complete, a notice comes, or no restart helps.

    `judge` says when these starts are a crash loop. `wait` returns False when a notice came.
    """
    while not noticed():
        came = start()
        if came.code in FINAL or noticed():
            code = came.code if came.code in FINAL else START_AGAIN
            say(f"{came.cause}; exit code {code}")
            return code
        stuck = judge(came)
        if stuck is not None and not noticed():
            say(stuck)
            return PERMANENT
        seconds = backoff.after(came)
        say(f"{came.cause}; starting again {f'in {seconds:.1f} s' if seconds else 'at once'}")
        if not wait(seconds):
            break
    say("a notice while nothing runs; exit code 75")
    return START_AGAIN


class Judge:
    """Remembers how the starts of this supervisor ended, and reads how those before it did."""

    def __init__(
        self, say: Callable[[str], None], noticed: Callable[[], bool] = lambda: False
    ) -> None:
        self._say = say
        self._noticed = noticed
        self._seen: list[Any] = []

    def __call__(self, came: "Outcome") -> str | None:
        """What to tell when this start was one too many."""
        from launch.crash_loop import crash_loop, together

        self._seen = [*self._seen, came.ended][-100:]
        if came.ended.in_order:
            return None  # it failed at nothing
        recorded, before = self._recorded(came.run) if came.run else ([], 0)
        return crash_loop(together(recorded, self._seen), before)

    def _recorded(self, run: str) -> tuple[list[Any], int]:
        """From the run's log; a store that does not answer in time, or a notice, does without."""
        from launch.beside import beside
        from launch.recorded_ends import recorded_ends
        from storage.store import open_store

        try:
            return beside(lambda: recorded_ends(open_store(run)), self._noticed, JUDGE_SECONDS)
        except Exception as error:
            self._say(f"the run's log could not be read, so only starts from here count: {error}")
            return [], 0


def say(text: str) -> None:
    """One line of the supervisor's own."""
    sys.stderr.write(f"supervise: {text}\n")
    sys.stderr.flush()


def torchrun_command(grace_seconds: float, arguments: Sequence[str]) -> list[str]:
    """What is started; what is given twice, torchrun takes from the later."""
    shutdown = f"--shutdown-timeout={max(1, int(grace_seconds))}"
    agent = [sys.executable, "-m", "launch.agent", str(os.getpid())]
    return [*agent, "--max-restarts=0", shutdown, *arguments]


def main(
    arguments: Sequence[str] | None = None,
    command: Callable[[float, Sequence[str]], list[str]] = torchrun_command,
) -> int:
    """Supervise; returns the exit code."""
    with Wake() as wake:  # before anything else is imported: as process 1 nobody else hears it
        from launch.exit_codes import exit_code

        try:
            return supervise(sys.argv[1:] if arguments is None else arguments, wake, command)
        except Exception as error:
            return exit_code(error)


def supervise(
    arguments: Sequence[str], wake: Wake, command: Callable[[float, Sequence[str]], list[str]]
) -> int:
    """Assemble the parts, and mind the run."""
    from launch.beside import beside
    from launch.elastic import Elastic, Joined, RunIsCompleteError, for_several_hosts
    from launch.health import Condition, Health
    from launch.metadata import NoticeWatch, clouds
    from launch.minded import adopt_orphans
    from launch.outcome import not_begun
    from launch.reporting import Reports
    from launch.start import Limits, Start
    from storage.commands import parse

    own, found, torchrun = _split(arguments)
    flags: Flags | None = parse(
        Flags, own, prog="python -m launch.supervise", description=DESCRIPTION
    )
    if flags is None:  # --help
        return COMPLETE
    if not found or not torchrun:
        raise ConfigurationError(
            "expected `--` and torchrun's arguments, such as: python -m launch.supervise -- "
            "--nproc_per_node=1 launch/train.py"
        )
    adopt_orphans()
    elastic = Elastic(torchrun, os.environ.get, say) if for_several_hosts(torchrun) else None
    limits = Limits(grace_seconds=flags.grace_seconds, start_seconds=flags.start_limit_seconds)
    with ExitStack() as stack:
        condition = Condition()
        if flags.health_port:
            stack.enter_context(Health(flags.health_port, condition))
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rangeflow-"))
            reports = stack.enter_context(Reports(str(Path(folder, "reports"))))
        except OSError as error:
            raise ConfigurationError(
                "the temporary folder must take files and a socket, whose path has at most 107 "
                f"bytes: {error}. Name another, such as TMPDIR=/tmp"
            ) from error
        stack.enter_context(
            NoticeWatch(
                clouds(flags.metadata, flags.metadata_url), flags.notice_file, wake.tell, say
            )
        )

        def start() -> "Outcome":
            condition.started()
            came = begun()
            condition.ended(came)
            return came

        def noticed() -> bool:
            return wake.noticed

        def outdated(elastic: Elastic, joined: Joined) -> str:
            try:
                return beside(lambda: elastic.outdated(joined), noticed, JUDGE_SECONDS)
            except TimeoutError:
                return ""

        trained = [False]

        def begun() -> "Outcome":
            joined = None
            if elastic is not None:
                try:
                    joined = beside(lambda: elastic.join(wake.wait_out), noticed)
                except (RunBusyError, StoreUnavailableError) as error:
                    return not_begun(str(error), busy=isinstance(error, RunBusyError))
                except RunIsCompleteError as error:
                    return replace(not_begun(str(error)), code=COMPLETE)
                except TimeoutError:
                    joined = None
                if joined is None:
                    return not_begun("a notice before the hosts met")
            came = Start(
                command(flags.grace_seconds, joined.arguments if joined else torchrun),
                wake,
                reports,
                limits,
                say=say,
                environment=joined.environment if joined else {},
                outdated=partial(outdated, elastic, joined) if elastic and joined else None,
                looked=condition.looked,
            ).run()
            trained[0] = trained[0] or came.ended.reached > 0
            if came.unlike and elastic is not None and trained[0]:
                return without_the_newcomer(came)
            if came.not_reached and elastic is not None and joined is not None:
                elastic.not_reached(joined)
            trains = came.ended.generation > 0 or came.code == FENCED
            if elastic is None or came.code in (COMPLETE, PERMANENT) or not trains:
                return came
            if not still_ours(elastic):  # also where a lost peer was noticed before the fence
                return replace(
                    came, code=FENCED, cause=f"another job has claimed the run; {came.cause}"
                )
            if came.code == FENCED:
                return replace(came, code=START_AGAIN)  # the others went on without this host
            return came

        def without_the_newcomer(came: "Outcome") -> "Outcome":
            """This host has trained the run with others: who came since must leave, with 78."""
            return replace(
                came, code=START_AGAIN, ended=replace(came.ended, error="", in_order=True)
            )

        def still_ours(elastic: Elastic) -> bool:
            try:
                return beside(elastic.still_ours, noticed, JUDGE_SECONDS)
            except TimeoutError:
                return True

        return mind(
            start,
            Judge(say, noticed),
            wait=wake.wait_out,
            noticed=noticed,
            say=say,
            backoff=Backoff(),
        )


def _split(arguments: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    """The supervisor's arguments, whether `--` is there, and torchrun's behind it."""
    if "--" not in arguments:
        return list(arguments), False, []
    place = list(arguments).index("--")
    return list(arguments[:place]), True, list(arguments[place + 1 :])


if __name__ == "__main__":
    end_process(main())
