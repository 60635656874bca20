import uuid
from pathlib import Path

import pytest

from storage.errors import ConfigurationError
from storage.probe import probe
from storage.store import FsspecStore, LocalStore


def test_stores_that_fence_pass_and_are_left_as_they_were(tmp_path: Path) -> None:
    for store in (LocalStore(tmp_path / "run"), FsspecStore(f"memory://{uuid.uuid4().hex}")):
        probe(store)
        assert store.list("") == []


class Overwrites(LocalStore):
    """A place that ignores the condition, as PyPI's gcp-storage-emulator does."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True


class Lies(LocalStore):
    """A place that says "exists", and overwrites all the same."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        created = super().put_if_absent(key, data)
        self.put(key, data)
        return created


class Forgets(LocalStore):
    """A place whose listing is stale."""

    def list(self, prefix: str, start_after: str = "") -> list[str]:
        return []


@pytest.mark.parametrize("kind", [Overwrites, Lies, Forgets])
def test_a_store_that_cannot_fence_is_refused(kind: type[LocalStore], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot fence"):
        probe(kind(tmp_path))
