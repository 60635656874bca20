"""The ledger: bound to what is prepared, and batches that are done or not."""

from pathlib import Path

import pytest

from data_service.ledger import BINDING_KEY, BindingError, bound_ledger
from storage.store import Store, open_store

BINDING: dict[str, object] = {
    "inputs": [{"path": "a", "size_bytes": 1, "sha256": "0"}],
    "settings": {"shard_tokens": 10, "tokenizer": "bytes"},
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


def test_a_finished_batch_is_known_to_the_next_start(store: Store) -> None:
    first = bound_ledger(store, BINDING)
    assert first.done("unit-3") is None
    first.finish("unit-3", {"train": [1]})
    record = bound_ledger(store, BINDING).done("unit-3")
    assert record is not None
    assert record["train"] == [1]
    assert bound_ledger(store, BINDING).done("unit-4") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"settings": {"shard_tokens": 20, "tokenizer": "bytes"}},
            "other settings: shard_tokens was 10, now 20; prepare into another --out",
        ),
        (
            {"inputs": [{"path": "a", "size_bytes": 1, "sha256": "1"}]},
            "other inputs: a has changed",
        ),
        (
            {"inputs": [{"path": "b", "size_bytes": 1, "sha256": "0"}]},
            "other inputs: a where now b is",
        ),
        ({"inputs": []}, "other inputs: there were 1, now 0"),
    ],
)
def test_another_preparation_in_the_same_place_is_refused(
    store: Store, change: dict[str, object], message: str
) -> None:
    bound_ledger(store, BINDING)
    with pytest.raises(BindingError, match=message):
        bound_ledger(store, {**BINDING, **change})


def test_a_torn_binding_is_written_again(store: Store) -> None:
    store.put(BINDING_KEY, b'{"inputs": [')
    bound_ledger(store, BINDING).finish("unit-0", {})
    assert bound_ledger(store, BINDING).done("unit-0") is not None


def test_a_batch_of_another_binding_is_not_done(store: Store) -> None:
    bound_ledger(store, BINDING).finish("unit-0", {})
    store.delete(BINDING_KEY)
    assert bound_ledger(store, {**BINDING, "inputs": []}).done("unit-0") is None
