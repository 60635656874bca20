"""The batch as a pure function: divisions, restarts, edits, cursors, and what is refused."""

import itertools
import json
import threading
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_service.batches
import data_service.mixture
from data_service.batches import Batches
from data_service.plan import Plan
from data_service.shares import NEVER, PPM, shares_of_steps
from data_service.source import Source, open_source
from data_service.timeline import Timeline
from data_service.tokenizer import CharacterTokenizer
from storage.canonical import canonical_json, sha256_hex
from storage.errors import ConfigurationError, DataError
from storage.fsspec_store import FsspecStore
from tests.made_sources import (
    made_source,
    plan_of,
    segment_of,
    unwritten_source,
    write_source,
)

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


@settings(max_examples=40, deadline=None)
@given(step=st.integers(0, 3000), few=st.integers(1, 9), cut=st.integers(0, 5))
def test_steps_read_together_are_those_read_alone(
    sources: dict[str, Source], step: int, few: int, cut: int
) -> None:
    batches = made(sources)
    end = min(step + few, batches.steps_together(step, 6 - cut))
    together = batches.rows_of_steps(step, end, cut, 6)
    other = made(sources)
    alone = [other.batch(number)[cut:] for number in range(step, end)]
    assert np.array_equal(together, alone)


def test_steps_read_together_end_where_an_edit_begins(sources: dict[str, Source]) -> None:
    both = [sources["code"], sources["web"]]
    plan = plan_of(both, RAMP).appended(segment_of(both, from_step=13))
    batches = made(sources, plan)
    assert batches.steps_together(11, 6) == 13
    with pytest.raises(IndexError, match=r"steps \[11, 14\) are not read together: ask up to 13"):
        batches.rows_of_steps(11, 14, 0, 6)


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


def test_a_start_reads_its_shards_beside_each_other(tmp_path: Path) -> None:
    class Both(FsspecStore):
        """Gives a shard when another is asked for at the same time; alone, it fails in the end."""

        at_once = threading.Barrier(2)

        def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            if key.startswith("train-") and key.endswith(".npy"):
                self.at_once.wait(60)
            return super().get(key, start, end)

    url = write_source(f"memory://{uuid.uuid4().hex}", train=(400, 400))
    source = open_source("web", url, store=Both(url))
    local = made_source(tmp_path, "web", train=(400, 400))
    rows = made({"web": source}, plan_of([source]), lanes=2).batch(0)
    assert np.array_equal(rows, made({"web": local}, plan_of([local]), lanes=2).batch(0))


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
    for ask in (Batches.batch, Batches.counts, Batches.sources_of, lambda b, s: next(b.uses(s))):
        with pytest.raises(IndexError, match="there is no step -1"):
            ask(made(sources), -1)


def test_a_loss_mask_is_that_of_the_target_of_each_position(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    chat = made_source(tmp_path, "chat", train=(333, 90, 8), masked=True)
    mixed = {"chat": chat, "web": sources["web"]}
    batches = made(mixed, plan_of(list(mixed.values())))
    for step in (0, 7, 31):
        learn, rows = batches.learn(step, 0, 6), batches.batch(step)
        assert learn is not None
        assert learn.dtype == np.bool_
        for name, row, mask in zip(batches.sources_of(step), rows, learn, strict=True):
            expected = row[1:] % 3 == 0 if name == "chat" else np.ones(8, dtype=bool)
            assert mask.tolist() == expected.tolist()
        part = batches.learn(step, 2, 5)
        assert part is not None
        assert np.array_equal(part, learn[2:5])
    assert made(sources).learn(3, 0, 6) is None


def test_held_out_windows_have_their_masks_too(sources: dict[str, Source], tmp_path: Path) -> None:
    chat = made_source(tmp_path, "chat", validation=(90, 8, 61), masked=True)
    mixed = {"web": sources["web"], "chat": chat}
    batches = made(mixed, plan_of(list(mixed.values())))
    rows, learn = batches.validation_rows(11), batches.validation_learn(11)
    assert learn is not None
    assert (learn["chat"].dtype, learn["chat"].shape) == (np.bool_, (11, 8))
    assert np.array_equal(learn["chat"], rows["chat"][:, 1:] % 3 == 0)
    assert learn["web"].shape == rows["web"][:, 1:].shape
    assert learn["web"].all()
    assert made(sources).validation_learn(11) is None


def test_the_sources_of_a_step_are_those_of_its_samples(sources: dict[str, Source]) -> None:
    batches = made(sources)
    for step in (0, 9, 400):
        assert batches.sources_of(step) == [name for name, *_ in batches.sample_ids(step)]


def edited_plan(everything: dict[str, Source]) -> Plan:
    """Three sources that come, go and come back; one is given up, one has a weight of zero."""
    code, web, extra = (everything[name] for name in ("code", "web", "extra"))
    return (
        plan_of([code, web], RAMP)
        .appended(segment_of([web, extra], [[(0, 5)], [(0, 1)]], from_step=13))
        .appended(segment_of([code, web, extra], [[(0, 1)], [(0, 9)], [(0, 0)]], from_step=40))
        .appended(segment_of([code, web], from_step=90))
    )


@contextmanager
def small_blocks() -> Iterator[None]:
    """So that short histories cross many blocks, and take little time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(data_service.mixture, "BLOCK", 64)
        patched.setattr(data_service.batches, "_SAMPLES_AT_ONCE", 32)
        yield


@st.composite
def points(draw: st.DrawFn, from_step: int) -> list[tuple[int, int]]:
    """The weights of a source: constant, a ramp, or up and down; none at all for a while."""
    steps = draw(st.lists(st.integers(from_step, from_step + 40), max_size=3, unique=True))
    weight = st.sampled_from([0, 1, 7, 300_000, 1_000_000]) | st.integers(0, 1_000_000)
    return [(step, draw(weight)) for step in sorted({*steps, from_step})]


@st.composite
def histories(draw: st.DrawFn, sources: Mapping[str, Source]) -> Plan:
    """A plan and edits at random steps: sources come, go, come back and change their weights."""
    plan: Plan | None = None
    from_step = 0
    for _ in range(draw(st.integers(1, 6))):
        names = draw(st.lists(st.sampled_from(sorted(sources)), min_size=1, unique=True))
        weights = [draw(points(from_step)) for _ in names]
        weights[0] = [(from_step, draw(st.integers(1, 1_000_000)))]  # one is always there
        segment = segment_of([sources[name] for name in names], weights, from_step)
        plan = plan.appended(segment) if plan else Plan(segments=(segment,))
        from_step += draw(st.integers(1, 25))
    assert plan is not None
    return plan


TOKENS = {"a": (90, 9, 8, 41), "b": (300,), "c": (17, 17, 17, 17, 17, 17), "d": (150, 33)}
UNWRITTEN = {name: unwritten_source(name, train=train) for name, train in TOKENS.items()}


def check_history(plan: Plan, seed: int, batch: int, lanes: int) -> None:
    """All that a plan edit promises, for one history."""
    end = plan.segments[-1].from_step + 30
    options: dict[str, Any] = {"seed": seed, "global_batch_size": batch, "lanes": lanes}
    batches = made(UNWRITTEN, plan, **options)
    steps = [batches.sample_ids(step) for step in range(end)]

    # The past never changes: each edit's own plan gave the same before the next edit.
    for number, segment in enumerate(plan.segments[1:], 1):
        before = made(UNWRITTEN, Plan(segments=plan.segments[:number]), **options)
        for step in (*range(segment.from_step)[-3:], 0):
            assert before.sample_ids(step) == steps[step]
            assert before.cursor(step) == batches.cursor(step)

    # A source's samples are its own sequence, whatever came between; exactly once an epoch.
    for name in plan.sources:
        own = [sample for samples in steps for sample in samples if sample[0] == name]
        alone = made(UNWRITTEN, plan_of([UNWRITTEN[name]]), **options)
        needed = -(-len(own) // batch)
        assert own == [s for step in range(needed) for s in alone.sample_ids(step)][: len(own)]
        windows = batches.windows()[name]
        for epoch in range(len(own) // windows):
            some = own[epoch * windows : (epoch + 1) * windows]
            assert len(set(some)) == windows
            assert {sample[1] for sample in some} == {epoch}

    # At every prefix of a segment each source is within the bound of its share.
    edges = [*(segment.from_step for segment in plan.segments), end]
    for segment, (first, stop) in zip(plan.segments, itertools.pairwise(edges), strict=True):
        K = len(segment.sources)
        names = [source.name for source in segment.sources]
        weights = [source.weights for source in segment.sources]
        shares = np.repeat(shares_of_steps(weights, first, stop), batch, axis=0).cumsum(axis=0)
        taken = np.array([sample[0] for samples in steps[first:stop] for sample in samples])
        counts = (taken[:, None] == np.array(names)[None, :]).cumsum(axis=0)
        distance = int(np.abs(counts * PPM - shares).max())
        assert distance * (2 * K - 2) <= PPM * (2 * K - 3) if K > 1 else distance == 0


@settings(max_examples=200, deadline=None)
@given(
    plan=histories(UNWRITTEN),
    seed=st.integers(0, 2**40),
    batch=st.integers(1, 7),
    lanes=st.integers(1, 5),
)
def test_edits_leave_the_past_each_sources_sequence_and_the_bound(
    plan: Plan, seed: int, batch: int, lanes: int
) -> None:
    with small_blocks():
        check_history(plan, seed, batch, lanes)


@pytest.mark.soak
@settings(max_examples=1000, deadline=None)
@given(
    plan=histories(UNWRITTEN),
    seed=st.integers(0, 2**40),
    batch=st.integers(1, 7),
    lanes=st.integers(1, 5),
)
def test_a_thousand_histories_leave_them(plan: Plan, seed: int, batch: int, lanes: int) -> None:
    with small_blocks():
        check_history(plan, seed, batch, lanes)


def test_a_source_that_begins_anew_when_it_is_added_again_is_found() -> None:
    """A negative control: counts that an edit forgets."""
    a, b = UNWRITTEN["a"], UNWRITTEN["b"]
    plan = plan_of([a, b]).appended(segment_of([a], from_step=9))
    plan = plan.appended(segment_of([a, b], from_step=13))
    check_history(plan, 1, 4, 2)

    def forget(timeline: Timeline, state: object, step: int) -> dict[str, int]:
        return dict.fromkeys(UNWRITTEN, 0)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Timeline, "_counts_in", forget)
        with pytest.raises(AssertionError):
            check_history(plan, 1, 4, 2)


@settings(max_examples=60, deadline=None)
@given(
    train=st.lists(st.integers(0, 120), min_size=1, max_size=9).filter(lambda t: max(t) > 8),
    context=st.integers(1, 8),
    batch=st.integers(1, 9),
    lanes=st.integers(1, 12),
)
def test_every_target_is_trained_on_exactly_once_an_epoch(
    train: list[int], context: int, batch: int, lanes: int
) -> None:
    """Over shards of any size: too short for a window, with and without a remainder."""
    source = unwritten_source("a", train=train)
    batches = made(
        {"a": source},
        plan_of([source]),
        context=context,
        global_batch_size=batch,
        lanes=lanes,
    )
    windows = batches.windows()["a"]
    steps = -(-2 * windows // batch)
    samples = [sample for step in range(steps) for sample in batches.sample_ids(step)]
    for epoch in range(2):
        targets = Counter(
            (shard, window * context + 1 + place)
            for _, _, shard, window in samples[epoch * windows : (epoch + 1) * windows]
            for place in range(context)
        )
        assert set(targets.values()) == {1}
        for number, tokens in enumerate(train):
            reached = {at for shard, at in targets if shard == f"train-{number:05d}"}
            assert reached == set(range(1, (max(tokens, 1) - 1) // context * context + 1))


@pytest.mark.parametrize("start", [0, 1, 12, 13, 39, 60, 95])
def test_uses_foretell_every_shard_that_is_read(
    sources: dict[str, Source], tmp_path: Path, start: int
) -> None:
    everything = sources | {"extra": made_source(tmp_path, "extra", train=(90, 41, 300))}
    batches = made(everything, edited_plan(everything))
    end = start + 120
    uses = list(itertools.takewhile(lambda use: use.step < end, batches.uses(start)))
    assert [use.step for use in uses] == sorted(use.step for use in uses)
    first_use = {(use.source, use.shard): use.step for use in reversed(uses)}
    first_read: dict[tuple[str, str], int] = {}
    for step in range(start, end):
        for name, _, shard, _ in batches.sample_ids(step):
            first_read.setdefault((name, shard), step)
    for shard_read, step in first_read.items():
        told = batches.next_use(*shard_read, start)
        assert told == first_use[shard_read]
        assert start <= told <= step
        assert step - told <= 1


def test_what_the_plan_never_reads_again_is_used_never(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    everything = sources | {"extra": made_source(tmp_path, "extra")}
    batches = made(everything, edited_plan(everything))
    assert batches.next_use("extra", "train-00000", 500) == NEVER
    assert batches.next_use("code", "train-00004", 0) == NEVER  # too short for a window
    assert batches.next_use("code", "no-such-shard", 0) == NEVER
    later = itertools.islice(batches.uses(500), 200)
    assert {use.source for use in later} == {"code", "web"}


def test_the_batches_are_frozen(sources: dict[str, Source]) -> None:
    batches = made(sources)
    data = b"".join(batches.batch(step).astype("<i8").tobytes() for step in range(50))
    assert sha256_hex(data) == "d6d198c144bb457c566c3920af5ecd9df60174efa64794077c9f7c7b5973c6f9"
    assert (
        batches.cursor(50)["digest"]
        == "dbf431bb73faeed8628c95e57a58ae2d12dd1c17a04f8ff68e114828bc31b991"
    )


def digests(batches: Batches, steps: int = 40) -> list[bytes]:
    return [batches.sample_digest(step) for step in range(steps)]


def test_the_digest_of_a_step_is_of_its_samples_alone(sources: dict[str, Source]) -> None:
    """The same in any order of asking, after edits of later steps, wherever shards lie."""
    batches = made(sources)
    found = digests(batches)
    assert len({*found}) == len(found)
    again = made(sources)
    assert [again.sample_digest(step) for step in reversed(range(40))] == found[::-1]
    last = list(sources.values())[1:]
    edited = made(sources, batches.plan.appended(segment_of(last, from_step=30)))
    assert digests(edited)[:30] == found[:30]
    assert digests(edited)[30:] != found[30:]


def test_the_digest_of_a_step_sees_order_mixture_and_contents(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    found = digests(made(sources), 1)
    others = {
        "seed": made(sources, seed=8),
        "lanes": made(sources, lanes=2),
        "mixture": made(sources, plan_of(list(sources.values()), [[(0, 1)], [(0, 1)]])),
    }
    renamed = {"code": made_source(tmp_path / "a", "code", train=(400, 33, 250, 9, 3), start=6)}
    others["contents"] = made(renamed | {"web": sources["web"]})
    assert [name for name, other in others.items() if digests(other, 1) == found] == []
    same = made_source(tmp_path / "b", "code", train=(400, 33, 250, 9, 3), start=5)
    assert digests(made({"code": same, "web": sources["web"]}), 1) == found


def test_the_digest_of_a_step_sees_two_sequences_exchanged(sources: dict[str, Source]) -> None:
    batches = made(sources)
    before = batches.sample_digest(0)
    [block] = batches._blocks.values()
    for column in block.samples:
        column[[0, 1]] = column[[1, 0]]
    assert batches.sample_digest(0) != before
