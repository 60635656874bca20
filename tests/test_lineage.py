"""Which checkpoints led to the present state, and which plans extend others: examples of logs."""

from dataclasses import replace
from typing import Any

import pytest

from checkpointing.history import history, restated
from data_service.lineage import (
    Life,
    PlanAt,
    first_change,
    lineage,
    plans_in_force,
    wrong_edits,
)
from data_service.plan import Plan, PlanSource, Segment
from data_service.recorded import RecordedPlan
from storage.errors import DataError
from tests.test_history import Entry, claim, mark, records


def commit(generation: int, step: int, parent: int | None = None, digest: str = "d") -> Entry:
    body = {
        "step": step,
        "digest": digest,
        "manifest_key": f"checkpoints/{step}",
        "manifest_sha256": "s",
        "parent": parent,
        "healthy": True,
        "validation_loss": None,
    }
    return "COMMIT", generation, body


def steps(*entries: Entry) -> list[int]:
    return [c.step for c in lineage(records(*entries)).commits]


def lives(*entries: Entry) -> list[tuple[int, int | None, int, int]]:
    return [
        (life.generation, life.first_step, life.last_step, life.kept_to)
        for life in lineage(records(*entries)).lives
    ]


def test_saves_of_one_start_follow_one_another() -> None:
    log = (claim(1), commit(1, 10), commit(1, 20), commit(1, 30))
    assert steps(*log) == [10, 20, 30]
    assert lives(*log) == [(1, 0, 30, 30)]
    assert lineage(records(*log)).whole


def test_a_restart_goes_on_from_its_parent() -> None:
    log = (claim(1), commit(1, 10), commit(1, 20), claim(2), commit(2, 30, parent=3))
    assert steps(*log) == [10, 20, 30]
    assert lives(*log) == [(1, 0, 20, 20), (2, 20, 30, 30)]


def test_what_a_later_start_did_not_go_on_from_was_thrown_away() -> None:
    """Step 20 was found damaged, so steps 10 to 19 were trained again."""
    log = (
        *(claim(1), commit(1, 10), commit(1, 20)),
        *(claim(2), mark("QUARANTINE", 2, 3), commit(2, 15, parent=2), commit(2, 25, parent=2)),
    )
    found = lineage(records(*log))
    assert [c.step for c in found.commits] == [10, 15, 25]
    assert [c.step for c in found.others] == [20]
    assert lives(*log) == [(1, 0, 20, 10), (2, 10, 25, 25)]
    assert [life.thrown_away for life in found.lives] == [10, 0]


def test_a_quarantine_that_is_lifted_brings_a_checkpoint_back() -> None:
    log = (claim(1), commit(1, 10), commit(1, 20), mark("QUARANTINE", 0, 3))
    assert steps(*log) == [10]
    assert steps(*log, mark("VERIFIED", 0, 3)) == [10, 20]


def test_a_start_from_nothing_leaves_what_was_there_before() -> None:
    log = (claim(1), commit(1, 10), claim(2), commit(2, 5))
    assert steps(*log) == [5]
    assert lives(*log) == [(1, 0, 10, 0), (2, 0, 5, 5)]


def test_an_adopted_snapshot_and_what_follows_it_are_of_one_start() -> None:
    log = (claim(1), commit(1, 10), claim(2), commit(2, 14, parent=2), commit(2, 20, parent=4))
    assert steps(*log) == [10, 14, 20]
    assert lives(*log)[1] == (2, 10, 20, 20)


def test_a_stale_commit_is_none() -> None:
    assert steps(claim(1), commit(1, 10), claim(2), commit(1, 20)) == [10]


def test_a_parent_that_cannot_be_read_leaves_the_beginning_open() -> None:
    found = lineage(records(claim(1), commit(2, 30, parent=77), commit(2, 40, parent=77)))
    assert [c.step for c in found.commits] == [30, 40]
    assert not found.whole
    assert found.lives == (Life(generation=2, first_step=None, last_step=40, kept_to=40),)


def test_a_base_tells_of_commits_whose_records_are_damaged() -> None:
    whole = records(claim(1), commit(1, 10), commit(1, 20))
    base: Entry = ("BASE", 1, restated(history(whole)))
    log = records(claim(1), commit(1, 10), commit(1, 20), base, commit(1, 30))
    assert [c.step for c in lineage([*log[:1], *log[3:]]).commits] == [10, 20, 30]


def test_a_log_without_a_checkpoint_has_an_empty_lineage() -> None:
    found = lineage(records(claim(1)))
    assert found.commits == () and found.lives == () and found.whole
    assert lineage([]).commits == ()


@pytest.mark.parametrize(
    "entry",
    [
        ("COMMIT", 1, {"step": "many"}),
        ("COMMIT", 1, {**commit(1, 10)[2], "cursor": "x"}),
        ("COMMIT", 1, {**commit(1, 10)[2], "parent": []}),
        ("RETIRE", 1, {}),
        ("BASE", 1, {"history": []}),
    ],
)
def test_a_record_that_cannot_be_understood_is_named(entry: Entry) -> None:
    with pytest.raises(DataError, match=rf"{entry[0]} record 2 of the log cannot be read"):
        lineage(records(claim(1), entry))


# Plans.


def source(name: str, weight: int = 500_000) -> PlanSource:
    return PlanSource(name=name, url=f"data/{name}", fingerprint=name * 8, weights=((0, weight),))


def plan(*segments: tuple[int, str]) -> Plan:
    """Segments of (first step, names of sources)."""
    return Plan(
        segments=tuple(
            Segment(from_step=step, sources=tuple(map(source, names))) for step, names in segments
        )
    )


def at(index: int, value: Plan, **changes: Any) -> PlanAt:
    last = value.segments[-1].from_step
    shape = {"seed": 1, "context": 8, "global_batch_size": 4, "lanes": 8, "from_step": last}
    return PlanAt(index=index, recorded=RecordedPlan(plan=value, **(shape | changes)))


@pytest.mark.parametrize(
    ("before", "after", "step"),
    [
        (plan((0, "a")), plan((0, "a")), None),
        (plan((0, "a")), plan((0, "a"), (9, "ab")), 9),
        (plan((0, "a"), (9, "ab")), plan((0, "a")), 9),
        (plan((0, "a"), (9, "ab")), plan((0, "a"), (12, "ab")), 9),
        (plan((0, "a"), (9, "ab")), plan((0, "a"), (9, "ac")), 9),
        (plan((0, "a"), (9, "ab")), plan((0, "b"), (9, "ab")), 0),
    ],
)
def test_the_first_step_that_two_plans_decide_differently(
    before: Plan, after: Plan, step: int | None
) -> None:
    assert first_change(before, after) == step
    assert first_change(after, before) == step


def test_a_moved_source_changes_nothing() -> None:
    moved = PlanSource(name="a", url="gs://b/a", fingerprint="a" * 8, weights=((0, 500_000),))
    assert (
        first_change(plan((0, "a")), Plan(segments=(Segment(from_step=0, sources=(moved,)),)))
        is None
    )


def test_other_steps_skipped_are_another_plan() -> None:
    before = plan((0, "a"), (9, "a"))
    first, second = before.segments
    assert first_change(before, Plan(segments=(first, replace(second, skip_steps=5)))) == 9


def edits(*plans: PlanAt, committed: tuple[Entry, ...]) -> list[str]:
    return wrong_edits(plans, lineage(records(*committed)).commits)


COMMITTED = (claim(1), commit(1, 10))
"""Step 10, by record 2."""


def test_an_edit_from_the_committed_step_on_is_right() -> None:
    first = at(1, plan((0, "a")))
    assert edits(first, at(3, plan((0, "a"), (10, "ab"))), committed=COMMITTED) == []
    assert edits(first, at(3, plan((0, "a"), (11, "ab"))), committed=COMMITTED) == []


def test_an_edit_of_a_committed_step_is_wrong() -> None:
    (wrong,) = edits(at(1, plan((0, "a"))), at(3, plan((0, "a"), (9, "ab"))), committed=COMMITTED)
    assert wrong == (
        "PLAN record 3 changes the past: from step 9 on it differs from record 1, and step 10 was "
        "committed before it"
    )


def test_a_changed_past_is_wrong_also_when_the_record_says_otherwise() -> None:
    found = edits(at(1, plan((0, "a"))), at(3, plan((0, "b"), (12, "ab"))), committed=COMMITTED)
    assert len(found) == 2
    assert "from step 0 on it differs" in found[0]
    assert "says that it changes nothing before step 12" in found[1]


def test_another_seed_under_a_committed_step_is_wrong() -> None:
    first = plan((0, "a"))
    (wrong,) = edits(at(1, first), at(3, first, seed=2, lanes=4), committed=COMMITTED)
    assert wrong.startswith("PLAN record 3 changes seed, lanes of the plan in record 1 after step")


def test_an_edit_that_no_committed_step_had_seen_may_be_taken_back() -> None:
    edited = at(3, plan((0, "a"), (12, "ab")))
    assert edits(edited, at(4, plan((0, "a")), from_step=12), committed=COMMITTED) == []


def test_a_plan_is_in_force_from_its_record_on() -> None:
    bodies = [at(0, plan((0, "a"))), at(0, plan((0, "a"), (10, "ab")))]
    entries: list[Entry] = [("PLAN", 1, entry.recorded.to_body()) for entry in bodies]
    found = plans_in_force(records(claim(1), entries[0], commit(1, 10), entries[1]))
    assert [entry.index for entry in found] == [2, 4]
    assert [entry.recorded for entry in found] == [entry.recorded for entry in bodies]
