import pytest

import storage.errors
from launch.exit_codes import (
    COMPLETE,
    FENCED,
    INTERNAL,
    PERMANENT,
    START_AGAIN,
    exit_code,
    last_words,
    lost_a_peer,
    own_error,
)
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


LOST = (
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:47",
    "[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/device.cc:208] connect",
    "Application timeout caused pair closure; Timed out waiting 1800000ms for recv operation",
    "Connection reset by peer",
)


@pytest.mark.parametrize("message", LOST)
def test_a_lost_peer_is_to_start_again_in_one_line(
    message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = RuntimeError(f"{message}\n  at frame 0")
    assert exit_code(error) == START_AGAIN
    shown = capsys.readouterr().err
    assert shown.startswith("error: another process of the world is gone: ")
    assert shown.count("\n") == 1
    assert own_error(error) is None and last_words(error) == {"lost_a_peer": True}


def test_errors_of_torchs_network_are_lost_peers_and_other_errors_are_not() -> None:
    import torch.distributed as dist

    for kind in (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError):
        assert lost_a_peer(kind("x"))
    assert not lost_a_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lost_a_peer(ConnectionError("Connection reset by peer"))  # not of a collective


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, {}),
        (ZeroDivisionError("in\nstep 3"), {"code": 70, "line": "ZeroDivisionError: in step 3"}),
        (ConfigurationError("x"), {"code": 78, "line": "ConfigurationError: x"}),
        (StoreUnavailableError("x"), {}),
        (RunBusyError("x"), {}),
        (FencedError("x"), {}),
        (KeyboardInterrupt(), {}),
    ],
)
def test_last_words_tell_only_errors_of_the_starts_own(
    error: BaseException | None, said: dict[str, object]
) -> None:
    assert last_words(error) == ({"error": said} if said else {})
