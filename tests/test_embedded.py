"""The embedded corpus: real text, prepared once, resumable, whatever Python began it."""

from pathlib import Path

import pytest

import data_service.embedded
from data_service.embedded import embedded_corpus, prepare_embedded
from data_service.inputs import MemoryCorpus
from data_service.source import open_source
from storage.errors import ConfigurationError
from storage.store import open_store


class KilledError(Exception):
    """Raised by an announcement, in place of a kill."""


def contents(folder: Path) -> dict[str, bytes]:
    store = open_store(str(folder))
    return {key: store.get(key) for key in store.list("")}


def test_both_sources_are_made_and_have_enough_held_out(tmp_path: Path) -> None:
    urls = prepare_embedded(f"{tmp_path}/")
    assert urls == {name: f"{tmp_path}/{name}" for name in ("python", "reference")}
    for name, least_tokens in (("python", 3_000_000), ("reference", 300_000)):
        source = open_source(name, urls[name])
        assert sum(entry.tokens for entry in source.shards("train")) > least_tokens
        assert sum(entry.tokens for entry in source.shards("validation")) > 10 * 1024
    before = contents(tmp_path)
    heard: list[str] = []
    assert prepare_embedded(str(tmp_path), announce=heard.append) == urls
    assert heard == []
    assert contents(tmp_path) == before


def test_the_library_has_tabs_and_none_of_what_is_left_out() -> None:
    corpus = embedded_corpus("python")
    names = [item.path for item in corpus.inputs]
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    left_out = ("test/", "encodings/", "idlelib/", "lib2to3/", "pydoc_data/", "site-packages/")
    assert not [name for name in names if name.startswith(left_out) or "_sysconfigdata" in name]
    text = next(
        text
        for unit in corpus.units(10**9)
        for part in unit
        for text in corpus.documents(part)
        if "class ArgumentParser(" in text
    )
    assert "\n\tdef parse_args(" in text
    assert "\n    " not in text


def test_the_reference_has_no_indentation() -> None:
    corpus = embedded_corpus("reference")
    texts = [text for unit in corpus.units(10**9) for p in unit for text in corpus.documents(p)]
    assert len(texts) > 50
    assert not any(line[:1].isspace() for text in texts for line in text.split("\n"))


def test_killed_it_goes_on_and_ends_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {name: embedded_corpus(name) for name in ("python", "reference")}
    some = {
        name: MemoryCorpus(
            [
                (item.path, next(iter(corpus.documents(unit[0]))))
                for item, unit in zip(corpus.inputs, corpus.units(1), strict=False)
            ][:40]
        )
        for name, corpus in small.items()
    }
    monkeypatch.setattr(data_service.embedded, "embedded_corpus", some.__getitem__)
    heard: list[str] = []
    prepare_embedded(str(tmp_path / "whole"), announce=heard.append)

    def kill(phase: str) -> None:
        if phase in ("prepare:unit", "prepare:index"):
            raise KilledError

    with pytest.raises(KilledError):
        prepare_embedded(str(tmp_path / "killed"), announce=kill)
    prepare_embedded(str(tmp_path / "killed"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")

    # What another Python began is done anew, and leaves nothing behind.
    other = {**some, "python": MemoryCorpus([("old.py", "x = 1\n" * 5000)])}
    monkeypatch.setattr(data_service.embedded, "embedded_corpus", other.__getitem__)

    def stop(phase: str) -> None:
        if phase == "prepare:unit-done":
            raise KilledError

    with pytest.raises(KilledError):
        prepare_embedded(str(tmp_path / "other"), announce=stop)
    monkeypatch.setattr(data_service.embedded, "embedded_corpus", some.__getitem__)
    prepare_embedded(str(tmp_path / "other"))
    assert contents(tmp_path / "other") == contents(tmp_path / "whole")


def test_another_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="one of python, reference; got 'perl'"):
        embedded_corpus("perl")
