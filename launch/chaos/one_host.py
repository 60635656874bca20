"""Scenarios on one host: signals, kills and stops of each process, in each phase."""

import signal
import time
from pathlib import Path

from checkpointing.history import history
from launch.chaos.marked import Role, state
from launch.chaos.scenarios import Scenario
from launch.chaos.small_disk import small_disk
from launch.chaos.trial import STEPS, Place, Program, Trial, Violation
from launch.exit_codes import COMPLETE, FENCED, PERMANENT, START_AGAIN
from storage.log import Log
from storage.store import open_store

START_LIMIT_SECONDS = 30
"""For trials in which a start hangs; an import of torch on a busy machine takes 10 s."""
SHORT_GRACE_SECONDS = 8
AT_ONCE_SECONDS = 60.0
"""Half of the grace of a trial: who ends so soon has not waited for it."""
HOLD_SECONDS = 0.3
MOST_STARTS = 8

_LEFT_STEP = 7

SAVING = ("save:begin", "save:object", "save:uploaded", "save:manifest", "save:committed")


def _notice_in(
    name: str, about: str, phase: str, step: int = 0, *, saved: int = 0, code: int = START_AGAIN
) -> Scenario:
    """SIGTERM to the supervisor while rank 0 stands in a phase; `saved` is what the next finds."""

    def act(trial: Trial) -> None:
        world = trial.random.choice((1, 2))
        if phase == "restore":
            _leave_something(trial)
        program = trial.start(trial.supervisor(world), stop=(phase, step))
        place = program.stopped()
        trial.fault(f"SIGTERM in phase {phase!r} at step {place.step}, ranks: {world}")
        program.notice(place)
        place.go_on()
        program.end(code)
        trial.expect_saved(saved)
        trial.complete()

    return Scenario(name=f"sigterm-{name}", about=f"a notice {about}", act=act)


def _leave_something(trial: Trial) -> None:
    """A checkpoint, to be restored."""
    program = trial.start(stop=("micro_batch", _LEFT_STEP - 1))
    place = program.stopped()
    program.notice(place)
    place.go_on()
    program.end(START_AGAIN)
    trial.expect_saved(_LEFT_STEP)


def _notice_at_the_agent(trial: Trial) -> None:
    program = trial.start()
    program.process("agent")
    trial.fault("SIGTERM while torchrun begins")
    program.signal(signal.SIGTERM)
    program.end(START_AGAIN)
    trial.complete()


def _notice_to_a_hung_rank(trial: Trial) -> None:
    """Which does not hear it. Alone, so that only the supervisor can see that the grace is over."""
    own = (f"--grace_seconds={SHORT_GRACE_SECONDS}",)
    program = trial.start(trial.supervisor(own=own), stop=_step(trial))
    place = program.stopped()
    trial.fault(f"SIGTERM at step {place.step}, where the rank stands still")
    program.notice(place)
    program.end(START_AGAIN, seconds=AT_ONCE_SECONDS)
    trial.complete()


def _two_notices(trial: Trial) -> None:
    program, place = _in_some_step(trial)
    trial.fault(f"two SIGTERMs at step {place.step}")
    program.signal(signal.SIGTERM)
    program.says("SIGTERM: the ranks have ")
    program.signal(signal.SIGTERM)
    program.says("a second signal: everything is killed now")
    program.end(START_AGAIN, seconds=AT_ONCE_SECONDS)
    trial.complete()


def _sigint(trial: Trial) -> None:
    program, place = _in_some_step(trial)
    trial.fault(f"SIGINT at step {place.step}")
    program.notice(place, signal.SIGINT)
    place.go_on()
    program.end(START_AGAIN)
    trial.expect_saved(place.step + 1)
    trial.complete()


def _kill_rank(trial: Trial) -> None:
    program, place = _in_some_step(trial, world=2)
    trial.fault(f"SIGKILL of rank 0 of 2 at step {place.step}")
    place.signal(signal.SIGKILL)
    program.end(COMPLETE)


def _kill_writer(trial: Trial) -> None:
    """Once in each phase of a save, each time in a later save."""
    first, *others = trial.random.sample(SAVING, len(SAVING))
    phase: str | None = first
    program = trial.start(stop=(first, trial.random.randrange(1, 9)))
    while phase is not None:
        place = program.stopped()
        trial.fault(f"SIGKILL of the process that saves, in {phase!r} at step {place.step}")
        phase = others.pop() if others else None
        if phase is not None:
            program.stop(phase, place.step + 1)
        place.signal(signal.SIGKILL)
    program.end(COMPLETE)


def _kill_agent(trial: Trial) -> None:
    program, place = _in_some_step(trial, world=2)
    trial.fault(f"SIGKILL of the agent at step {place.step}")
    _send(signal.SIGKILL, program, "agent")
    program.end(COMPLETE)


def _kill_torchrun(trial: Trial) -> None:
    """Nobody is there to clear away what it leaves."""
    words = trial.torchrun("--standalone", "--nproc_per_node=2")
    program = trial.start(trial.python("-m", "torch.distributed.run", *words), stop=_step(trial))
    place = program.stopped()
    trial.fault(f"SIGKILL of a plain torchrun at step {place.step}")
    program.signal(signal.SIGKILL)
    program.end(-signal.SIGKILL)
    program.gone()
    trial.complete()


def _kill_supervisor(trial: Trial) -> None:
    program, place = _in_some_step(trial, world=2)
    trial.fault(f"SIGKILL of the supervisor at step {place.step}")
    program.signal(signal.SIGKILL)
    program.end(-signal.SIGKILL)
    program.gone()
    trial.complete()


def _kill_supervisor_early(trial: Trial) -> None:
    """The rank cannot have asked to die with its parent yet."""
    program = trial.start(stop=("import", 0))
    place = program.stopped()
    trial.fault("SIGKILL of the supervisor before its rank has imported anything")
    program.signal(signal.SIGKILL)
    program.end(-signal.SIGKILL)
    program.gone("agent")
    place.go_on()
    program.gone()
    if Path(trial.run).exists():
        raise Violation("the rank has begun to train, and nobody minded it")
    trial.complete()


def _stop_rank(trial: Trial) -> None:
    """It has made steps: the limit is the one for a step."""
    program, place = _in_some_step(trial, world=2)
    trial.fault(f"SIGSTOP of rank 0 of 2 at step {place.step}")
    program.says(" hangs in phase ")  # of this rank, or of the one that waits for it
    _cleared_away(program, place)
    program.end(COMPLETE)


def _cleared_away(program: Program, place: Place) -> None:
    """Wait for the next start: nothing of the last one is left by then."""
    program.says("; starting again")
    if state(place.pid) not in ("", "Z"):
        raise Violation("the next start begins, and the rank of the last that hung lives on")


def _stop_rank_at_start(trial: Trial) -> None:
    phase = trial.random.choice(("rendezvous", "claim", "micro_batch"))
    program = _impatient(trial, stop=(phase, 0))
    place = program.stopped()
    trial.fault(f"SIGSTOP of the rank in phase {phase!r}, before its first step")
    program.says(f"hangs in phase {phase!r}")
    _cleared_away(program, place)
    program.end(COMPLETE)


def _stop_agent(trial: Trial) -> None:
    """Its ranks come to their end; it is not waited for longer than a minute."""
    program, place = _in_some_step(trial)
    trial.fault(f"SIGSTOP of the agent at step {place.step}")
    _send(signal.SIGSTOP, program, "agent")
    place.go_on()
    program.end(COMPLETE)


def _stop_agent_at_start(trial: Trial) -> None:
    program = _impatient(trial)
    program.process("agent")
    trial.fault("SIGSTOP of the agent before it has ranks")
    _send(signal.SIGSTOP, program, "agent")
    program.says("torchrun hangs")
    program.end(COMPLETE)


def _two_jobs(trial: Trial) -> None:
    """The second names the first, waits, and finds the run complete."""
    first = trial.start(stop=("micro_batch", 1))
    place = first.stopped()
    trial.fault(f"a second job is started at step {place.step} of the first")
    second = trial.start()
    while "is in use by generation 1 on host " not in second.output():
        if first.ended or second.ended:
            raise Violation("the second job did not name the first, that trained")
        place.go_on()  # a little at a time: the run must last until the second has looked
        place = first.phase("micro_batch")
        time.sleep(HOLD_SECONDS)
    place.go_on()
    first.end(COMPLETE)
    second.end(COMPLETE)
    claims = history(Log(open_store(trial.run)).refresh()).generation
    if claims != 1:
        raise Violation(f"the run was claimed {claims} times, where one job trained it")


def _stale_writer(trial: Trial) -> None:
    """All of a job stands still; another goes on; then the first wakes."""
    first, place = _in_some_step(trial)
    stopped = first.processes()
    for pid in stopped:
        Place(pid, 0).signal(signal.SIGSTOP)
    trial.fault(f"SIGSTOP of supervisor, agent and rank at step {place.step}")
    other = trial.start(stop=("micro_batch", place.step + 1))
    held = other.stopped()
    trial.fault(f"SIGCONT of them when another job is at step {held.step}")
    for pid in stopped:
        Place(pid, 0).go_on()
    first.end(FENCED)
    held.go_on()
    other.end(COMPLETE)


def _disk_full(trial: Trial) -> None:
    disk = trial.stack.enter_context(small_disk())
    trial.run = str(disk.folder / "run")
    program, place = _in_some_step(trial)
    trial.fault(f"no space is left from step {place.step} on, until a save has failed")
    disk.fill()
    place.go_on()
    program.says("failed, and training goes on")
    disk.free()
    program.end(COMPLETE)


def _slow_save(trial: Trial) -> None:
    """The upload of a save hangs; at the end of the grace the ranks leave without it."""
    own = (f"--grace_seconds={SHORT_GRACE_SECONDS}",)
    program = trial.start(trial.supervisor(own=own), holds=("save:object", 4))
    held = program.stopped()
    place = program.phase("micro_batch", held.step + 2)
    trial.fault(f"the save of step {held.step} hangs, and SIGTERM comes at step {place.step}")
    program.signal(signal.SIGTERM)
    program.says("the ranks have ")
    place.go_on()
    program.end(START_AGAIN, seconds=AT_ONCE_SECONDS)
    program.says("there is no time left")
    trial.complete()


def _crash_loop(trial: Trial) -> None:
    phase = trial.random.choice(("claim", "restore"))
    if phase == "restore":
        _leave_something(trial)
    program = trial.start(stop=(phase, 0))
    kills = 0
    while (place := program.stopped_or_ended()) is not None:
        kills += 1
        if kills > MOST_STARTS:
            raise Violation(f"{kills} starts died in phase {phase!r}, and it was tried again")
        program.stop(phase)  # in the next start
        place.signal(signal.SIGKILL)
    trial.fault(f"{kills} times SIGKILL in phase {phase!r}")
    program.end(PERMANENT)
    program.says("crash loop: 3 starts in a row ended without a new step")
    program.says(f"the last in phase {phase!r}")
    trial.complete()


def _slow_progress(trial: Trial) -> None:
    """Each start comes one step further, and dies in the same phase."""
    first, last = 5, 10
    program = trial.start(stop=("micro_batch", first))
    for step in range(first, last + 1):
        place = program.stopped()
        if step < last:
            program.stop("micro_batch", step + 1)
        place.signal(signal.SIGKILL)
    trial.fault(f"SIGKILL in step {first + 1}, after that in step {first + 2}, ... {last + 1}")
    program.end(COMPLETE)


def _step(trial: Trial) -> tuple[str, int]:
    """Where a trial stops that may stop in any step."""
    return "micro_batch", trial.random.randrange(3, 22)


def _in_some_step(trial: Trial, world: int = 1) -> tuple[Program, Place]:
    """A supervised program whose rank 0 has stopped in the middle of a step."""
    program = trial.start(trial.supervisor(world), stop=_step(trial))
    return program, program.stopped()


def _impatient(trial: Trial, stop: tuple[str, int] | None = None) -> Program:
    """A supervisor that soon takes a start for hung."""
    limit = f"--start_limit_seconds={START_LIMIT_SECONDS}"
    return trial.start(trial.supervisor(own=(limit,)), stop=stop)


def _send(number: signal.Signals, program: Program, role: Role) -> None:
    Place(program.process(role), 0).signal(number)


ONE_HOST = (
    _notice_in("import", "before torch is imported", "import"),
    Scenario(
        name="sigterm-torchrun", about="a notice while torchrun begins", act=_notice_at_the_agent
    ),
    _notice_in("rendezvous", "while the ranks come together", "rendezvous"),
    _notice_in("claim", "before the run is claimed", "claim"),
    _notice_in("restore", "before a checkpoint is read", "restore", saved=_LEFT_STEP),
    _notice_in("first-step", "in the first step", "micro_batch", saved=1),
    _notice_in("step", "in a later step", "micro_batch", 6, saved=7),
    _notice_in("save", "while a save is being written", "save:object", 8, saved=8),
    _notice_in("evaluation", "in an evaluation", "evaluate", 10, saved=10),
    _notice_in("exit", "when all is done", "exit", saved=STEPS, code=COMPLETE),
    Scenario(name="sigterm-hung", about="a notice while a rank hangs", act=_notice_to_a_hung_rank),
    Scenario(name="two-sigterms", about="the second kills at once", act=_two_notices),
    Scenario(name="sigint", about="as SIGTERM", act=_sigint),
    Scenario(name="sigkill-rank", about="one of two ranks is killed", act=_kill_rank),
    Scenario(name="sigkill-save", about="killed in the middle of a save", act=_kill_writer),
    Scenario(name="sigkill-agent", about="the supervisor's torchrun is killed", act=_kill_agent),
    Scenario(name="sigkill-torchrun", about="torchrun without a supervisor", act=_kill_torchrun),
    Scenario(name="sigkill-supervisor", about="nothing outlives it", act=_kill_supervisor),
    Scenario(
        name="sigkill-supervisor-start",
        about="before a rank can die with it",
        act=_kill_supervisor_early,
    ),
    Scenario(name="sigstop-rank", about="a rank hangs in a step", act=_stop_rank),
    Scenario(name="sigstop-rank-start", about="a rank hangs in a start", act=_stop_rank_at_start),
    Scenario(name="sigstop-agent", about="torchrun hangs, its ranks do not", act=_stop_agent),
    Scenario(name="sigstop-agent-start", about="torchrun hangs at once", act=_stop_agent_at_start),
    Scenario(name="two-jobs", about="two supervisors on one run", act=_two_jobs),
    Scenario(name="stale-writer", about="a job wakes after another went on", act=_stale_writer),
    Scenario(
        name="disk-full",
        about="no space is left for a while",
        act=_disk_full,
        needs=frozenset({"mounts"}),
    ),
    Scenario(name="slow-save", about="a save takes longer than the grace", act=_slow_save),
    Scenario(name="crash-loop", about="starts die at one place: exit code 78", act=_crash_loop),
    Scenario(name="slow-progress", about="starts die, each a step further", act=_slow_progress),
)
