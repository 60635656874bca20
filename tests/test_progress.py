"""Progress of a preparation, by an injected clock."""

import io
import logging

import pytest
from rich.console import Console

from data_service.progress import PreparationProgress


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_without_a_terminal_a_line_says_rate_and_eta_now_and_then(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=False)
    with (
        caplog.at_level(logging.INFO, logger="data_service"),
        PreparationProgress(100_000_000, console=console, clock=clock) as progress,
    ):
        progress.advance(40_000_000, 9_000_000, False)  # done by an earlier start
        for _ in range(3):
            clock.seconds += 5
            progress.advance(10_000_000, 5_000_000, True)
    assert [record.getMessage() for record in caplog.records] == [
        "preparing: 60.0 of 100.0 MB, 1,000,000 tokens/s, ETA 20 s"
    ]


def test_on_a_terminal_there_is_a_bar() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with PreparationProgress(100, console=console, clock=Clock()) as progress:
        progress.advance(100, 50, True)
    assert "preparing" in screen.getvalue()
    assert "tokens/s" in screen.getvalue()
    assert "100/100 bytes" in screen.getvalue()
