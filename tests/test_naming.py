"""People name a run by its place, and a checkpoint by `latest`, `best` or its step."""

import dataclasses
import json
import re
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.history import Checkpoint, History, history
from checkpointing.naming import RUN_FORMAT, RUN_KEY, chosen, read_run
from storage.errors import ConfigurationError, StoreUnavailableError
from storage.store import Store, open_store

RUN = {"format": 1, "run": "x", "identity": {"seed": 0}}


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    local = request.param == "local"
    return open_store(str(tmp_path / "run") if local else f"memory://{uuid.uuid4().hex}/run")


def test_what_other_versions_wrote_is_found_under_the_same_key() -> None:
    assert (RUN_KEY, RUN_FORMAT) == ("run.json", 1)


def test_a_run_says_its_identifier_and_its_identity(store: Store) -> None:
    more = {**RUN, "note": "of a later version"}
    store.put("run.json", json.dumps(more).encode())
    assert read_run(store) == more


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            "holds no run: there is no run.json. RUN is the value of --run in training; `python "
            "-m checkpointing.runs ls PREFIX` finds runs",
        ),
        (b"{", "run.json is damaged (Expecting property name enclosed in double quotes: "),
        (b"", "run.json is damaged (Expecting value: line 1 column 1 (char 0)); put back a copy"),
        (b"\xff\xfe\x00", "run.json is damaged ('utf-16-le' codec can't decode byte 0x00"),
        (b'{"format":2}', "run.json has format 2, expected 1: it is no run, or one of another"),
        (b'{"run":"x","identity":{}}', "run.json has format None, expected 1: it is no run"),
        (b"[]", "run.json has format None, expected 1"),
        (b'"run"', "run.json has format None, expected 1"),
        (b"null", "run.json has format None, expected 1"),
        (b'{"format":1}' + b" " * 2**20, "run.json is damaged (more than 1048576 bytes); put"),
        (b"[" * 200_000, "run.json is damaged (maximum recursion depth exceeded"),
    ],
)
def test_what_is_not_a_run_is_refused(content: bytes | None, message: str, store: Store) -> None:
    if content is not None:
        store.put("run.json", content)
    with pytest.raises(ConfigurationError, match=re.escape(message)) as refused:
        read_run(store)
    assert str(refused.value).startswith(store.url), "it says which"


@pytest.mark.parametrize(
    "changes",
    [
        *({name: None} for name in RUN),
        *({"identity": value} for value in (3, "seed", [], ["seed"])),
        *({"format": value} for value in (0, 2, "1", [1])),
        *({"run": value} for value in (3, "", "a\x1b[2J", "a\nb", "x" * 101, ["x"])),
    ],
)
def test_a_run_of_another_shape_is_refused_by_name(
    changes: dict[str, object], store: Store
) -> None:
    whole = {**RUN, **changes}
    run = {name: value for name, value in whole.items() if value is not None}
    store.put("run.json", json.dumps(run).encode())
    message = (
        rf"^{re.escape(store.url)}/run\.json (has format .*, expected 1|is damaged \(`run` or)"
    )
    with pytest.raises(ConfigurationError, match=message):
        read_run(store)


@pytest.mark.parametrize("below", ["", "/below", "/below/it"])
def test_a_file_holds_no_run(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"file.* holds no run: there is no run\.json"):
        read_run(open_store(f"{tmp_path}/file{below}"))


def test_looking_for_a_run_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no run"):
        read_run(open_store(str(tmp_path / "typo")))
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_fails_is_not_called_damage(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()  # as good as a disk that fails, and root meets it too
    with pytest.raises(StoreUnavailableError, match=r"run\.json: Is a directory"):
        read_run(open_store(str(tmp_path)))


def checkpoint(index: int, loss: float | None) -> Checkpoint:
    return Checkpoint(
        index=index,
        step=10 * index,
        generation=1,
        digest="",
        manifest_key="",
        manifest_sha256="",
        parent=None,
        healthy=True,
        validation_loss=loss,
        written_at=0.0,
    )


def past_of(*losses: float | None) -> History:
    """A history whose checkpoints, of steps 10, 20, ..., have these validation losses."""
    return with_checkpoints(*(checkpoint(i, loss) for i, loss in enumerate(losses, start=1)))


def with_checkpoints(*found: Checkpoint) -> History:
    return dataclasses.replace(history([]), checkpoints=found)


def test_best_is_the_newest_of_the_lowest_validation_losses() -> None:
    past = past_of(3.0, 1.0, None, 1.0, 2.0)
    assert chosen(past, "best").step == 40
    assert chosen(past, "latest").step == 50
    assert chosen(past, "30").step == 30
    assert chosen(past_of(0.0, 1.0), "best").step == 10


@given(st.lists(st.none() | st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=8))
def test_no_checkpoint_is_better_than_the_best_and_none_newer_than_the_latest(
    losses: list[float | None],
) -> None:
    past = past_of(*losses)
    assert chosen(past, "latest") == past.live[-1]
    for one in past.live:
        assert chosen(past, str(one.step)) == one
    scored = [c for c in past.live if c.validation_loss is not None]
    if not scored:
        with pytest.raises(ConfigurationError, match="so none is best"):
            chosen(past, "best")
        return
    lowest = min(loss for loss in losses if loss is not None)
    assert chosen(past, "best") == [c for c in scored if c.validation_loss == lowest][-1]


@pytest.mark.parametrize("gone", ["retired", "quarantined"])
def test_only_live_checkpoints_have_names(gone: str) -> None:
    old, good, bad = checkpoint(1, 3.0), checkpoint(2, 2.0), checkpoint(3, 1.0)
    past = with_checkpoints(old, good, dataclasses.replace(bad, **{gone: True}))
    assert chosen(past, "latest") == chosen(past, "best") == good
    with pytest.raises(ConfigurationError, match=r"live checkpoints \(10, 20\); got '30'"):
        chosen(past, "30")


def test_a_step_may_be_one_in_quarantine_where_that_is_asked_for() -> None:
    old, held, gone = checkpoint(1, 3.0), checkpoint(2, 2.0), checkpoint(3, 1.0)
    held = dataclasses.replace(held, quarantined=True)
    gone = dataclasses.replace(gone, quarantined=True, retired=True)
    past = with_checkpoints(old, held, gone)
    assert chosen(past, "20", or_quarantined=True) == held
    assert chosen(past, "latest", or_quarantined=True) == old
    again = dataclasses.replace(checkpoint(4, None), step=20)
    assert chosen(with_checkpoints(old, held, again), "20", or_quarantined=True) == again
    for name in ("30", "40"):
        with pytest.raises(ConfigurationError, match=r"live checkpoints \(10\); got"):
            chosen(past, name, or_quarantined=True)


def test_of_two_checkpoints_of_one_step_the_newer_is_meant() -> None:
    first = checkpoint(1, 1.0)
    second = dataclasses.replace(checkpoint(2, 1.0), step=first.step, generation=2)
    past = with_checkpoints(first, second)
    assert chosen(past, "10") == chosen(past, "best") == chosen(past, "latest") == second


@pytest.mark.parametrize(
    ("past", "name", "message"),
    [
        (
            past_of(),
            "latest",
            r"^the run has no live checkpoint yet; `python -m checkpointing\.runs show RUN` lists",
        ),
        (
            past_of(None, None),
            "best",
            r"^no live checkpoint has a validation loss, so none is best; name a step \(10, 20\) "
            "or `latest`$",
        ),
        (
            past_of(1.0),
            "15",
            r"^step must be `best`, `latest` or one of the live checkpoints \(10\); got '15'$",
        ),
        *((past_of(1.0), name, f"got {name!r}") for name in ("newest", "010", "10.0", "-10", "")),
    ],
)
def test_a_checkpoint_that_is_not_there_is_refused(past: History, name: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        chosen(past, name)
