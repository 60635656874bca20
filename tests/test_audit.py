"""The proof from the log: what it accepts, and that each thing that could be wrong is found."""

import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from checkpointing.history import history, restated
from data_service.audit import audit, main
from data_service.batches import Batches
from data_service.edit import main as edit
from data_service.mixture import Mixture
from data_service.plan import Segment
from data_service.recorded import committed_cursor
from data_service.run_data import read_log
from data_service.source import Source
from storage.canonical import canonical_json
from storage.errors import ConfigurationError, DataError
from storage.log import record_key
from tests.made_data_runs import SHAPE, DataRun
from tests.made_sources import made_source, plan_of, segment_of, write_source
from tests.programs import train, train_until_killed

RAMP = [[(0, 900_000), (20, 200_000)], [(0, 100_000), (20, 800_000)]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        "code": made_source(folder, "code", train=(400, 33, 250, 9, 3), start=5),
        "web": made_source(folder, "web", train=(901, 700), start=90),
    }


@pytest.fixture
def run(tmp_path: Path, sources: dict[str, Source]) -> DataRun:
    return DataRun(str(tmp_path / "run"), sources, plan_of(list(sources.values()), RAMP))


def lines(run: DataRun, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, list[str]]:
    capsys.readouterr()
    code = main([run.place, *flags])
    shown = capsys.readouterr()
    assert shown.err == ""
    return code, shown.out.splitlines()


def test_an_unbroken_run_is_proved(run: DataRun, capsys: pytest.CaptureFixture[str]) -> None:
    run.save(10, 60, 150)
    code, shown = lines(run, capsys)
    assert (code, shown[-1]) == (0, "every sample exactly once: proved for steps 0 to 149")
    found = audit(run.place)
    assert found.proved and found.proved_from == 0 and found.violations == ()
    assert {v.source: v.samples for v in found.sources} == run.batches.counts(150)
    assert all(v.exhaustive and v.skipped == 0 for v in found.sources)
    assert all(v.samples > v.windows for v in found.sources), "more than an epoch of each"


def test_starts_edits_and_abandoned_branches_are_proved_and_told(
    run: DataRun, sources: dict[str, Source], capsys: pytest.CaptureFixture[str]
) -> None:
    run.save(10, 20)
    assert run.start() == 20
    first = run.batches.plan
    run.edit(first.appended(segment_of([sources["web"]], from_step=20)))
    run.save(30, 40)
    run.quarantine(40)
    assert run.start() == 30
    run.edit(run.batches.plan.appended(segment_of(list(sources.values()), from_step=33)))
    run.save(41, 90)
    found = audit(run.place)
    assert found.proved and found.edits == 2
    assert [
        (life.generation, life.first_step, life.last_step, life.kept_to, life.thrown_away)
        for life in found.lives
    ] == [(1, 0, 20, 20, 0), (2, 20, 40, 30, 10), (3, 30, 90, 90, 0)]
    code, shown = lines(run, capsys, "--json")
    told = json.loads(shown[0])
    assert code == 0 and told["proved"] and told["steps"] == 90
    assert told["lives"][1]["thrown_away"] == 10


def test_steps_that_an_edit_skips_are_accounted_for(
    run: DataRun, sources: dict[str, Source]
) -> None:
    run.save(10)
    both = segment_of(list(sources.values()), from_step=12)
    skipping = Segment(from_step=12, sources=both.sources, skip_steps=5)
    run.edit(run.batches.plan.appended(skipping))
    run.save(80)
    found = audit(run.place)
    assert found.proved
    assert sum(v.skipped for v in found.sources) == 5 * 6
    assert sum(v.samples for v in found.sources) == 80 * 6


def test_beyond_the_limit_the_arithmetic_is_checked(run: DataRun) -> None:
    run.save(150)
    found = audit(run.place, exhaustive_samples=100)
    assert found.proved and not any(v.exhaustive for v in found.sources)


# What is wrong.


def test_a_cursor_of_another_seed_is_found(run: DataRun) -> None:
    other = batches_of_seed(run, 8)
    run.save(10)
    run.save(20, cursor=committed_cursor(other.cursor(20)))
    found = audit(run.place)
    (wrong,) = found.violations
    assert not found.proved
    assert wrong.startswith(
        "COMMIT record 4 of step 20 was not trained on the batches of PLAN record 2: its cursor "
        "says digest "
    )


def batches_of_seed(run: DataRun, seed: int) -> Batches:
    return Batches(plan=run.batches.plan, sources=run.sources, **{**SHAPE, "seed": seed})


def test_a_cursor_that_skipped_a_step_is_found(
    run: DataRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a trainer whose position runs ahead of its steps would say."""
    run.save(10)
    run.save(20, cursor=committed_cursor(run.batches.cursor(21)))
    code, shown = lines(run, capsys)
    assert code == 1
    assert shown[-1].startswith("every sample exactly once: VIOLATED: COMMIT record 4 of step 20")


def test_a_wrong_cursor_is_found_in_what_was_thrown_away_too(run: DataRun) -> None:
    run.save(10)
    run.save(20, cursor=committed_cursor(run.batches.cursor(21)))
    run.quarantine(20)
    run.start()
    run.save(30)
    (wrong,) = audit(run.place).violations
    assert wrong.startswith("COMMIT record 4 of step 20 was not trained on the batches of PLAN")


def test_a_changed_past_is_found(run: DataRun, sources: dict[str, Source]) -> None:
    run.save(10, 20)
    run.edit(run.batches.plan.appended(segment_of([sources["web"]], from_step=15)))
    run.save(30)
    (wrong,) = audit(run.place).violations
    assert wrong == (
        "PLAN record 5 changes the past: from step 15 on it differs from record 2, and step 20 "
        "was committed before it"
    )


def test_a_checkpoint_before_the_one_it_was_trained_from_is_found(run: DataRun) -> None:
    run.save(20)
    run.start()
    run.save(15)
    (wrong,) = audit(run.place).violations
    assert "of step 15 was trained from record 3 of step 20" in wrong


@pytest.mark.parametrize("limit", [10**6, 100])
@pytest.mark.parametrize("control", ["repeats", "leaves out"])
def test_an_order_that_is_not_once_is_found(control: str, limit: int, run: DataRun) -> None:
    """The negative control: the permutation within a shard is replaced by one that is none."""

    def broken(key: int, count: int) -> object:
        order = np.arange(count, dtype=np.int32)
        if count > 1:
            order[-1] = 0 if control == "repeats" else count
        return order

    with patch("data_service.order.permutation", broken):
        run.save(150)
        found = audit(run.place, exhaustive_samples=limit)
    assert not found.proved
    assert any("source web: epoch 0: " in wrong for wrong in found.violations)


def test_batches_that_are_not_what_the_order_says_are_found(run: DataRun) -> None:
    run.save(60)
    honest = Batches.sample_ids

    def skips(self: Batches, step: int) -> object:
        return honest(self, step + (step == 59))

    with patch.object(Batches, "sample_ids", skips):
        found = audit(run.place)
    assert any("step 59 consumes" in wrong for wrong in found.violations)


def test_a_mixture_that_repeats_a_sample_is_found(run: DataRun) -> None:
    honest = Mixture.sources_of

    def repeats(self: Mixture, lo: int, hi: int) -> object:
        which, ordinals = honest(self, lo, hi)
        return which, np.maximum(0, ordinals - (ordinals == 17))

    with patch.object(Mixture, "sources_of", repeats):
        run.save(60)
        found = audit(run.place)
    assert any("the mixture leaves out or repeats" in wrong for wrong in found.violations)


# What cannot be proved.


def test_records_of_an_earlier_version_are_proved_from_the_first_cursor_on(
    run: DataRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run.save(10, 20, old=True)
    code, shown = lines(run, capsys)
    assert code == 1 and shown[-1].startswith("every sample exactly once: NOT PROVED: the newest")
    run.save(30, 40)
    code, shown = lines(run, capsys)
    assert code == 0
    assert shown[-1] == (
        "every sample exactly once: proved from step 30 on; before it a COMMIT has no cursor: an "
        "earlier version wrote it"
    )


def test_nothing_committed_is_nothing_proved(run: DataRun) -> None:
    found = audit(run.place)
    assert not found.proved and found.verdict == "NOT PROVED: nothing is committed yet"


def damage(run: DataRun, index: int) -> None:
    run.store.put(record_key(index), b"{}")


def test_a_damaged_commit_on_the_way_is_told_and_the_rest_proved(
    run: DataRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run.save(10, 20, 30)
    damage(run, 4)
    code, shown = lines(run, capsys)
    assert code == 0
    assert "damaged records of the log, left out: 4" in shown


def test_a_damaged_parent_leaves_the_beginning_open(run: DataRun) -> None:
    run.save(10)
    run.start()
    run.save(20)
    damage(run, 3)
    found = audit(run.place)
    assert found.verdict == (
        "proved from step 20 on; before it record 3, which it went on from, cannot be read "
        "(damaged: 3)"
    )


def test_a_forged_commit_is_left_out(run: DataRun) -> None:
    """Its own digest is wrong, or the chain is."""
    run.save(10, 20)
    content = json.loads(run.store.get(record_key(4)))
    content["body"]["step"] = 25
    run.store.put(record_key(4), canonical_json(content))
    found = audit(run.place)
    assert 4 in found.damaged and found.steps == 10


def test_a_damaged_edit_is_named_where_the_cursors_differ(
    run: DataRun, sources: dict[str, Source]
) -> None:
    run.save(10)
    run.edit(run.batches.plan.appended(segment_of([sources["web"]], from_step=12)))
    run.save(20)
    damage(run, 4)
    found = audit(run.place)
    assert not found.proved
    assert found.violations[0].endswith("(records 4 cannot be read)")


def test_a_damaged_plan_that_a_base_restates_is_known(run: DataRun) -> None:
    run.save(10, 20)
    run.owner.append("BASE", lambda records: restated(history(records)))
    run.save(30)
    damage(run, 2)
    damage(run, 3)
    assert audit(run.place).proved


def test_a_run_without_a_plan_or_a_log_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none")]) == 78
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (
        f"error: {tmp_path / 'none'} holds no run: there is no log. RUN is the value of --run in "
        "training\n"
    )


def test_a_damaged_only_plan_is_refused(run: DataRun, capsys: pytest.CaptureFixture[str]) -> None:
    run.save(10)
    damage(run, 2)
    assert main([run.place]) == 78
    assert "holds no plan (damaged records: 2)" in capsys.readouterr().err


def test_data_that_is_gone_or_has_changed_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = made_source(tmp_path, "web")
    run = DataRun(str(tmp_path / "run"), {"web": source}, plan_of([source]))
    run.save(10)
    write_source(tmp_path / "web", train=(500, 300))
    assert main([run.place]) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert "source 'web'" in line and "is not the data of the plan" in line


def test_a_source_that_has_moved_is_read_where_it_lies_now(tmp_path: Path) -> None:
    source = made_source(tmp_path, "web")
    run = DataRun(str(tmp_path / "run"), {"web": source}, plan_of([source]))
    run.save(10)
    (tmp_path / "web").rename(tmp_path / "moved")
    with pytest.raises(DataError, match="there is no data here"):
        audit(run.place)
    assert audit(run.place, data=[f"web={tmp_path / 'moved'}"]).proved
    with pytest.raises(ConfigurationError, match="the run's plan has the sources web"):
        audit(run.place, data=[f"books={tmp_path / 'moved'}"])


def test_the_log_is_read_whole_behind_a_base(run: DataRun) -> None:
    run.save(10, 20)
    run.owner.append("BASE", lambda records: restated(history(records)))
    run.save(30)
    assert audit(run.place).commits == 3
    assert len(read_log(run.place).records) == 2


# Real runs.

SHORT = (
    "--max_steps=16",
    "--eval_interval_steps=0",
    "--sample_interval_steps=0",
    "--save_interval_steps=3",
    "--n_embd=32",
    "--n_layer=1",
    "--context=16",
    "--global_batch_size=8",
    "--warmup_steps=2",
    "--wait_for_saves",
)


@pytest.mark.soak
def test_a_run_with_edits_of_the_command_between_kills_is_proved(
    tmp_path: Path, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    train_until_killed("--run", run, *SHORT, *data, phase="step", nth=8)
    assert edit([run, "skip", "8", "10", "--yes"]) == 0
    train_until_killed("--run", run, *SHORT, *data, phase="step", nth=3)
    assert edit([run, "remove", "letters", "--yes", "--at", "13"]) == 0
    train("--run", run, *SHORT, *data)
    capsys.readouterr()
    assert main([run, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["proved_from"] == 0 and told["steps"] == 16 and told["edits"] == 2
    assert sum(v["samples"] for v in told["sources"]) == 16 * 8
    assert sum(v["skipped"] for v in told["sources"]) > 0


def test_a_run_killed_edited_and_moved_between_worlds_is_proved(
    tmp_path: Path, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train_until_killed("--run", run, *SHORT, *data, phase="step", nth=8)
    other = [flag.replace(":2", ":5") for flag in data]
    train_until_killed("--run", run, *SHORT, *other, phase="save:uploaded", nth=2, world=2)
    train("--run", run, *SHORT, *data)
    capsys.readouterr()
    assert main([str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["proved"] and told["proved_from"] == 0 and told["steps"] == 16
    assert told["edits"] == 2
    assert [life["generation"] for life in told["lives"]] == [1, 2, 3]
    assert sum(v["samples"] for v in told["sources"]) == 16 * 8
