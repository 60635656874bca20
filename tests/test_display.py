"""What people see: tables on stdout, bars on a terminal's stderr alone."""

import io
import sys

import pytest

from storage.display import numbers, plain, print_table, progress_bar, shown_progress, size

Capture = pytest.CaptureFixture[str]


def test_a_table_has_headings_and_empty_cells(capsys: Capture) -> None:
    print_table(("step", "state"), [(1, "live"), (20, None)])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["step  state", "1     live", "20"]


def test_what_a_store_says_cannot_steer_the_terminal(capsys: Capture) -> None:
    print_table(("name",), [("\x1b[2Jgone\r\n[red]x",)])
    assert capsys.readouterr().out.splitlines()[1].rstrip() == "?[2Jgone??[red]x"
    assert plain("für\x07 alle") == "für? alle"


@pytest.mark.parametrize(
    ("size_bytes", "said"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (1.49e9, "1.5 GB"), (2e15, "2000.0 TB")],
)
def test_sizes_are_read_by_people(size_bytes: float, said: str) -> None:
    assert size(int(size_bytes)) == said


def test_numbers_have_commas() -> None:
    assert (numbers([]), numbers([3]), numbers([3, 4])) == ("", "3", "3, 4")


def test_no_bar_without_a_terminal(capsys: Capture) -> None:
    with shown_progress() as advance:
        advance("copying", 1, 2)
    with progress_bar() as progress:
        assert list(progress.track([1, 2], description="verifying")) == [1, 2]
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with shown_progress() as advance:
        advance("copying", 0, 4)
        advance("copying", 3, 4)
        advance("verifying", 1, 1)
    shown = terminal.getvalue()
    assert "copying" in shown and "75%" in shown and "verifying" in shown
    assert capsys.readouterr().out == ""
