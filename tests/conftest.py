"""Fixtures that more than one test file uses."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from data_service.inputs import MemoryCorpus
from data_service.preparation import prepare
from data_service.tokenizer import make_tokenizer
from storage.store import open_store

LONGEST = (
    *("test_editing", "test_corpus", "test_crash_points", "test_preparation", "test_protocol"),
    *("test_supervised_runs", "test_chaos"),
    *("test_kill", "test_worlds", "test_corruption", "test_store_conformance", "test_bad_input"),
    *("test_several_hosts", "test_tier"),
)
"""Files that take long: begun first, so that the processes that share the tests end together."""


MEMORY = Path("/dev/shm")
MEMORY_BYTES = 4 << 30


def pytest_configure(config: pytest.Config) -> None:
    """Temporary folders lie in memory if there is room: a save syncs files and folders often."""
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= MEMORY_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the others as they are."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags for two small sources of bytes: numbers as digits, and letters at random."""
    folder = tmp_path_factory.mktemp("sources")
    random = np.random.Generator(np.random.PCG64(7))
    numbers = [" ".join(str(n * k) for n in range(400)) for k in range(1, 60)]
    letters = ["".join(random.choice(list("etaoin shrdlu\n"), 2000)) for _ in range(60)]
    for name, texts in (("numbers", numbers), ("letters", letters)):
        documents = [(f"{name}{i}", text) for i, text in enumerate(texts)]
        prepare(
            MemoryCorpus(documents),
            open_store(str(folder / name)),
            make_tokenizer("bytes"),
            shard_tokens=20_000,
            validation_permille=100,
        )
    return (f"--data=numbers={folder}/numbers:2", f"--data=letters={folder}/letters:1")


class Interrupted(BaseException):
    """Raised by a listener to leave the program in the middle; no kill, and not called one."""


@pytest.fixture
def interrupt() -> Callable[[str, int], Callable[[str, int], None]]:
    """A listener that leaves the program when it enters a phase for the nth time."""

    def make(phase: str, nth: int) -> Callable[[str, int], None]:
        entered = 0

        def listener(name: str, step: int) -> None:
            nonlocal entered
            entered += name == phase
            if name == phase and entered == nth:
                raise Interrupted

        return listener

    return make


@pytest.fixture(autouse=True)
def same_process() -> Iterator[None]:
    """The program sets the number of threads and the root logger; a test leaves them as before."""
    with as_before():
        yield


@pytest.fixture(autouse=True, scope="module")
def same_process_after_the_module() -> Iterator[None]:
    """What its fixtures changed, too, which are made before a test's own are."""
    with as_before():
        yield


@contextmanager
def as_before() -> Iterator[None]:
    """Number of threads and root logger are at the end what they were at the beginning."""
    threads, root = torch.get_num_threads(), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    torch.set_num_threads(threads)
    root.handlers[:] = handlers
    root.setLevel(level)
