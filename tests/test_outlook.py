"""The numbers of a forecast, by examples that can be counted by hand."""

from typing import Any

import pytest

from data_service.outlook import mixture_rows, rate_of, volume_of, warnings_of
from data_service.plan import Plan, PlanSource, Segment


def outlook(name: str, **changes: Any) -> dict[str, Any]:
    """A source of 100 windows of 10 tokens in 4 shards of 600 bytes, of which half is read."""
    return {
        "source": name,
        "samples": 50,
        "tokens": 500,
        "epochs": 0.5,
        "windows": 100,
        "shards": 4,
        "bytes": 2400,
        "largest_shard_bytes": 600,
        "under_way_bytes": 1200,
        "token_bytes": 2,
        "remote": True,
        **changes,
    }


def plan(*segments: tuple[int, dict[str, tuple[tuple[int, int], ...]]]) -> Plan:
    return Plan(
        segments=tuple(
            Segment(
                from_step=step,
                sources=tuple(
                    PlanSource(name=name, url=name, fingerprint=name, weights=points)
                    for name, points in weights.items()
                ),
            )
            for step, weights in segments
        )
    )


ONE = ((0, 1),)


def test_nothing_is_warned_of_up_to_four_epochs_and_from_twenty_tokens_a_parameter() -> None:
    assert warnings_of([outlook("a", epochs=4.0)], tokens=2000, parameters=100.0) == []
    (line,) = warnings_of([outlook("a", epochs=4.1)], tokens=2000, parameters=None)
    assert line.startswith("source a: each sample comes 4.1 times")
    (line,) = warnings_of([outlook("a")], tokens=1999, parameters=100.0)
    assert line.startswith("20.0 tokens per parameter are fewer than the 20 of Chinchilla")


def test_what_is_downloaded_depends_on_the_room_for_it() -> None:
    local = outlook("c", remote=False)
    sources = [outlook("a"), outlook("b", epochs=3.0), local]
    both = plan((0, {"a": ONE, "b": ONE, "c": ONE}))
    assert volume_of(sources, both) == {
        "bytes": 7200,
        "remote_bytes": 4800,
        "download_bytes": 1200 + 2400,
        "least_cache_download_bytes": 1200 + 7200,
        "least_cache_bytes": 1200 + 1200 + 600,
    }
    one_after_the_other = plan((0, {"a": ONE}), (9, {"b": ONE}))
    assert volume_of(sources, one_after_the_other)["least_cache_bytes"] == 1200 + 600
    assert volume_of([local], plan((0, {"c": ONE})))["least_cache_bytes"] == 0


def test_the_rate_follows_from_the_shares_of_the_tokens() -> None:
    sources = [outlook("a"), outlook("b", tokens=1500, remote=False)]
    found = rate_of(sources, 100.0, tokens=2000, context=10)
    assert found is not None
    assert found["read_bytes_per_second"] == pytest.approx(100 * 2 * 11 / 10)
    assert found["remote_bytes_per_second"] == pytest.approx(25 * 2.4)
    assert found["hours"] == pytest.approx(20 / 3600, rel=1e-3)
    assert rate_of(sources, None, tokens=2000, context=10) is None


def test_shares_are_told_where_they_change() -> None:
    steady = plan((0, {"a": ONE, "b": ((0, 3),)}))
    assert mixture_rows(steady, 1000) == [{"step": 0, "shares": {"a": 250_000, "b": 750_000}}]
    ramp = plan((0, {"a": ((0, 1),), "b": ((100, 0), (180, 1))}))
    rows = mixture_rows(ramp, 1000)
    assert rows[0]["step"] == 0 and rows[-1]["step"] == 180
    assert [row["shares"]["b"] for row in rows] == sorted(row["shares"]["b"] for row in rows)
    edited = plan((0, {"a": ONE}), (40, {"b": ONE}), (60, {"a": ONE}))
    assert [row["step"] for row in mixture_rows(edited, 60)] == [0, 40]
