"""What the operator commands may be asked, and what their help says."""

import re
from typing import Any

import pytest

from checkpointing.arguments import COMMANDS, Copy, Doctor, Pin, Prune, Unpin, Verify
from checkpointing.runs import main
from launch.exit_codes import COMPLETE
from storage.commands import parse
from storage.errors import ConfigurationError

Capture = pytest.CaptureFixture[str]

NAMES = ("ls", "show", "verify", "pin", "unpin", "prune", "copy", "ask", "doctor")


def parsed(*argv: str) -> Any:
    return parse(COMMANDS, argv, prog="runs", description="")


@pytest.mark.parametrize("command", [[], *([name] for name in NAMES)])
def test_the_help_has_an_example(command: list[str], capsys: Capture) -> None:
    assert main([*command, "--help"]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"Example:\n +python -m checkpointing.runs {''.join(command)}", said), said


@pytest.mark.parametrize("name", NAMES)
def test_each_can_answer_a_script(name: str, capsys: Capture) -> None:
    assert main([name, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_the_help_of_a_stop_says_the_exit_code_that_it_leads_to(capsys: Capture) -> None:
    assert main(["ask", "--help"]) == 0
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert f"save and stay stopped, with exit code {COMPLETE}" in said


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("verify r --step best --record", Verify(run="r", step="best", record=True)),
        ("pin r 1200 --reason x", Pin(run="r", step="1200", reason="x")),
        ("unpin r 1200 --json", Unpin(run="r", step="1200", json=True)),
        (
            "prune r --dry-run --keep-last 4 --keep_every_steps=1000",
            Prune(run="r", dry_run=True, keep_last=4, keep_every_steps=1000),
        ),
        ("prune --dry_run r", Prune(run="r", dry_run=True)),
        ("copy r gs://b/r", Copy(run="r", destination="gs://b/r")),
        ("doctor gs://b", Doctor(run="gs://b")),
    ],
)
def test_flags_are_written_with_underscores_or_hyphens(argv: str, expected: object) -> None:
    assert parsed(*argv.split()) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("pin r", "STEP"),
        ("copy r", "DESTINATION"),
        ("prune r --keep_last many", "keep_last"),
        ("doctor r --no_json", "--no_json"),
    ],
)
def test_what_does_not_fit_is_refused(argv: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parsed(*argv.split())
