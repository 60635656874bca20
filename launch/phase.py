"""Where the program is: the phase and the step that heartbeats report and tests listen to."""

from collections.abc import Callable

from storage.errors import StopRequestedError

_BEFORE_TRAINING = ("open", "claim", "prepare")
"""Phases of rank 0 alone, in which a notice ends the program for all: nothing is to be saved."""


class Phase:
    """Called with the name of each phase that is entered; `step` counts finished steps.

    `report` hears of each, `listener` also of what other threads enter.
    """

    def __init__(
        self,
        listener: Callable[[str, int], None] | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
        report: Callable[[str, int], None] = lambda phase, step: None,
    ) -> None:
        self._listener = listener
        self._stop_requested = stop_requested
        self._report = report
        self.name = "start"
        self.step = 0

    def place(self) -> tuple[str, int]:
        """The phase and the step."""
        return self.name, self.step

    def aside(self, phase: str) -> None:
        """What another thread enters: the listener hears it, the program's place stays."""
        if self._listener is not None:
            self._listener(phase, self.step)

    def __call__(self, phase: str) -> None:
        self.name = phase
        self._report(phase, self.step)
        if self._listener is not None:
            self._listener(phase, self.step)
        if phase.partition(":")[0] in _BEFORE_TRAINING and self._stop_requested():
            raise StopRequestedError(f"asked to stop in phase {phase!r}, before training began")
