"""Where the program is: the phase and the step that heartbeats report and tests listen to."""

from collections.abc import Callable


class Phase:
    """Called with the name of each phase that is entered; `step` counts finished steps."""

    def __init__(self, listener: Callable[[str, int], None] | None = None) -> None:
        self._listener = listener
        self.name = "start"
        self.step = 0

    def place(self) -> tuple[str, int]:
        """The phase and the step."""
        return self.name, self.step

    def __call__(self, phase: str) -> None:
        self.name = phase
        if self._listener is not None:
            self._listener(phase, self.step)
