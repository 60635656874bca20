import logging
import re
from collections.abc import Iterator

import pytest

from launch.logs import set_up_logging
from launch.phase import Phase


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """The root logger is as it was afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    yield
    root.handlers, root.level = handlers, level


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == "", "logs go to standard error"
    return captured.err.splitlines()


def test_every_line_says_the_rank_and_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    phase = Phase()
    set_up_logging(0, phase)
    logging.getLogger("one").info("begun %s", "now")
    phase.step = 12
    logging.getLogger("another").warning("skipped")
    begun, skipped = said(capsys)
    assert re.fullmatch(r"\d\d:\d\d:\d\d \[rank 0 step 0\] begun now", begun)
    assert re.fullmatch(r"\d\d:\d\d:\d\d \[rank 0 step 12\] skipped", skipped)


def test_ranks_but_0_say_only_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(3, Phase())
    logging.getLogger("one").info("begun")
    logging.getLogger("one").warning("skipped")
    (line,) = said(capsys)
    assert line.endswith("[rank 3 step 0] skipped")


def test_debugging_lines_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(0, Phase())
    logging.getLogger("one").debug("a heartbeat was not written")
    assert said(capsys) == []


def test_set_up_twice_says_everything_once(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(0, Phase())
    set_up_logging(0, Phase())
    logging.getLogger("one").info("begun")
    assert len(said(capsys)) == 1
