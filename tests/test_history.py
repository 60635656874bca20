"""What a log means, by examples of logs."""

from typing import Any

from checkpointing.history import history
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
                written_at=0.0,
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
    assert len(past.claim_records) == 1


def test_operators_retire_quarantine_and_verify_without_a_generation() -> None:
    base = (claim(1), commit(1, 10), commit(1, 20))
    assert live(*base, mark("RETIRE", 0, 2)) == [20]
    assert live(*base, mark("QUARANTINE", 0, 3)) == [10]
    assert live(*base, mark("QUARANTINE", 0, 3), mark("VERIFIED", 0, 3)) == [10, 20]
    assert live(*base, mark("RETIRE", 0, 3), mark("VERIFIED", 0, 3)) == [10]


def test_a_stale_incarnation_cannot_retire() -> None:
    assert live(claim(1), commit(1, 10), claim(2), mark("RETIRE", 1, 2)) == [10]


def test_an_end_holds_until_the_next_commit() -> None:
    end: Entry = ("END", 1, {"step": 10, "digest": "d"})
    assert history(records(claim(1), commit(1, 10), end)).end is not None
    assert history(records(claim(1), commit(1, 10), end, claim(2))).end is not None
    assert history(records(claim(1), commit(1, 10), end, commit(1, 20))).end is None
