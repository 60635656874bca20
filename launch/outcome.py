"""What one start came to: a pure function of what its ranks said and of how torchrun ended."""

import signal
from dataclasses import dataclass

from launch.agent import NOT_REACHED
from launch.crash_loop import Ended
from launch.exit_codes import COMPLETE, FENCED, FINAL, INTERNAL, PERMANENT, START_AGAIN
from launch.reporting import Exit, Place, Reports

_PRIORITY = (PERMANENT, FENCED, START_AGAIN)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """`cause` is for people. `busy` when another incarnation is alive on the run.

    `not_reached` when no rank began, since torchrun could not connect to where the hosts meet;
    `unlike` when the hosts that met cannot train together.
    """

    code: int
    cause: str
    ended: Ended
    run: str = ""
    busy: bool = False
    not_reached: bool = False
    unlike: bool = False


def outcome(
    reports: Reports, status: int, *, noticed: bool, hang: str = "", several_hosts: bool = False
) -> Outcome:
    """`status` is torchrun's exit code, or minus the signal that ended it.

    When ranks differ: 78, 76, 75, then the first error that was a rank's own. A peer's loss is
    nobody's own error, so that the one that caused it is named. That other hosts were lost, or not
    met, is in order: those that have a defect know it themselves.
    """
    not_reached = status == NOT_REACHED
    status = START_AGAIN if not_reached else status
    own = next((e for e in reports.exits if e.own), None)
    said = own or next((e for e in reports.exits if e.code), None)
    codes = {e.code for e in reports.exits}
    all_complete = codes == {COMPLETE} and len(reports.exits) >= len(reports.places) > 0
    if status == COMPLETE or all_complete:
        code = COMPLETE
    else:
        told = codes if reports.exits else {status}
        code = next((c for c in _PRIORITY if c in told), INTERNAL)
    if noticed and code not in FINAL:
        code = START_AGAIN
    error = hang
    if own is not None:
        error = f"rank {own.rank}: {own.error}"
    elif not hang and not reports.places and status == INTERNAL:
        error = "torchrun itself failed, see above"
    elif not hang and not reports.places and status == PERMANENT:  # `launch.agent` says so
        error = (
            "torchrun does not take its arguments, see above; write `--` before the script, or "
            "torchrun reads the script's flags as its own"
        )
    first = min(reports.places, default=None)
    place = reports.places[first] if first is not None else None
    return Outcome(
        code=code,
        cause=_cause(_words(said), error, status, code, place, reports.stopped),
        ended=Ended(
            generation=reports.generation,
            phase=place.phase if place else "torchrun",
            step=place.step if place else 0,
            reached=reports.highest_step,
            error=error,
            in_order=not error and _in_order(reports, status, several_hosts),
        ),
        run=reports.run,
        busy=said is not None and said.kind == "RunBusyError",
        not_reached=not_reached and not reports.places,
        unlike=any(e.kind == "UnlikeHostsError" for e in reports.exits),
    )


def not_begun(cause: str, *, run: str = "", reached: int = 0, busy: bool = False) -> Outcome:
    """An agent that waited for a world in vain: it is to start again.

    `reached` is the highest step of the worlds that it was part of before, if it was.
    """
    ended = Ended(generation=0, phase="torchrun", step=0, reached=reached, error="", in_order=True)
    return Outcome(code=START_AGAIN, cause=cause, ended=ended, run=run, busy=busy)


def _in_order(reports: Reports, status: int, several_hosts: bool) -> bool:
    """Whether all ranks had a last word, and lost none of this host that had none."""
    if several_hosts and not reports.places:
        return status == START_AGAIN
    silent = len(reports.exits) < len(reports.places)
    lost = any(e.code == START_AGAIN and e.lost_a_peer for e in reports.exits)
    lost = lost and (silent or not several_hosts)
    return bool(reports.exits) and not (silent or lost or status < 0)


def _words(said: Exit | None) -> str:
    if (
        said is not None and said.lost_a_peer and said.kind != "HostLostError"
    ):  # that is gloo's text
        return f"rank {said.rank} lost another process of the world"
    return (said.error or f"rank {said.rank} left with {said.code}") if said else ""


def _cause(
    said: str, error: str, status: int, code: int, place: Place | None, stopped: bool
) -> str:
    if code == COMPLETE:
        return "stopped, as an operator asked" if stopped else "complete"
    if error or said:
        return error or said
    if status < 0:
        return f"torchrun was ended by {signal.Signals(-status).name}"
    where = f"in phase {place.phase!r} at step {place.step}" if place else "before their first"
    return f"the ranks ended without a word {where}"
