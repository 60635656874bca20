"""The plan: what it refuses, its round trip and its hash."""

import json

import pytest

from data_service.plan import DataFlag, Plan, PlanSource, Segment, parse_data_flag
from storage.errors import ConfigurationError, DataError


def source(name: str = "web", *points: tuple[int, int], fingerprint: str = "f0") -> PlanSource:
    return PlanSource(
        name=name, url=f"gs://b/{name}", fingerprint=fingerprint, weights=points or ((0, 10**6),)
    )


def plan(*segments: tuple[int, list[PlanSource]]) -> Plan:
    return Plan(
        segments=tuple(Segment(from_step=s, sources=tuple(sources)) for s, sources in segments)
    )


def test_a_plan_goes_through_json_unchanged() -> None:
    before = plan(
        (0, [source("web"), source("code", (0, 0), (1000, 500_000))]), (50, [source("code")])
    ).with_anchors(16)
    after = Plan.from_json(json.loads(json.dumps(before.to_json())))
    assert after == before
    assert after.hash == before.hash


def test_the_hash_covers_what_decides_and_nothing_else() -> None:
    base = plan((0, [source("a"), source("b")]))
    assert base.hash == plan((0, [source("b"), source("a")])).hash
    moved = PlanSource(name="a", url="/elsewhere", fingerprint="f0", weights=((0, 10**6),))
    assert base.hash == plan((0, [moved, source("b")])).hash
    assert base.hash == base.with_anchors(8).hash
    others = [
        plan((0, [source("a"), source("c")])),
        plan((0, [source("a"), source("b", (0, 1))])),
        plan((0, [source("a"), source("b", (1, 10**6))])),
        plan((0, [source("a"), source("b", fingerprint="f1")])),
        plan((0, [source("a"), source("b")]), (5, [source("a")])),
    ]
    assert len({base.hash, *(other.hash for other in others)}) == 6


def test_a_prefix_does_not_change_when_a_later_segment_is_appended() -> None:
    base = plan((0, [source("a")]))
    longer = base.appended(Segment(from_step=10, sources=(source("b"),)))
    assert longer.prefix(10).hash == base.hash
    assert longer.prefix(11).hash == longer.hash
    assert base.prefix(0) == base


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: source("a", (0, -1)), "weight of source 'a' at step 0 must be from 0 .* got -1"),
        (lambda: source("a", (5, 1), (5, 2)), "must be at ascending steps, got \\[5, 5\\]"),
        (lambda: source("../a"), "a source's name must be .* got '../a'"),
        (lambda: source("a" * 49), "a source's name must be 1 to 48"),
        (lambda: source(""), "a source's name must be"),
        (
            lambda: PlanSource(name="a", url="u", fingerprint="f", weights=()),
            "source 'a' has no weight",
        ),
        (lambda: plan((0, [source("a"), source("a")])), "'a' is given twice"),
        (lambda: plan((0, [])), "at least one source"),
        (lambda: plan((0, [source("a", (0, 0))])), "all sources \\(a\\) are 0 at step 0"),
        (
            lambda: plan((0, [source("a", (0, 1), (9, 0)), source("b", (0, 0))])),
            "are 0 at step 9",
        ),
        (lambda: plan((3, [source("a")])), "first segment must begin at step 0"),
        (lambda: Plan(segments=()), "first segment must begin at step 0"),
        (
            lambda: plan((0, [source("a")]), (7, [source("a")]), (7, [source("a")])),
            "ascending steps, got \\[0, 7, 7\\]",
        ),
        (lambda: Segment(from_step=-1, sources=(source("a"),)), "cannot begin at step -1"),
        (
            lambda: plan((0, [source("a")]), (7, [source("a", fingerprint="f1")])),
            "'a' stands for other data",
        ),
    ],
)
def test_a_bad_plan_is_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()  # type: ignore[operator]


def test_a_weight_of_zero_at_one_point_is_fine_while_another_source_is_above() -> None:
    plan((0, [source("a", (0, 10), (9, 0)), source("b", (0, 0), (9, 5))]))


@pytest.mark.parametrize("value", [None, {}, {"segments": [{"from_step": "0", "sources": []}]}])
def test_json_that_is_no_plan_is_refused(value: object) -> None:
    with pytest.raises(DataError, match="this is no plan"):
        Plan.from_json(value)


def test_damaged_anchors_are_refused() -> None:
    broken = Segment(from_step=0, sources=(source("a"), source("b")), anchors=((0, 0), (1, 2)))
    with pytest.raises(DataError, match=r"segment from step 0: .* not of this mixture"):
        broken.mixture(8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("web=data/web", ("web", "data/web", 1_000_000)),
        ("web=data/web:0.25", ("web", "data/web", 250_000)),
        ("web=gs://bucket/web", ("web", "gs://bucket/web", 1_000_000)),
        ("web=gs://bucket/web:3", ("web", "gs://bucket/web", 3_000_000)),
        ("web=http://host:8080/a=b", ("web", "http://host:8080/a=b", 1_000_000)),
        ("web=http://host:8080/x:.5", ("web", "http://host:8080/x", 500_000)),
    ],
)
def test_a_data_flag_is_name_url_and_weight(text: str, expected: tuple[str, str, int]) -> None:
    name, url, weight = expected
    assert parse_data_flag(text) == DataFlag(name=name, url=url, weight=weight)


@pytest.mark.parametrize("text", ["web", "web=", "=x", "a/b=x"])
def test_a_bad_data_flag_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--data must be NAME=URL|source's name must"):
        parse_data_flag(text)
