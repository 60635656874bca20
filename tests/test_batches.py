"""The batch as a pure function: divisions, restarts, edits, cursors, and what is refused."""

import itertools
import json
import uuid
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_service.batches import Batches
from data_service.plan import Plan
from data_service.source import Source, open_source
from data_service.tokenizer import CharacterTokenizer
from storage.canonical import canonical_json, sha256_hex
from storage.errors import ConfigurationError, DataError
from tests.made_sources import made_source, plan_of, segment_of, write_source

RAMP = [[(0, 900_000), (20, 200_000)], [(0, 100_000), (20, 800_000)]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        "code": made_source(folder, "code", train=(400, 33, 250, 9, 3), start=5),
        "web": made_source(folder, "web", train=(901, 700), start=90),
    }


def made(sources: dict[str, Source], plan: Plan | None = None, **changes: object) -> Batches:
    plan = plan or plan_of(list(sources.values()), RAMP)
    options: dict[str, object] = {"seed": 7, "context": 8, "global_batch_size": 6, "lanes": 3}
    return Batches(plan=plan, sources=sources, **(options | changes))  # type: ignore[arg-type]


def test_rows_are_windows_of_the_shards_they_name(sources: dict[str, Source]) -> None:
    batches = made(sources)
    for step in (0, 3, 500):
        batch = batches.batch(step)
        assert batch.shape == (6, 9)
        assert batch.dtype == np.int64
        for row, (name, _, shard, window) in zip(batch, batches.sample_ids(step), strict=True):
            start = window * 8
            assert row.tolist() == sources[name].tokens(shard, start, start + 9).tolist()


@settings(max_examples=40, deadline=None)
@given(step=st.integers(0, 3000), cuts=st.lists(st.integers(0, 6), max_size=5))
def test_any_division_in_rows_gives_the_same_batch(
    sources: dict[str, Source], step: int, cuts: list[int]
) -> None:
    batches = made(sources)
    edges = [0, *sorted(cuts), 6]
    parts = [batches.rows(step, lo, hi) for lo, hi in itertools.pairwise(edges)]
    assert np.array_equal(np.concatenate(parts), batches.batch(step))


def test_steps_asked_in_any_order_by_fresh_objects_are_the_same(
    sources: dict[str, Source],
) -> None:
    in_order = made(sources)
    expected = [in_order.batch(step) for step in range(60)]
    for step in (59, 0, 31, 30, 7):
        assert np.array_equal(made(sources).batch(step), expected[step])
    assert all(np.array_equal(in_order.batch(s), expected[s]) for s in range(59, -1, -1))


def test_a_mirror_read_through_a_store_gives_the_same_batches(
    sources: dict[str, Source],
) -> None:
    place = f"memory://{uuid.uuid4().hex}"
    mirror = open_source("web", write_source(place, train=(901, 700), start=90))
    batches, mirrored = made(sources), made(sources | {"web": mirror})
    for step in (0, 40, 90):
        assert np.array_equal(batches.batch(step), mirrored.batch(step))


def test_each_window_is_consumed_exactly_once_per_epoch(sources: dict[str, Source]) -> None:
    batches = made(sources)
    taken: Counter[tuple[str, int, str, int]] = Counter()
    for step in range(150):
        taken.update(batches.sample_ids(step))
    assert set(taken.values()) == {1}
    counts = batches.counts(150)
    assert sum(counts.values()) == 150 * 6
    for name, windows in batches.windows().items():
        for epoch in range(counts[name] // windows):
            ids = [sample for sample in taken if sample[:2] == (name, epoch)]
            assert len(ids) == windows
        assert sum(1 for sample in taken if sample[0] == name) == counts[name]
        assert counts[name] > windows


def test_the_seed_and_nothing_else_here_changes_the_samples(sources: dict[str, Source]) -> None:
    base = [made(sources).sample_ids(step) for step in range(10)]
    assert [made(sources, seed=8).sample_ids(step) for step in range(10)] != base
    plan = plan_of(list(sources.values()), RAMP)
    reordered = dict(reversed(sources.items()))
    assert [made(reordered, plan).sample_ids(step) for step in range(10)] == base


def own_sequence(batches: Batches, name: str, steps: range) -> list[tuple[str, int, str, int]]:
    return [s for step in steps for s in batches.sample_ids(step) if s[0] == name]


def test_an_edit_leaves_each_sources_own_sequence_going_on(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    extra = made_source(tmp_path, "extra", start=33)
    everything = sources | {"extra": extra}
    code, web = sources["code"], sources["web"]
    base = plan_of([code, web], RAMP)
    edited = (
        base.appended(segment_of([web, extra], from_step=13))
        .appended(segment_of([code, web, extra], from_step=21))
        .appended(segment_of([code], from_step=30))
    )
    plain, after = made(everything, base), made(everything, edited)
    for step in range(13):
        assert np.array_equal(plain.batch(step), after.batch(step))
        assert plain.cursor(step) == after.cursor(step)
    for name in ("code", "web"):
        # Alone in a plan, a source's samples are its own sequence from the start.
        alone = made(everything, plan_of([everything[name]]))
        got = own_sequence(after, name, range(40))
        assert got == own_sequence(alone, name, range(40))[: len(got)]
        assert len(got) > 30
    assert after.counts(13)["code"] == after.counts(21)["code"]
    assert own_sequence(after, "code", range(13, 21)) == []
    for step in range(41):
        assert after.counts(step) == {
            name: len(own_sequence(after, name, range(step))) for name in everything
        }


def test_a_cursor_is_small_json_and_accepted_by_a_fresh_start(
    sources: dict[str, Source],
) -> None:
    for step in (0, 1, 77, 123_456):
        cursor = json.loads(json.dumps(made(sources).cursor(step)))
        assert len(canonical_json(cursor)) < 1024
        assert made(sources).check_cursor(cursor) == step


def test_a_cursor_of_a_dozen_sources_is_under_a_kilobyte(tmp_path: Path) -> None:
    many = {f"source-{n:02d}": made_source(tmp_path, f"source-{n:02d}") for n in range(12)}
    cursor = made(many, plan_of(list(many.values()))).cursor(10**9)
    assert len(canonical_json(cursor)) < 1024


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 8}, "digest"),
        ({"context": 7}, "sources|digest"),
        ({"global_batch_size": 5}, "sources"),
        ({"lanes": 2}, "digest"),
    ],
)
def test_a_cursor_of_other_data_is_refused(
    sources: dict[str, Source], changes: dict[str, object], field: str
) -> None:
    cursor = made(sources).cursor(77)
    with pytest.raises(
        DataError, match=f"does not continue the checkpoint at step 77: its cursor says ({field})"
    ):
        made(sources, **changes).check_cursor(cursor)


def test_a_cursor_of_another_plan_or_damaged_is_refused(sources: dict[str, Source]) -> None:
    cursor = made(sources).cursor(77)
    with pytest.raises(DataError, match="its cursor says plan"):
        made(sources, plan_of(list(sources.values()))).check_cursor(cursor)
    with pytest.raises(DataError, match="its cursor says digest"):
        made(sources).check_cursor({**cursor, "digest": "0" * 64})
    with pytest.raises(DataError, match="its cursor says sources"):
        made(sources).check_cursor({**cursor, "sources": {}})
    with pytest.raises(DataError, match="its step as a whole number, found None"):
        made(sources).check_cursor({})


def test_bookmarks_name_the_files_and_offsets_read_next(sources: dict[str, Source]) -> None:
    batches = made(sources)
    for name, bookmark in batches.bookmarks(9).items():
        assert bookmark["count"] == batches.counts(9)[name]
        following = own_sequence(batches, name, range(9, 40))[:3]
        lanes = bookmark["lanes"]
        assert isinstance(lanes, list)
        told = {(lane["shard"], lane["window"]) for lane in lanes}
        assert told == {(shard, window) for _, _, shard, window in following}
        assert all(lane["token"] == 8 * lane["window"] for lane in lanes)


def test_validation_is_the_same_windows_for_ever(sources: dict[str, Source]) -> None:
    rows = made(sources).validation_rows(12)
    assert {name: some.shape for name, some in rows.items()} == {"code": (12, 9), "web": (12, 9)}
    again = made(sources, seed=99, global_batch_size=3).validation_rows(12)
    everything = made(sources).validation_rows(10**6)
    for name, some in rows.items():
        assert np.array_equal(some, again[name])
        assert len(everything[name]) == (200 - 1) // 8
        tokens = sources[name].tokens("validation-00000", 0, 200).tolist()
        starts = [8 * (index * 24 // 12) for index in range(12)]
        assert some.tolist() == [tokens[start : start + 9] for start in starts]


def test_too_little_held_out_text_is_refused_by_name(tmp_path: Path) -> None:
    few = {"few": made_source(tmp_path, "few", validation=(80,))}
    with pytest.raises(
        DataError, match=r"source 'few' at .* has 9 validation windows of 8 tokens, and needs at le"
    ):
        made(few, plan_of(list(few.values())))


def test_too_little_text_to_train_on_is_refused_by_name(tmp_path: Path) -> None:
    tiny = {"tiny": made_source(tmp_path, "tiny", train=(8, 5))}
    with pytest.raises(DataError, match=r"'tiny' at .* has 13 training tokens .* sequence of 8 \+"):
        made(tiny, plan_of(list(tiny.values())))


def test_a_source_that_is_not_the_plans_is_refused(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    other = made_source(tmp_path, "web", start=1)
    plan = plan_of(list(sources.values()), RAMP)
    with pytest.raises(DataError, match=r"source 'web' at .* is not the data of the plan"):
        made(sources | {"web": other}, plan)
    with pytest.raises(DataError, match=r"names source 'web', which is not among .*\(code\)"):
        made({"code": sources["code"]}, plan)


def test_unlike_tokenizers_are_refused(sources: dict[str, Source], tmp_path: Path) -> None:
    letters = CharacterTokenizer("".join(map(chr, range(260))))
    other = {**sources, "chars": made_source(tmp_path, "chars", tokenizer=letters)}
    with pytest.raises(DataError, match=r"'chars' \(characters\).* have different tokenizers"):
        made(other, plan_of(list(other.values())))


def test_unlike_splits_are_refused(sources: dict[str, Source], tmp_path: Path) -> None:
    """With 10 and 50 permille, a text could be trained on here and held out there."""
    other = {**sources, "wide": made_source(tmp_path, "wide", permille=50)}
    with pytest.raises(DataError, match=r"'code' \(10 permille .*'wide' \(50\) were split diff"):
        made(other, plan_of(list(other.values())))


@pytest.mark.parametrize("name", ["context", "global_batch_size", "lanes"])
def test_a_shape_of_nothing_is_refused(sources: dict[str, Source], name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} must be at least 1, got 0"):
        made(sources, **{name: 0})


def test_rows_outside_the_batch_are_refused(sources: dict[str, Source]) -> None:
    with pytest.raises(IndexError, match="step 4 has no sequences"):
        made(sources).rows(4, 3, 7)
    with pytest.raises(IndexError, match="step -1 has no sequences"):
        made(sources).batch(-1)


def test_the_batches_are_frozen(sources: dict[str, Source]) -> None:
    batches = made(sources)
    data = b"".join(batches.batch(step).astype("<i8").tobytes() for step in range(50))
    assert sha256_hex(data) == "5470c17a1aa3c7da1ebf0f765c3ba5bed5c357bcefcb13fd3b0574e62321524a"
    assert (
        batches.cursor(50)["digest"]
        == "13264276bfd1f49b97988530f4d5de5527f0cb9d64770aab8a7037551b47f93f"
    )
