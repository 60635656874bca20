"""The embedded corpus: two sources from text that every Python has, for a run without data.

`python` is the standard library's sources, with a tab for each four leading spaces; `reference`
is the language reference's topics, without indentation. They differ between Python versions, so a
run prepares them once and reads its own copy from then on.
"""

import importlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from data_service.inputs import MemoryCorpus
from data_service.ledger import BindingError
from data_service.preparation import Advance, prepare
from data_service.shard_writer import Announce
from data_service.source_index import SourceIndex
from data_service.tokenizer import make_tokenizer
from storage.errors import ConfigurationError, DataError
from storage.store import Store, open_store

EMBEDDED_NAMES = ("python", "reference")
EMBEDDED_PERMILLE = 50  # the reference has 0.5 MB: one percent would not be ten long windows

_EXCLUDED_FOLDERS = frozenset(
    ("test", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages")
)
_SHARD_TOKENS = {"python": 1_000_000, "reference": 100_000}


def embedded_corpus(name: str) -> MemoryCorpus:
    """The documents of one of the two embedded sources."""
    makers: dict[str, Callable[[], list[tuple[str, str]]]] = {
        "python": _standard_library,
        "reference": _reference_topics,
    }
    if name not in makers:
        raise ConfigurationError(
            f"the embedded corpus is one of {', '.join(EMBEDDED_NAMES)}; got {name!r}"
        )
    return MemoryCorpus(makers[name]())


def prepare_embedded(
    url: str,
    *,
    announce: Announce = lambda phase: None,
    advance: Advance = lambda size_bytes, tokens, is_new: None,
) -> dict[str, str]:
    """Both sources under `url` (a run's `corpus` folder), bytes tokenizer; their URLs by name.

    What is finished is left as it is, whichever Python made it. What another Python began and did
    not finish is done anew.
    """
    urls = {name: f"{url.rstrip('/')}/{name}" for name in EMBEDDED_NAMES}
    for name, place in urls.items():
        store = open_store(place)
        if "index.json" in store.list("index.json"):
            continue
        try:
            _prepare_one(name, store, announce, advance)
        except BindingError:
            for key in store.list(""):
                store.delete(key)
            _prepare_one(name, store, announce, advance)
    return urls


def _prepare_one(name: str, store: Store, announce: Announce, advance: Advance) -> SourceIndex:
    return prepare(
        embedded_corpus(name),
        store,
        make_tokenizer("bytes"),
        shard_tokens=_SHARD_TOKENS[name],
        validation_permille=EMBEDDED_PERMILLE,
        announce=announce,
        advance=advance,
    )


def _standard_library() -> list[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: list[tuple[str, str]] = []
    for relative in sorted(_library_files(root)):
        try:
            text = (root / relative).read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text:
            texts.append((relative, _with_tabs(text)))
    if not texts:
        raise DataError(
            f"this Python has no library sources in {root}; name your own text with --data"
        )
    return texts


def _library_files(root: Path) -> Iterator[str]:
    """Paths under `root`; what is excluded is not walked: `site-packages` can be very large."""
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _EXCLUDED_FOLDERS]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _with_tabs(text: str) -> str:
    """A tab for each four leading spaces of a line: shorter, and easier to predict."""
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        body = line.lstrip(" ")
        spaces = len(line) - len(body)
        lines.append("\t" * (spaces // 4) + " " * (spaces % 4) + body)
    return "".join(lines)


def _reference_topics() -> list[tuple[str, str]]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise DataError(
            "this Python has no reference topics (pydoc_data); name your own text with --data"
        ) from None
    return [
        (name, "\n".join(line.lstrip() for line in text.split("\n")))
        for name, text in sorted(topics.items())
    ]
