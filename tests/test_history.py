"""What a log means, by examples of logs."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.history import (
    MOST_LIFESPANS,
    History,
    Lifespan,
    history,
    restated,
    without_objects,
)
from storage.canonical import canonical_json
from storage.log import Record

Entry = tuple[str, int, dict[str, Any]]


def records(*entries: Entry) -> list[Record]:
    highest = 0
    made = []
    for index, (kind, generation, body) in enumerate(entries, start=1):
        highest = max(highest, generation)
        made.append(
            Record(
                index=index,
                kind=kind,
                generation=generation,
                highest_generation=highest,
                nonce=str(index),
                previous="",
                voids=(),
                written_at=float(index),
                body=body,
            )
        )
    return made


def claim(generation: int) -> Entry:
    return "CLAIM", generation, {}


def commit(generation: int, step: int) -> Entry:
    return (
        "COMMIT",
        generation,
        {
            "step": step,
            "digest": "d",
            "manifest_key": "k",
            "manifest_sha256": "s",
            "parent": None,
            "healthy": True,
            "validation_loss": None,
        },
    )


def mark(kind: str, generation: int, *indices: int) -> Entry:
    return kind, generation, {"checkpoints": list(indices)}


def live(*entries: Entry) -> list[int]:
    return [c.step for c in history(records(*entries)).live]


def test_commits_of_the_claimant_are_live_in_the_order_of_the_log() -> None:
    assert live(claim(1), commit(1, 10), commit(1, 20)) == [10, 20]
    assert live(claim(1), commit(1, 20), claim(2), commit(2, 10)) == [20, 10]


def test_a_commit_of_a_lower_generation_after_a_claim_does_not_count() -> None:
    assert live(claim(1), commit(1, 10), claim(2), commit(1, 20)) == [10]


def test_a_damaged_claim_is_known_by_what_its_incarnation_wrote() -> None:
    assert live(commit(1, 10)) == [10]
    assert live(claim(1), commit(1, 10), commit(2, 20), mark("RETIRE", 2, 2)) == [20]
    past = history(records(claim(1), commit(2, 20)))
    assert past.generation == 2
    assert past.claim is None, "who owns the run is not known"


def test_a_claim_that_is_not_higher_does_not_count() -> None:
    past = history(records(claim(2), claim(1), commit(2, 10)))
    assert past.claim is not None and past.claim.generation == 2
    assert [c.step for c in past.live] == [10]
    assert [lifespan.generation for lifespan in past.lifespans] == [2]


def test_operators_retire_quarantine_and_verify_without_a_generation() -> None:
    base = (claim(1), commit(1, 10), commit(1, 20))
    assert live(*base, mark("RETIRE", 0, 2)) == [20]
    assert live(*base, mark("QUARANTINE", 0, 3)) == [10]
    assert live(*base, mark("QUARANTINE", 0, 3), mark("VERIFIED", 0, 3)) == [10, 20]
    assert live(*base, mark("RETIRE", 0, 3), mark("VERIFIED", 0, 3)) == [10]


def test_a_cursor_passes_through_a_base_and_old_records_have_none() -> None:
    kind, generation, body = commit(1, 20)
    past = history(
        records(claim(1), commit(1, 10), (kind, generation, {**body, "cursor": {"a": 1}}))
    )
    assert [c.cursor for c in past.checkpoints] == [None, {"a": 1}]
    content = json.loads(json.dumps(past.to_json()))
    assert History.from_json(content) == past
    del content["checkpoints"][0]["cursor"]
    assert History.from_json(content) == past, "a BASE of an earlier version"


def test_a_stale_incarnation_cannot_retire() -> None:
    assert live(claim(1), commit(1, 10), claim(2), mark("RETIRE", 1, 2)) == [10]


def test_an_end_holds_until_the_next_commit() -> None:
    end: Entry = ("END", 1, {"step": 10, "digest": "d"})
    assert history(records(claim(1), commit(1, 10), end)).end is not None
    assert history(records(claim(1), commit(1, 10), end, claim(2))).end is not None
    assert history(records(claim(1), commit(1, 10), end, commit(1, 20))).end is None


def test_what_claims_accepted_holds_from_there_on() -> None:
    changed: Entry = ("CLAIM", 2, {"accepted_changes": {"a": 1, "b": 1}})
    again: Entry = ("CLAIM", 3, {"accepted_changes": {"b": 2}})
    past = history(records(claim(1), changed, commit(2, 10), again))
    assert past.accepted_changes() == {"a": 1, "b": 2}
    assert past.accepted_changes(before=4) == {"a": 1, "b": 1}
    assert past.accepted_changes(before=2) == {}


def test_a_lifespan_lasts_to_the_last_record_of_its_incarnation() -> None:
    end: Entry = ("END", 2, {"step": 10, "digest": "d"})
    base: Entry = ("BASE", 1, restated(History(generation=1)))
    past = history(
        records(claim(1), commit(1, 10), mark("VERIFIED", 0, 2), claim(2), commit(1, 20), end)
    )
    assert past.lifespans == (
        Lifespan(generation=1, claimed_at=1.0, last_sign_at=2.0),
        Lifespan(generation=2, claimed_at=4.0, last_sign_at=6.0, ended=True),
    )
    assert not history(records(claim(2), end, commit(2, 20))).lifespans[0].ended
    assert history(records(claim(1), base)).lifespans == ()


def test_the_newest_lifespans_are_kept() -> None:
    past = history(records(*(claim(n) for n in range(1, 2 * MOST_LIFESPANS))))
    assert [past.lifespans[0].generation, past.lifespans[-1].generation] == [100, 199]
    assert len(past.lifespans) == MOST_LIFESPANS


@st.composite
def logs(draw: st.DrawFn) -> list[Entry]:
    """Records that writers could have put one after another, also stale and damaged ones."""
    entries: list[Entry] = []
    count = draw(st.integers(1, 40))
    for index in range(1, count + 1):
        highest = max((generation for _, generation, _ in entries), default=0)
        generation = draw(st.integers(0, highest + 1))
        some = draw(st.lists(st.integers(1, index), max_size=3))
        entry: Entry = draw(
            st.sampled_from(
                [
                    ("CLAIM", generation, {}),
                    ("CLAIM", highest + 1, {"accepted_changes": {"a": index}, "job": "x"}),
                    commit(generation, index),
                    commit(highest, index),
                    mark("RETIRE", draw(st.sampled_from([0, highest, generation])), *some),
                    mark("QUARANTINE", generation, *some),
                    mark("VERIFIED", generation, *some),
                    ("PLAN", generation, {"plan": [index]}),
                    ("END", highest, {"step": index, "digest": "d"}),
                    ("NOTE", highest, {}),
                ]
            )
        )
        entries.append(entry)
    return entries


def with_base(made: list[Record], place: int, body: dict[str, Any]) -> list[Record]:
    """The records with a BASE of the owner at one place; its index lies between, as it has none."""
    before = made[place - 1]
    base = replace(
        before,
        kind="BASE",
        generation=before.highest_generation,
        voids=(),
        written_at=1e9,
        body=json.loads(canonical_json(body)),
    )
    return [*made[:place], base, *made[place:]]


@given(logs(), st.lists(st.integers(0, 100), max_size=3))
def test_a_history_is_the_same_from_the_beginning_and_from_every_base(
    entries: list[Entry], places: list[int]
) -> None:
    made = records(*entries)
    whole = history(made)
    assert History.from_json(json.loads(canonical_json(whole.to_json()))) == whole
    for place in (1 + place % len(made) for place in places):
        owned = history(made[:place])
        if made[place - 1].highest_generation == 0 or owned.generation == 0:
            continue
        restating = with_base(made, place, restated(owned))
        assert history(restating) == whole
        assert history(restating[place:]) == whole
        made = restating


FIELDS = ["generation", "claim", "changes", "lifespans", "checkpoints", "plans", "end"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_base_that_leaves_something_out_is_found_by_the_comparison(field: str) -> None:
    """The control of the property above: each field of a history is needed in a BASE."""
    changed: Entry = ("CLAIM", 1, {"accepted_changes": {"a": 1}})
    end: Entry = ("END", 1, {"step": 10, "digest": "d"})
    made = records(changed, ("PLAN", 1, {}), commit(1, 10), end, mark("VERIFIED", 0, 3))
    whole = history(made)
    assert all(getattr(whole, name) != getattr(History(), name) for name in FIELDS)
    assert history(with_base(made, 4, restated(history(made[:4])))[4:]) == whole
    lacking = replace(history(made[:4]), **{field: getattr(History(), field)})
    assert history(with_base(made, 4, restated(lacking))[4:]) != whole


def test_a_base_forgets_what_is_retired_and_gone_but_never_the_newest() -> None:
    made = records(
        claim(1),
        *(commit(1, step) for step in (10, 20, 30, 40)),
        mark("QUARANTINE", 0, 3),
        mark("RETIRE", 1, 2, 3, 4, 5),
    )
    past = history(made)
    restating = with_base(made, 7, restated(past, gone={2, 3, 5}))
    assert [c.step for c in history(restating[7:]).checkpoints] == [20, 30, 40]
    assert history(restating) == past, "who reads all forgets nothing"


def test_a_live_checkpoint_is_not_forgotten_whoever_says_that_it_is_gone() -> None:
    past = history(records(claim(1), commit(1, 10), commit(1, 20)))
    assert History.from_json(restated(past, gone={2, 3})["history"]).live == past.live


def test_a_base_brings_back_what_was_damaged_after_it() -> None:
    made = records(claim(1), commit(1, 10), commit(1, 20), commit(1, 30))
    whole = with_base(made, 3, restated(history(made[:3])))
    assert history([r for r in whole if r.index != 2 or r.kind == "BASE"]) == history(made)


def test_a_base_of_a_stale_incarnation_does_not_count() -> None:
    made = records(claim(1), commit(1, 10), claim(2), ("BASE", 1, restated(History(generation=1))))
    assert history(made) == history(made[:3])
    forged = replace(made[3], highest_generation=1)
    assert history([*made[:3], forged]) == history(made[:3])


def test_gone_is_what_is_retired_and_has_no_object_left() -> None:
    made = [
        replace(r, body={**r.body, "manifest_key": f"checkpoints/g0001/s{r.index}/manifest.json"})
        if r.kind == "COMMIT"
        else r
        for r in records(claim(1), *(commit(1, n) for n in range(4)), mark("RETIRE", 1, 2, 3))
    ]
    listed = ["checkpoints/g0001/s3/r000-p00.safetensors", "checkpoints/g0001/s5/manifest.json"]
    assert without_objects(history(made), listed) == {2}
    assert without_objects(history(made), []) == {2, 3}
