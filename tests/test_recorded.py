"""What a PLAN record says is read again, also through a BASE, unless its writer was fenced."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from checkpointing.history import history, restated
from checkpointing.incarnation import Incarnation, claim_run
from data_service.plan import Plan, PlanSource, Segment
from data_service.recorded import KIND, RecordedPlan, located, recorded_plans
from storage.errors import DataError
from storage.log import Draft, Log, Record
from storage.store import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def claimed(store: LocalStore) -> Incarnation:
    return claim_run(store, Log(store), body={}, take_over=True)


def recorded(weight: int, edit: dict[str, Any] | None = None) -> RecordedPlan:
    source = PlanSource(name="a", url="run:a", fingerprint="f", weights=((0, weight),))
    later = Segment(from_step=7, sources=(source,), skip_steps=2)
    return RecordedPlan(
        plan=Plan(segments=(Segment(from_step=0, sources=(source,)), later)),
        from_step=7,
        seed=3,
        context=16,
        global_batch_size=8,
        lanes=4,
        started_with="a digest",
        edit=edit,
    )


def append(owner: Incarnation, body: dict[str, Any], kind: str = KIND) -> None:
    owner.append(kind, lambda _: body)


def records(store: LocalStore) -> Sequence[Record]:
    return Log(store).refresh()


def test_what_is_recorded_is_read_again(store: LocalStore) -> None:
    owner = claimed(store)
    plans = [recorded(1), recorded(2, {"request": "requests/x.json", "edit": {"what": "undo"}})]
    for plan in plans:
        append(owner, plan.to_body())
    assert recorded_plans(records(store)) == plans
    assert recorded_plans([]) == []


def test_a_base_restates_the_plans_before_it(store: LocalStore) -> None:
    owner = claimed(store)
    append(owner, recorded(1).to_body())
    append(owner, restated(history(owner.check())), "BASE")
    append(owner, recorded(2).to_body())
    assert records(store)[0].kind == "BASE", "what lies before is not read any more"
    assert recorded_plans(records(store)) == [recorded(1), recorded(2)]
    whole = Log(store, whole=True).refresh()
    assert recorded_plans(whole) == [recorded(1), recorded(2)]


def test_a_plan_of_a_fenced_incarnation_does_not_count(store: LocalStore) -> None:
    append(claimed(store), recorded(1).to_body())
    claimed(store)
    Log(store).append(lambda _: Draft(kind=KIND, generation=1, body=recorded(2).to_body()))
    assert [record.kind for record in records(store)][-1] == KIND
    assert recorded_plans(records(store)) == [recorded(1)]


@pytest.mark.parametrize(
    "change", [{"seed": ...}, {"plan": ...}, {"more": 1}, {"plan": {"segments": 1}}]
)
def test_a_plan_of_another_version_is_an_error(store: LocalStore, change: dict[str, Any]) -> None:
    body = {k: v for k, v in (recorded(1).to_body() | change).items() if v is not ...}
    append(claimed(store), body)
    with pytest.raises(DataError, match=r"is no PLAN of this version|this is no plan"):
        recorded_plans(records(store))


def test_a_source_in_the_run_lies_where_the_run_lies() -> None:
    assert located("gs://bucket/run/", "run:corpus/a") == "gs://bucket/run/corpus/a"
    assert located("gs://bucket/run", "s3://elsewhere/a") == "s3://elsewhere/a"
