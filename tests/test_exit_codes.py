import pytest

import storage.errors
from launch.exit_codes import COMPLETE, FENCED, INTERNAL, PERMANENT, START_AGAIN, exit_code
from storage.errors import (
    ConfigurationError,
    DataError,
    FencedError,
    IntegrityError,
    NoUsableCheckpointError,
    RangeFlowError,
    RunBusyError,
    StoreUnavailableError,
)


def test_codes_are_those_that_the_supervisors_know() -> None:
    codes = (COMPLETE, INTERNAL, START_AGAIN, FENCED, PERMANENT)
    assert codes == (0, 70, 75, 76, 78)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (ConfigurationError, 78),
        (DataError, 78),
        (NoUsableCheckpointError, 78),
        (IntegrityError, 78),
        (StoreUnavailableError, 75),
        (RunBusyError, 75),
        (FencedError, 76),
        (RangeFlowError, 70),
    ],
)
def test_an_error_for_people_is_one_line_without_a_traceback(
    kind: type[RangeFlowError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        raise kind("what was found") from OSError("the cause")
    except RangeFlowError as error:
        assert exit_code(error) == code
    prefix = "FENCED" if code == 76 else "error"
    assert capsys.readouterr() == ("", f"{prefix}: what was found\n")


@pytest.mark.parametrize("error", [ZeroDivisionError("in step 3"), MemoryError(), OSError("disk")])
def test_a_defect_shows_its_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise error
    except Exception as caught:
        assert exit_code(caught) == 70
    shown = capsys.readouterr().err
    assert "Traceback" in shown and type(error).__name__ in shown and str(error) in shown


def test_the_codes_are_those_that_the_errors_carry() -> None:
    carried = {INTERNAL, START_AGAIN, FENCED, PERMANENT}
    kinds = [kind for kind in vars(storage.errors).values() if isinstance(kind, type)]
    assert {kind.exit_code for kind in kinds} == carried
    assert {exit_code(kind("x")) for kind in kinds} == carried
