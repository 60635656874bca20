"""One start of torchrun below the supervisor: spawned, heard, told of a notice, and cleared away.

Whatever happens, when `run` returns nothing of the start is left but what SIGKILL does not end.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.descendants import descendants, kill_descendants, processes_below, reap, send
from launch.exit_codes import COMPLETE
from launch.hang import AwakeClock, HangWatch
from launch.outcome import Outcome, not_begun, outcome
from launch.reporting import VARIABLE, Place, Reports
from launch.wake import Wake
from storage.errors import RangeFlowError

LOOK_SECONDS = 1.0
STACKS_SECONDS = 2.0
KILL_SECONDS = 30.0
LINGER_SECONDS = 60.0
"""How long torchrun may go on when all its ranks have said their last word."""
MEET_SECONDS = 300.0
"""How long the ranks of several hosts may take to find one another: a host may be lost by then."""
OUTDATED_SECONDS = 3.0
"""How often it is asked, while no rank lives, whether torchrun waits in vain for other hosts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long things may take."""

    grace_seconds: float
    start_seconds: float


class Start:
    """Use `run` once. `looked` hears of every look, with what the ranks have said so far.

    `outdated`, for several hosts, says why torchrun would wait in vain for the others, or "".
    """

    def __init__(
        self,
        command: Sequence[str],
        wake: Wake,
        reports: Reports,
        limits: Limits,
        *,
        say: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
        outdated: Callable[[], str] | None = None,
        looked: Callable[[Reports], None] = lambda reports: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._command = command
        self._wake = wake
        self._reports = reports
        self._limits = limits
        self._say = say
        self._environment = dict(environment or {})
        self._outdated = outdated
        self._asked = clock()
        self._looked = looked
        self._clock = clock
        self._awake = AwakeClock(clock)
        self._watch = HangWatch(limits.start_seconds, self._awake)
        self._world = 1
        self._deadline_path = Path(f"{reports.path}.deadline")
        self._deadline = float("inf")
        self._signalled: set[int] = set()
        self._all_left: float | None = None
        self._meeting: float | None = None

    def run(self) -> Outcome:
        """Start torchrun, mind it until it ends or must, and clear away what it began."""
        self._reports.begin()
        self._deadline_path.unlink(missing_ok=True)
        others = processes_below()  # of who became this supervisor: a shell's `tensorboard &`
        agent = self._spawn()
        ended: dict[int, int] = {}
        hang = ""
        vain = ""
        while agent not in ended:
            self._wake.wait(LOOK_SECONDS, self._reports.fileno())
            self._hear()
            ended |= reap()
            if agent in ended:
                break
            if self._wake.noticed:
                if self._over_after_notice():
                    break
            elif found := self._watch.hang():
                hang = str(found)
                self._say(f"{hang}. Their stacks follow, then they are killed")
                self._show_stacks()
                break
            elif vain := self._waits_in_vain():
                break
            if self._lingers():
                break
        reaped, left = kill_descendants(KILL_SECONDS, spared=others)
        ended |= reaped
        self._hear()
        if left:
            raise RangeFlowError(
                f"SIGKILL did not end process {left[0]} within {KILL_SECONDS:.0f} s: this machine "
                "needs a restart"
            )
        if vain:
            return not_begun(vain, run=self._reports.run, reached=self._reports.highest_step)
        status = ended.get(agent, -signal.SIGKILL)
        return outcome(
            self._reports,
            status,
            noticed=self._wake.noticed,
            hang=hang,
            several_hosts=self._outdated is not None,
        )

    def _spawn(self) -> int:
        """On the main thread: the death of the thread that forks kills the agent."""
        environment = {
            **os.environ,
            **self._environment,
            VARIABLE: self._reports.path,
            # Without it, growing a world hangs for a minute and then fails on every host (2.13).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        sys.stdout.flush()
        sys.stderr.flush()
        return os.posix_spawn(
            self._command[0],
            list(self._command),
            environment,
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
        )

    def _hear(self) -> None:
        def news(rank: int, place: Place) -> None:
            if self._world != self._reports.world:  # which compiles and restores, as a start does
                self._world = self._reports.world
                self._watch = HangWatch(self._limits.start_seconds, self._awake)
            self._watch.heard(rank, place.phase, place.step)

        self._reports.hear(news)
        for exit_ in self._reports.exits:
            self._watch.ended(exit_.rank)
        self._looked(self._reports)

    def _over_after_notice(self) -> bool:
        """Pass the notice on to every rank once; whether nobody needs to be waited for any more."""
        if self._wake.insisted:
            self._say("a second signal: everything is killed now")
            return True
        alive = self._ranks()
        if not alive and not self._signalled:
            self._say("no rank has begun: nothing is to be saved")
            return True
        deadline = self._wake.deadline(self._limits.grace_seconds)
        if deadline < self._deadline:
            self._deadline = deadline
            self._write_deadline(deadline)
        for pid in alive - self._signalled:
            self._signalled.add(pid)
            send(pid, signal.SIGUSR1)
        if self._clock() >= deadline:
            self._say("the grace is over: what has not ended is killed")
            return True
        return False

    def _write_deadline(self, deadline: float) -> None:
        """For the ranks, on the clock of the wall; whole at any instant."""
        at = time.time() + deadline - self._clock()
        partial = Path(f"{self._deadline_path}.partial")
        try:
            partial.write_text(f"{at:.3f}")
            partial.rename(self._deadline_path)
        except OSError as error:  # a full disk: they still save
            self._say(f"the ranks go by their own --grace_seconds: {error}")
        self._say(f"{self._wake.told[0].source}: the ranks have {deadline - self._clock():.1f} s")

    def _waits_in_vain(self) -> str:
        """Why torchrun or its ranks wait for hosts that will not come; or ""."""
        if self._outdated is None:
            return ""
        meeting = any(p.phase == "rendezvous" for p in self._reports.places.values())
        since = self._meeting
        self._meeting = (self._awake() if since is None else since) if meeting else None
        if self._meeting is not None and self._awake() - self._meeting > MEET_SECONDS:
            return f"the ranks of other hosts have not come in {MEET_SECONDS:.0f} s"
        if self._clock() - self._asked < OUTDATED_SECONDS:
            return ""
        self._asked = self._clock()
        if self._ranks() or any(exit_.code == COMPLETE for exit_ in self._reports.exits):
            return ""
        return self._outdated()

    def _ranks(self) -> set[int]:
        """The ranks that live."""
        return {p.pid for p in self._reports.places.values()} & set(descendants())

    def _show_stacks(self) -> None:
        for pid in self._ranks():
            send(pid, signal.SIGUSR2)
        end = self._clock() + STACKS_SECONDS
        while (left := end - self._clock()) > 0 and not self._wake.insisted:
            self._wake.wait(left)

    def _lingers(self) -> bool:
        """Whether torchrun goes on long after the last word of all of its ranks."""
        if not 0 < len(self._reports.places) <= len(self._reports.exits):
            self._all_left = None
            return False
        self._all_left = self._awake() if self._all_left is None else self._all_left
        return self._awake() - self._all_left > LINGER_SECONDS
