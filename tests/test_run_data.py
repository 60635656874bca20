"""A run's data, opened from its log, is that of its trainer; what is no run is refused."""

from pathlib import Path

import pytest

from checkpointing.history import history, restated
from checkpointing.incarnation import claim_run
from data_service.run_data import batches_of, moved_sources, open_sources, plans_of, read_log
from data_service.source import Source
from storage.errors import ConfigurationError
from storage.log import Log
from storage.store import LocalStore
from tests.made_data_runs import DataRun
from tests.made_sources import made_source, plan_of, segment_of


@pytest.fixture
def run(tmp_path: Path) -> DataRun:
    sources: dict[str, Source] = {
        name: made_source(tmp_path, name, start=start) for name, start in (("a", 3), ("b", 70))
    }
    return DataRun(str(tmp_path / "run"), sources, plan_of(list(sources.values())))


def test_the_batches_of_the_log_are_those_of_the_run(run: DataRun) -> None:
    run.edit(run.batches.plan.appended(segment_of([run.sources["b"]], from_step=9)))
    log = read_log(run.place)
    recorded = plans_of(log)[-1]
    batches = batches_of(recorded, open_sources(run.place, recorded, {}))
    for step in (0, 8, 9, 500):
        assert (batches.batch(step) == run.batches.batch(step)).all()
        assert batches.cursor(step) == run.batches.cursor(step)
    assert len(plans_of(log)) == 2


def test_how_far_a_run_is_and_goes_is_known_also_behind_a_base(run: DataRun) -> None:
    assert (read_log(run.place).committed_step, read_log(run.place).max_steps) == (0, 400)
    run.save(10, 20)
    run.quarantine(20)
    assert read_log(run.place).committed_step == 10, "a start goes on from there"
    run.owner.append("BASE", lambda records: restated(history(records)))
    log = read_log(run.place)
    assert [record.kind for record in log.records] == ["BASE"]
    assert (log.committed_step, log.max_steps) == (10, 400)


def test_reading_changes_nothing_also_where_nothing_is(run: DataRun, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(run.place).rglob("*")}
    read_log(run.place, whole=True)
    assert {path: path.stat().st_mtime_ns for path in Path(run.place).rglob("*")} == before
    assert read_log(str(tmp_path / "none")).records == ()
    assert not (tmp_path / "none").exists()


def test_a_place_without_a_log_is_no_run(tmp_path: Path) -> None:
    for place in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigurationError, match="holds no run: there is no log"):
            plans_of(read_log(str(place)))


def test_a_log_without_a_plan_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    claim_run(store, Log(store), body={}, take_over=True)
    with pytest.raises(ConfigurationError, match="holds no plan: training records one before"):
        plans_of(read_log(str(tmp_path)))


def test_a_source_is_said_to_have_moved_by_its_name() -> None:
    assert moved_sources(["a=gs://b/a"], ["a", "b"]) == {"a": "gs://b/a"}
    with pytest.raises(ConfigurationError, match="the run's plan has the sources a, b"):
        moved_sources(["c=gs://b/a"], ["a", "b"])


def test_a_source_that_is_not_there_is_an_error(run: DataRun) -> None:
    recorded = plans_of(read_log(run.place))[-1]
    with pytest.raises(ConfigurationError, match="there is no data here"):
        open_sources(run.place, recorded, {"a": "nowhere"})
