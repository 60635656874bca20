"""Edits of a plan: what they change, what they leave, and what is refused."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_service.batches import Batches, SampleId
from data_service.edits import MOST_RAMP_STEPS, Edit, edited, parse_edit
from data_service.plan import Plan, PlanSource, Segment
from data_service.shares import PPM, shares_of_steps
from data_service.source import Source
from storage.errors import ConfigurationError
from tests.made_sources import made_source, unwritten_source

B = 4


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("sources")
    sizes = {"a": (300, 90), "b": (200,), "c": (150, 120)}
    return {name: made_source(folder, name, train=train) for name, train in sizes.items()}


def base(**weights: int) -> Plan:
    named = [
        PlanSource(name=name, url=f"/{name}", fingerprint=f"f-{name}", weights=((0, weight),))
        for name, weight in weights.items()
    ]
    return Plan(segments=(Segment(from_step=0, sources=tuple(named)),))


def fingerprint(name: str, url: str) -> str:
    return f"f-{name}"


def after(
    *history: Plan, edit: str, ramp: int = 0, at: int | None = None, earliest: int = 10
) -> Plan:
    what, *items = edit.split()
    asked = parse_edit(what, items, ramp_steps=ramp, at_step=at)
    plan, from_step = edited(history, asked, earliest, fingerprint)
    assert plan.prefix(from_step) == history[-1].prefix(from_step), "the past never changes"
    return plan


def shares(plan: Plan, step: int) -> dict[str, int]:
    segment = next(s for s in reversed(plan.segments) if s.from_step <= step)
    table = shares_of_steps([s.weights for s in segment.sources], step, step + 1)
    names = [source.name for source in segment.sources]
    return {n: share for n, share in zip(names, table[0].tolist(), strict=True) if share}


def test_an_edit_begins_at_the_earliest_step_unless_it_names_a_later_one() -> None:
    plan = base(a=1_000_000)
    assert [s.from_step for s in after(plan, edit="add b=/b").segments] == [0, 10]
    assert [s.from_step for s in after(plan, edit="add b=/b", at=25).segments] == [0, 25]


def test_a_source_is_added_beside_the_others() -> None:
    plan = after(base(a=1_000_000), edit="add b=/x/b:0.25 c=/c:0.25")
    assert shares(plan, 9) == {"a": PPM}
    assert shares(plan, 10) == {"a": 666_666, "b": 166_667, "c": 166_667}
    assert plan.sources["b"].url == "/x/b" and plan.sources["b"].fingerprint == "f-b"


def test_a_ramp_is_linear_in_shares_whatever_the_scale_of_the_weights() -> None:
    """Seen: 1.0 for `a` alone, then 50/30/20; as weights alone the ramp would be over at once."""
    plan = after(base(a=1_000_000), edit="add b=/b:50 c=/c:30", ramp=100)
    end = shares(plan, 110)
    assert end == {"a": 12_345, "b": 617_284, "c": 370_371}
    for step in range(10, 111):
        done = (step - 10) / 100
        found = shares(plan, step)
        for name in "abc":
            start = PPM if name == "a" else 0
            expected = start + done * (end[name] - start)
            assert found.get(name, 0) == pytest.approx(expected, abs=2)


def test_a_ramp_begins_at_the_shares_of_the_moment_also_within_a_ramp() -> None:
    first = after(base(a=1_000_000), edit="add b=/b", ramp=100)
    second = after(base(a=1_000_000), first, edit="remove a", ramp=10, at=60)
    assert shares(second, 60) == pytest.approx({"a": 750_000, "b": 250_000}, abs=1)
    assert shares(second, 65) == pytest.approx({"a": 375_000, "b": 625_000}, abs=2)
    assert shares(second, 70) == {"b": PPM}


def test_an_abrupt_edit_leaves_the_ramps_of_other_sources() -> None:
    first = after(base(a=1_000_000), edit="add b=/b", ramp=100)
    second = after(base(a=1_000_000), first, edit="add c=/c", at=60)
    assert shares(second, 60) == pytest.approx({"a": 500_000, "b": 166_667, "c": 333_333}, abs=2)
    assert shares(second, 110) == pytest.approx({"a": 333_333, "b": 333_333, "c": 333_334}, abs=1)


def test_a_ramp_ends_in_what_is_planned_for_then_and_leaves_the_rest_of_the_plan() -> None:
    """`--weights` may plan far ahead; the whole plan would be over when the edit's ramp is."""
    a, b = base(a=PPM, b=PPM).segments[0].sources
    a = replace(a, weights=((0, PPM), (100, PPM), (200, 0)))
    b = replace(b, weights=((0, 0), (100, 0), (200, PPM)))
    plan = Plan(segments=(Segment(from_step=0, sources=(a, b)),))
    for at in (20, 95, 140, 190):
        ramped = after(plan, edit="add c=/c", ramp=10, at=at)
        at_once = after(plan, edit="add c=/c", at=at)
        assert shares(ramped, at) == pytest.approx(shares(plan, at))
        for step in (at + 10, at + 11, 130, 170, 200, 300):
            if step >= at + 10:
                assert shares(ramped, step) == pytest.approx(shares(at_once, step), abs=2)
        gone = after(plan, at_once, edit="undo", ramp=10, at=at + 1)
        for step in (at + 11, 230):
            assert shares(gone, step) == pytest.approx(shares(plan, step), abs=2)


def test_a_source_is_removed_at_once_or_by_a_ramp() -> None:
    plan = base(a=1_000_000, b=1_000_000)
    at_once = after(plan, edit="remove a")
    assert [source.name for source in at_once.segments[-1].sources] == ["b"]
    ramped = after(plan, edit="remove a", ramp=10)
    assert [shares(ramped, step).get("a", 0) for step in (10, 15, 20)] == [500_000, 250_000, 0]
    later = after(plan, ramped, edit="reweight b=2", at=20)
    assert [source.name for source in later.segments[-1].sources] == ["b"], "it has gone"


def test_a_source_comes_back_under_its_name() -> None:
    gone = after(base(a=1_000_000, b=1_000_000), edit="remove a")
    back = after(gone, edit="add a=/elsewhere", at=30)
    assert back.sources["a"].url == "/elsewhere"
    with pytest.raises(ConfigurationError, match="'a' stands for other data"):
        edited([gone], parse_edit("add", ["a=/other"]), 30, lambda name, url: "f-other")


def test_weights_are_changed_by_name() -> None:
    plan = after(base(a=1_000_000, b=1_000_000), edit="reweight a=0.5 b=1.5")
    assert shares(plan, 10) == {"a": 250_000, "b": 750_000}


def test_two_edits_of_one_step_that_has_not_begun_are_one() -> None:
    plan = base(a=1_000_000)
    first = after(plan, edit="add b=/b")
    second = after(plan, first, edit="add c=/c:2")
    assert [s.from_step for s in second.segments] == [0, 10]
    assert shares(second, 10) == {"a": 250_000, "b": 250_000, "c": 500_000}


def test_what_one_edit_skips_is_skipped_beside_another_of_its_step() -> None:
    plan = base(a=1_000_000)
    first = after(plan, edit="skip 10 15")
    for edit, steps in (("skip 10 17", 12), ("add b=/b", 5)):
        second = after(plan, first, edit=edit)
        assert [s.skip_steps for s in second.segments] == [0, steps]
        assert after(plan, first, second, edit="undo").hash == first.hash


def test_an_edit_waits_for_one_that_is_planned_already() -> None:
    plan = base(a=1_000_000)
    planned = after(plan, edit="add b=/b", at=50)
    assert [s.from_step for s in after(plan, planned, edit="reweight a=2").segments] == [0, 50]
    with pytest.raises(
        ConfigurationError,
        match=r"^the plan changes at step 50 already, .* possible step is 50, or `undo` that edit",
    ):
        after(plan, planned, edit="reweight a=2", at=20)


def test_a_step_that_has_begun_is_refused_with_the_next_possible() -> None:
    plan = base(a=1_000_000)
    refused = "^step 9 has begun; the next possible step is 10$"
    for edit in ("add b=/b", "undo"):
        with pytest.raises(ConfigurationError, match=refused):
            after(plan, after(plan, edit="add b=/b"), edit=edit, at=9)
    with pytest.raises(ConfigurationError, match=refused):
        after(plan, edit="skip 9 12")
    with pytest.raises(ConfigurationError, match=r"step 3 has begun; .* possible step is 50$"):
        after(plan, after(plan, edit="add b=/b", at=50), edit="remove a", at=3)


def test_undo_takes_back_what_has_not_begun_as_if_it_had_never_been() -> None:
    plan = base(a=1_000_000)
    first = after(plan, edit="add b=/b", at=50)
    second = after(plan, first, edit="add c=/c", at=70)
    assert after(plan, first, second, edit="undo").hash == first.hash
    assert after(plan, first, second, edit="undo 2").hash == plan.hash


def test_undo_restores_the_mixture_before_an_edit_that_has_begun() -> None:
    plan = base(a=1_000_000)
    first = after(plan, edit="add b=/b", at=50)
    undone = after(plan, first, edit="undo", earliest=60)
    assert [s.from_step for s in undone.segments] == [0, 50, 60]
    assert [shares(undone, step) for step in (49, 50, 60)] == [
        {"a": PPM},
        {"a": 500_000, "b": 500_000},
        {"a": PPM},
    ]
    again = after(plan, first, undone, edit="undo", earliest=70)
    assert shares(again, 70) == shares(first, 50), "an undo is an edit"


def test_undo_may_go_back_by_a_ramp() -> None:
    plan = base(a=1_000_000)
    first = after(plan, edit="add b=/b", at=50)
    undone = after(plan, first, edit="undo", ramp=10, earliest=60)
    assert [shares(undone, step).get("b", 0) for step in (60, 65, 70)] == [500_000, 250_000, 0]


def test_undo_keeps_edits_planned_before_the_one_that_is_undone() -> None:
    plan = base(a=1_000_000)
    begun = after(plan, edit="add b=/b", at=20)
    planned = after(plan, begun, edit="add c=/c", at=90)
    undone = after(plan, begun, planned, edit="undo 2", earliest=40)
    assert [(s.from_step, len(s.sources)) for s in undone.segments] == [(0, 1), (20, 2), (40, 1)]


def test_what_cannot_be_undone_is_refused() -> None:
    plan = base(a=1_000_000)
    with pytest.raises(ConfigurationError, match="cannot undo 1 edits: the plan was changed 0"):
        after(plan, edit="undo")
    skipped = after(plan, edit="skip 10 20")
    assert after(plan, skipped, edit="undo", earliest=10).hash == plan.hash
    with pytest.raises(ConfigurationError, match="what was skipped stays consumed"):
        after(plan, skipped, edit="undo", earliest=11)


@pytest.mark.parametrize(
    ("edit", "ramp", "message"),
    [
        ("add", 0, "add which source"),
        ("add a=/a", 0, "'a' is in the mixture already; use `reweight`"),
        ("add b", 0, "--data must be NAME=URL"),
        ("add ../b=/b", 0, "a source's name must be"),
        ("add b=/b:-1", 0, "must be from 0 to .* got -1000000"),
        ("add b=/b b=/c", 0, "a source is named twice: b, b"),
        ("remove", 0, "say `remove NAME`"),
        ("remove x", 0, "no source 'x' in the mixture of step 10; there are a"),
        ("remove a", 0, "nothing would be left to train on"),
        ("reweight a=0", 5, "nothing would be left to train on"),
        ("reweight a", 0, "say `reweight NAME=WEIGHT`; got 'a'"),
        ("reweight a=many", 0, "a weight must be a number such as 0.3 or 2; got 'many'"),
        ("reweight a=nan", 0, "a weight must be a number"),
        ("reweight a=-2", 0, "weight of source 'a' at step 10 must be from 0"),
        ("reweight a=1e9", 0, "a weight must be a number"),
        ("reweight a=99999999", 0, "must be from 0 to"),
        ("skip 10", 0, "say `skip FROM TO`"),
        ("skip 10 10", 0, "skip needs FROM and a larger TO; got 10 and 10"),
        ("skip ten 20", 0, "say `skip FROM TO`"),
        ("skip 10 20", 4, "skip changes no weights, so it has no ramp"),
        ("undo 0", 0, "from 1; got 0"),
        ("undo all", 0, "say `undo`, or `undo N`"),
        ("add b=/b", -1, f"a ramp must have from 0 to {MOST_RAMP_STEPS} steps; got -1"),
        ("add b=/b", MOST_RAMP_STEPS + 1, "a ramp must have from 0 to"),
    ],
)
def test_an_edit_that_cannot_be_is_refused(edit: str, ramp: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        after(base(a=1_000_000), edit=edit, ramp=ramp)


def test_an_edit_goes_through_a_request_unchanged() -> None:
    for edit, at in (("add b=gs://x/b:0.5 c=/c", 5), ("remove a", None), ("undo 3", None)):
        what, *items = edit.split()
        asked = parse_edit(what, items, ramp_steps=7, at_step=at)
        assert Edit.from_body(json.loads(json.dumps(asked.to_body()))) == asked
    assert str(parse_edit("add", ["b=/b:0.5"], ramp_steps=7)) == "add b=/b:0.5 over 7 steps"


_BODY = parse_edit("add", ["b=/b"]).to_body()
_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "what": st.sampled_from(["add", "remove", "reweight", "skip", "undo"]) | _ANYTHING,
            "sources": st.lists(st.tuples(_ANYTHING, _ANYTHING, _ANYTHING).map(list)) | _ANYTHING,
            **dict.fromkeys(("ramp_steps", "at_step", "to_step", "count", "x"), _ANYTHING),
        },
    )
)
def test_a_malformed_edit_is_refused_and_nothing_else(changes: dict[str, Any]) -> None:
    try:
        edit = Edit.from_body(_BODY | changes)
        plan, from_step = edited([base(a=1_000_000)], edit, 10, fingerprint)
    except ConfigurationError:
        return
    assert from_step >= 10 and plan.prefix(10) == base(a=1_000_000)


def made(sources: dict[str, Source], plan: Plan) -> Batches:
    return Batches(plan=plan, sources=sources, seed=3, context=8, global_batch_size=B, lanes=3)


@pytest.fixture(scope="module")
def own(sources: dict[str, Source]) -> Callable[[str, int], SampleId]:
    """The nth sample of each source's own sequence, that of a plan in which it is alone."""
    alone = {name: made(sources, planned(sources, [name])) for name in sources}
    samples = {
        name: [s for step in range(120) for s in batches.sample_ids(step)]
        for name, batches in alone.items()
    }
    return lambda name, n: samples[name][n]


def planned(sources: dict[str, Source], names: Sequence[str]) -> Plan:
    chosen = [
        PlanSource(
            name=name,
            url=sources[name].url,
            fingerprint=sources[name].fingerprint,
            weights=((0, PPM),),
        )
        for name in names
    ]
    return Plan(segments=(Segment(from_step=0, sources=tuple(chosen)),))


def test_what_is_skipped_counts_as_consumed(sources: dict[str, Source]) -> None:
    plan = planned(sources, "ab")
    skipped = edited([plan], parse_edit("skip", ["10", "15"]), 10, fingerprint)[0]
    whole, after_skip = made(sources, plan), made(sources, skipped)
    for step in range(11):
        assert after_skip.cursor(step) == whole.cursor(step)
    for step in range(10):
        assert after_skip.sample_ids(step) == whole.sample_ids(step)
    assert after_skip.counts(10) == whole.counts(10), "nothing is skipped before the step"
    for name in "ab":  # each source goes on exactly where step 15 would have been
        own = [
            [s for i in r for s in b.sample_ids(i) if s[0] == name]
            for b, r in ((after_skip, range(10, 30)), (whole, range(15, 40)))
        ]
        assert own[0] == own[1][: len(own[0])] and len(own[0]) > 30
    total = sum(after_skip.counts(12).values())
    assert total == (12 + 5) * B
    assert after_skip.check_cursor(after_skip.cursor(12)) == 12


def test_uses_are_foretold_in_order_and_in_time_also_over_a_skip(
    sources: dict[str, Source],
) -> None:
    plan = planned(sources, "abc")
    plan = edited([plan], parse_edit("skip", ["10", "40"]), 10, fingerprint)[0]
    batches = made(sources, plan)
    told = list(itertools.takewhile(lambda use: use.step < 60, batches.uses(0)))
    assert [use.step for use in told] == sorted(use.step for use in told)
    first: dict[tuple[str, str], int] = {}
    for step in range(60):
        for name, _, shard, _ in batches.sample_ids(step):
            first.setdefault((name, shard), step)
            assert batches.next_use(name, shard, step) <= step
    soonest: dict[tuple[str, str], int] = {}
    for use in told:
        soonest.setdefault((use.source, use.shard), use.step)
    assert all(soonest[key] <= step for key, step in first.items())


def test_no_shard_is_foretold_of_what_is_skipped() -> None:
    sources = {name: unwritten_source(name, train=[90] * 200) for name in "ab"}
    plan = planned(sources, "ab")
    skipped = edited([plan], parse_edit("skip", ["10", "300"]), 10, fingerprint)[0]
    whole, after_skip = made(sources, plan), made(sources, skipped)
    passed = {sample[:3:2] for step in range(20, 290) for sample in whole.sample_ids(step)}
    assert len(passed) > 90
    for start in (5, 10):
        uses = itertools.takewhile(lambda use: use.step <= 10, after_skip.uses(start))
        assert len(list(uses)) <= 2 * 2 * after_skip.lanes, "before the skip, and after it"
        soon = [shard for shard in passed if after_skip.next_use(*shard, start) <= 10]
        assert len(soon) <= 2 * 2 * after_skip.lanes


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["add", "remove", "reweight", "skip", "undo"]),
        st.sampled_from("abc"),
        st.integers(0, 3),
        st.integers(0, 6),  # steps since the edit before
        st.integers(0, 9),  # ramp
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def small_blocks() -> Iterator[None]:
    """A mixture and places are worked out for 64 samples at a time, of which many are looked at."""
    with (
        patch("data_service.mixture.BLOCK", 64),
        patch("data_service.batches._SAMPLES_AT_ONCE", 64),
    ):
        yield


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(edits=EDITS)
@pytest.mark.usefixtures("small_blocks")
def test_any_history_of_edits_keeps_the_past_and_uses_each_sample_once(
    sources: dict[str, Source],
    own: Callable[[str, int], SampleId],
    edits: list[tuple[str, str, int, int, int]],
) -> None:
    history = [planned(sources, "a")]
    now = 1
    for what, name, number, steps, ramp in edits:
        now += steps
        items = {
            "add": [f"{name}=/{name}:{number}"],
            "remove": [name],
            "reweight": [f"{name}={number}"],
            "skip": [str(now), str(now + 1 + number)],
            "undo": [str(number + 1)],
        }[what]
        try:
            asked = parse_edit(what, items, ramp_steps=0 if what == "skip" else ramp)
            plan, from_step = edited(history, asked, now, lambda n, _: sources[n].fingerprint)
        except ConfigurationError:
            continue
        assert from_step >= now
        assert plan.prefix(now) == history[-1].prefix(now)
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
        history.append(plan)
    plan = history[-1]
    skips = {s.from_step: s.skip_steps for s in plan.segments if s.skip_steps}
    batches = made({name: sources[name] for name in plan.sources}, plan)
    end = now + 12
    _check_exactly_once(batches, own, end)
    taken = end + sum(n for step, n in skips.items() if step < end)
    assert sum(batches.counts(end).values()) == taken * B
    _check_bound(plan, end)


def _check_exactly_once(batches: Batches, own: Callable[[str, int], SampleId], end: int) -> None:
    """Each source's samples, with gaps only where steps are skipped, are its own sequence."""
    skips = {segment.from_step for segment in batches.plan.segments if segment.skip_steps}
    position = dict.fromkeys(batches.plan.sources, 0)
    for step in range(end):
        ids = batches.sample_ids(step)
        counts = batches.counts(step + 1)
        if step in skips:
            used = Counter(name for name, *_ in ids)
            passed = {name: counts[name] - used[name] for name in position}
            assert all(passed[name] >= position[name] for name in position)
            position = passed
        for sample in ids:
            assert sample == own(sample[0], position[sample[0]])
            position[sample[0]] += 1
        assert position == counts


def _check_bound(plan: Plan, end: int) -> None:
    """At every prefix of a segment, each source is within 1 - 1/(2K-2) of its exact share."""
    for segment in plan.segments:
        K, steps = len(segment.sources), end - segment.from_step
        if K == 1 or steps < 1:
            continue
        weights = [source.weights for source in segment.sources]
        table = shares_of_steps(weights, segment.from_step, end)
        exact = np.repeat(table, B, axis=0).cumsum(axis=0)
        source, _ = segment.mixture(B).sources_of(0, steps * B)
        counts = (source[:, None] == np.arange(K)).cumsum(axis=0)
        assert np.abs(counts * PPM - exact).max() <= PPM - PPM // (2 * K - 2)


def test_a_plan_that_forgets_its_skips_is_caught(
    sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the counts after a skip."""
    plan = edited([planned(sources, "a")], parse_edit("skip", ["3", "5"]), 3, fingerprint)[0]
    assert sum(made(sources, plan).counts(9).values()) == 11 * B
    object.__setattr__(plan.segments[1], "skip_steps", 0)
    assert sum(made(sources, plan).counts(9).values()) != 11 * B


def test_a_skip_shows_in_the_hash_and_goes_through_json(tmp_path: Path) -> None:
    plan = base(a=1_000_000)
    skipped = after(plan, edit="skip 10 12")
    assert len({plan.hash, skipped.hash, after(plan, edit="skip 10 13").hash}) == 3
    assert Plan.from_json(json.loads(json.dumps(skipped.to_json()))) == skipped
    with pytest.raises(ConfigurationError, match="first segment has no data before it to skip"):
        after(plan, edit="skip 0 5", earliest=0)
