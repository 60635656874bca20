"""What operators can ask of the incarnation that saves."""

from pathlib import Path

import pytest

from checkpointing.asks import KINDS, ask
from storage.errors import ConfigurationError
from storage.requests import Inbox
from storage.store import LocalStore


def test_what_is_asked_is_what_its_owner_finds(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    asked = [(ask(store, kind), kind) for kind in KINDS]
    assert sorted((r.key, r.kind) for r in Inbox(store, KINDS).pending()) == sorted(asked)


def test_only_what_an_owner_knows_can_be_asked(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with pytest.raises(ConfigurationError, match="must be one of save, stop; got 'explode'"):
        ask(store, "explode")
    assert store.list("") == []
