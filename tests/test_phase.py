import ast
from collections.abc import Iterator
from pathlib import Path

from launch.hang import OWN_KINDS
from launch.phase import Phase
from launch.time_ledger import PART_OF

ROOT = Path(__file__).resolve().parents[1]

ASIDE = {"save", "retire"}
"""Entered by the saving thread."""
EXPORT = {"export"}
"""Of another program."""
START = {"rendezvous", "open", "claim", "prepare", "restore"}
"""Before the first step: the limit of a start holds."""
STEP = {"step", "micro_batch", "reduce", "update"}


def announced(source: str) -> Iterator[str]:
    """The phases that a module enters, as far as `:`."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        said = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
        if name.lstrip("_") in ("announce", "phase", "aside") and isinstance(said, ast.Constant):
            yield str(said.value).partition(":")[0]


def phases_of_training() -> set[str]:
    packages = ("data_service", "checkpointing", "trainer", "launch")
    modules = [path for package in packages for path in (ROOT / package).glob("*.py")]
    found = {phase for path in modules for phase in announced(path.read_text())}
    assert found >= ASIDE | EXPORT, "the table names what nobody enters"
    return found - ASIDE - EXPORT


def test_every_phase_of_training_has_a_part_of_the_time_or_lies_within_a_step() -> None:
    assert phases_of_training() - STEP == set(PART_OF) - {"step"}


def test_every_phase_between_steps_has_a_limit_of_its_own() -> None:
    assert phases_of_training() - START - STEP == set(OWN_KINDS)


def test_a_phase_is_found_however_it_is_entered() -> None:
    """Negative control: one in no table would be seen."""
    entered = "announce('a'); self._phase('b:c'); around.announce(f'd:{e}'); phase.aside('f')"
    assert list(announced(entered)) == ["a", "b", "d", "f"]


def test_the_listener_hears_every_phase_with_the_finished_steps() -> None:
    heard: list[tuple[str, int]] = []
    phase = Phase(lambda name, step: heard.append((name, step)))
    phase("open")
    phase.step = 3
    phase("step")
    phase("step")
    assert heard == [("open", 0), ("step", 3), ("step", 3)]


def test_the_place_is_already_the_new_one_when_the_listener_is_called() -> None:
    """A heartbeat written by a program that was stopped there must not name the phase before."""
    places: list[tuple[str, int]] = []
    phase = Phase(lambda name, step: places.append(phase.place()))
    phase.step = 7
    phase("save:begin")
    assert places == [("save:begin", 7)]


def test_without_a_listener_it_only_remembers() -> None:
    phase = Phase()
    assert phase.place() == ("start", 0)
    phase("restore")
    assert phase.place() == ("restore", 0)


def test_what_another_thread_enters_is_heard_and_leaves_the_place() -> None:
    heard: list[tuple[str, int]] = []
    phase = Phase(lambda name, step: heard.append((name, step)))
    phase.step = 4
    phase("micro_batch")
    phase.aside("save:object")
    assert heard == [("micro_batch", 4), ("save:object", 4)]
    assert phase.place() == ("micro_batch", 4)
    Phase().aside("save:object")


def test_a_report_hears_what_is_entered_and_nothing_of_other_threads() -> None:
    heard: list[tuple[str, int]] = []
    phase = Phase(report=lambda name, step: heard.append((name, step)))
    phase.step = 2
    phase("step")
    phase.aside("save:object")
    assert heard == [("step", 2)]
