"""Scenarios on one host: signals, kills and stops of each process, in each phase."""

import signal

from launch.chaos.scenarios import Scenario
from launch.chaos.trial import Trial
from launch.exit_codes import COMPLETE, START_AGAIN


def _notice_in(phase: str, step: int = 0, *codes: int) -> Scenario:
    """SIGTERM to the supervisor while rank 0 stands in a phase."""

    def act(trial: Trial) -> None:
        world = trial.random.choice((1, 2))
        program = trial.start(trial.supervisor(world), stop=(phase, step))
        place = program.stopped()
        trial.fault(f"SIGTERM in phase {phase!r} at step {place.step}, {world} ranks")
        program.signal(signal.SIGTERM)
        place.go_on()
        program.end(*(codes or (START_AGAIN,)))
        trial.complete()

    at = f" of step {step + 1}" if step else ""
    return Scenario(
        name=f"sigterm-{phase.replace(':', '-').replace('_', '-')}{f'-{step}' if step else ''}",
        about=f"a notice in phase {phase!r}{at}",
        act=act,
    )


def _kill_rank(trial: Trial) -> None:
    step = trial.random.randrange(1, 25)
    program = trial.start(trial.supervisor(2), stop=("micro_batch", step))
    place = program.stopped()
    trial.fault(f"SIGKILL of rank 0 at step {place.step}")
    place.signal(signal.SIGKILL)
    program.end(COMPLETE)


ONE_HOST = (
    _notice_in("micro_batch", 7),
    Scenario(name="sigkill-rank", about="one of two ranks is killed", act=_kill_rank),
)
