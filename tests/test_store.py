"""What a URL opens, and which are refused. What every store does: test_store_conformance.py."""

from pathlib import Path

import pytest

from storage.errors import ConfigurationError
from storage.fsspec_store import FsspecStore
from storage.store import LocalStore, open_store


def test_paths_and_file_urls_are_folders(tmp_path: Path) -> None:
    for url in (str(tmp_path), f"file://{tmp_path}", f"local://{tmp_path}"):
        store = open_store(url)
        assert isinstance(store, LocalStore) and store.root == tmp_path
    assert isinstance(open_store("memory://x"), FsspecStore)


def test_a_url_with_credentials_or_of_no_known_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="holds credentials") as error:
        open_store("s3://me:secret@host/bucket")
    assert "secret" not in str(error.value)
    with pytest.raises(ConfigurationError, match=r"has a query \(\?\.\.\.\)") as error:
        open_store("https://host/run?X-Goog-Signature=secret")
    assert "secret" not in str(error.value)
    with pytest.raises(ConfigurationError, match="no store for nosuch:// URLs"):
        open_store("nosuch://place")
    with pytest.raises(ConfigurationError, match="is empty"):
        open_store("")


def test_a_home_that_does_not_exist_and_a_name_that_is_no_text_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="~nobody-has-this-name/x: there is no such user"):
        open_store("~nobody-has-this-name/x")
    with pytest.raises(ConfigurationError, match=r"'runs/bad.udcff' is no text in the encoding"):
        open_store("runs/bad\udcff")
