"""The tree of errors is as drawn, and each carries the exit code that a restart goes by."""

import re

import pytest

import storage.errors
from storage.errors import RangeFlowError

KINDS = {name: kind for name, kind in vars(storage.errors).items() if isinstance(kind, type)}

CODES = {
    "RangeFlowError": 70,
    "ConfigurationError": 78,
    "DataError": 78,
    "UnlikeHostsError": 78,
    "NoUsableCheckpointError": 78,
    "IntegrityError": 78,
    "StoreUnavailableError": 75,
    "StoreRefusedError": 75,
    "DivergenceError": 75,
    "RunBusyError": 75,
    "StopRequestedError": 75,
    "FencedError": 76,
}
"""As sysexits.h and the contract with the supervisors have them."""


def test_each_error_carries_its_exit_code() -> None:
    assert {name: kind.exit_code for name, kind in KINDS.items()} == CODES


@pytest.mark.parametrize("name", KINDS)
def test_an_error_is_its_message(name: str) -> None:
    """Ranks tell each other an error as its class's name and its text, and nothing else."""
    error = KINDS[name]("what was found")
    assert isinstance(error, RangeFlowError)
    assert (str(error), error.args) == ("what was found", ("what was found",))
    assert error.exit_code == CODES[name]


def test_the_tree_at_the_top_is_true() -> None:
    """Every error is drawn there, below its base, with the exit code that it means."""
    drawing = (storage.errors.__doc__ or "").splitlines()[2:]
    above: list[str] = []
    drawn: dict[str, tuple[str, str | None]] = {}
    for line in drawing:
        indent, name, code = re.findall(r"^([|` -]*)(\w+).*?(?:\(exit (\d+)\))?$", line)[0]
        del above[len(indent) // 4 :]
        base = above[-1] if above else "Exception"
        inherited = drawn[base][1] if base in drawn else None
        drawn[name] = (base, code or inherited)
        above.append(name)
    assert {name: kind.__base__.__name__ for name, kind in KINDS.items()} == {
        name: base for name, (base, _) in drawn.items()
    }
    codes = {name: int(code or 70) for name, (_, code) in drawn.items()}
    assert codes == {name: kind.exit_code for name, kind in KINDS.items()}
