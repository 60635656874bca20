"""Every command reads its arguments and fails in one way: one line, and the error's exit code."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import tyro

import storage.errors
from storage.commands import parse, run_command
from storage.errors import ConfigurationError, RangeFlowError
from tests.programs import ROOT

Capture = pytest.CaptureFixture[str]

KINDS = [kind for kind in vars(storage.errors).values() if isinstance(kind, type)]

PROGRAM = "import sys; from {module} import main; sys.exit(main())"


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """What a command may be asked."""

    place: tyro.conf.Positional[str]
    """Path or URL."""
    n_layer: int = 2
    """How many."""
    record: bool = False

    def __post_init__(self) -> None:
        if self.n_layer < 1:
            raise ConfigurationError(f"n_layer must be at least 1; got {self.n_layer}")


def parsed(*argv: str, default: Arguments | None = None) -> Arguments | None:
    found: Arguments | None = parse(
        Arguments, argv, prog="python -m a.command", description="Does it.", default=default
    )
    return found


def run(execute: Callable[[Arguments], int], *argv: str) -> int:
    return run_command(Arguments, execute, argv, prog="python -m a.command", description="Does it.")


def test_arguments_are_written_with_underscores_or_hyphens() -> None:
    expected = Arguments(place="runs/a", n_layer=3, record=True)
    assert parsed("runs/a", "--n_layer=3", "--record") == expected
    assert parsed("--n-layer", "3", "runs/a", "--record") == expected
    assert parsed("runs/a") == Arguments(place="runs/a")


def test_a_yes_or_no_is_one_flag() -> None:
    with pytest.raises(ConfigurationError, match="--no_record"):
        parsed("runs/a", "--no_record")


def test_what_is_not_given_is_as_the_default_has_it() -> None:
    default = Arguments(place="runs/a", n_layer=5)
    assert parsed("runs/b", default=default) == Arguments(place="runs/b", n_layer=5)
    assert parsed(default=default) == default


MISTAKES = [
    (("runs/a", "--frob=3"), "Unrecognized options: --frob=3"),
    (("runs/a", "--n_layer=many"), "Error parsing --n_layer: invalid literal .* 'many'"),
    (("runs/a", "--n_layer"), "Missing value for argument '--n_layer'"),
    ((), r"Missing from python -m a\.command: .*Path or URL\."),
    (("runs/a", "runs/b"), "Unrecognized options: runs/b"),
    (("runs/a", "--n_layer=0"), "^n_layer must be at least 1; got 0$"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES)
def test_a_mistake_in_the_arguments_is_one_line_of_the_error_and_nothing_else(
    argv: tuple[str, ...], message: str, capsys: Capture
) -> None:
    with pytest.raises(ConfigurationError, match=message) as refused:
        parsed(*argv)
    text = str(refused.value)
    assert text == " ".join(text.split()), "one line, single spaces"
    assert not set(text) & set("\x1b│╭╮╰╯─"), "nothing of a box"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("flags", [("--help",), ("-h",), ("runs/a", "--n_layer=3", "--help")])
def test_help_goes_to_stdout_and_nothing_is_executed(
    flags: tuple[str, ...], capsys: Capture
) -> None:
    assert parsed(*flags) is None
    said = capsys.readouterr()
    for part in ("usage: python -m a.command", "Does it.", "--n_layer INT", "(default: False)"):
        assert part in said.out
    assert said.err == ""

    def execute(arguments: Arguments) -> int:
        raise AssertionError(f"executed: {arguments}")

    assert run(execute, *flags) == 0


@pytest.mark.parametrize("code", [0, 3, 78])
def test_the_exit_code_is_that_of_what_is_executed(code: int, capsys: Capture) -> None:
    heard: list[Arguments] = []

    def execute(arguments: Arguments) -> int:
        heard.append(arguments)
        print("done")
        return code

    assert run(execute, "runs/a", "--n_layer=3") == code
    assert heard == [Arguments(place="runs/a", n_layer=3)]
    assert capsys.readouterr() == ("done\n", "")


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_one_line_and_its_own_exit_code(
    kind: type[RangeFlowError], capsys: Capture
) -> None:
    def execute(arguments: Arguments) -> int:
        raise kind(f"{arguments.place} is not there") from OSError("the cause")

    assert run(execute, "runs/a") == kind.exit_code
    assert capsys.readouterr() == ("", "error: runs/a is not there\n")


def test_a_mistake_in_the_arguments_is_78(capsys: Capture) -> None:
    assert run(lambda arguments: 0, "runs/a", "--frob=3") == 78
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert "--frob=3" in said.err


def test_a_defect_is_not_hidden() -> None:
    def execute(arguments: Arguments) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(execute, "runs/a")


def test_what_the_command_says_on_stderr_is_not_swallowed(capsys: Capture) -> None:
    def execute(arguments: Arguments) -> int:
        sys.stderr.write("a warning\n")
        return 0

    assert run(execute, "runs/a") == 0
    assert capsys.readouterr().err == "a warning\n"


@pytest.mark.parametrize(
    "module",
    ["data_service.prepare", "data_service.verify", "checkpointing.runs", "checkpointing.export"],
)
def test_without_argv_each_command_reads_the_arguments_of_its_process(module: str) -> None:
    """In a terminal of colours and boxes, too, a mistake is one plain line."""
    program = [sys.executable, "-c", PROGRAM.format(module=module), "--frob=3"]
    colours = {**os.environ, "FORCE_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(program, cwd=ROOT, env=colours, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not set(done.stderr) & set("\x1b│╭╮╰╯─")


NOISY = """
import sys
from tests.test_commands import Arguments
from storage.commands import run_command

def execute(arguments):
    for number in range(100_000):
        print(number)
    return 0

sys.exit(run_command(Arguments, execute, None, prog="noisy", description="Prints. " * 20_000))
"""


@pytest.mark.parametrize(("arguments", "code"), [("--help", 0), ("runs/a", 141)])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_that_has_read_enough_ends_the_command_quietly(
    arguments: str, code: int, buffered: str
) -> None:
    """As in `... --help | head -1`, where the pipe is closed while there is more to print."""
    program = [sys.executable, "-c", NOISY, arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": buffered}
    with subprocess.Popen(
        program, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        assert running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait() == code


def test_an_interrupt_is_one_line(capsys: Capture) -> None:
    def execute(arguments: Arguments) -> int:
        raise KeyboardInterrupt

    assert run(execute, "runs/a") == 130
    assert capsys.readouterr() == ("", "error: interrupted\n")
