"""Workers of a preparation: however many, killed at any phase, the source is the same."""

import os
import random
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import data_service.tasks
from data_service.inputs import FileCorpus
from data_service.preparation import prepare
from data_service.recipe import Recipe
from data_service.tokenizer import make_tokenizer
from data_service.workers import WorkerLostError
from storage.errors import DataError
from storage.store import open_store

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Recipe(shard_tokens=6_000, shuffle=True, deduplicate=True, clean=True)
OPTIONS = (
    *("--shard_tokens", "6000", "--validation_permille", "200"),
    *("--deduplicate", "--clean"),
)
WORDS = ["the", "of", "and", "a", "to", "in", "is", "was", "he", "for", "it", "with", "as", "his"]

PROGRAM = """
import os, signal, sys
from pathlib import Path
from data_service.prepare import main

phase, whom = sys.argv[1:3]

def announce(heard):
    announce.heard.append(heard)
    if heard == phase and announce.heard.count(phase) == 2 - (phase in ONCE):
        us = f"/proc/{os.getpid()}/task/{os.getpid()}/children"
        workers = [int(n) for n in Path(us).read_text().split()]
        print(*workers, flush=True)
        for process in [os.getpid()] if whom == "parent" else workers:
            os.kill(process, signal.SIGKILL)

ONCE = {"prepare:ledger", "prepare:index", "prepare:done", "prepare:swept"}
ONCE |= {"prepare:duplicates", "prepare:duplicates-done"}
announce.heard = []
code = main(sys.argv[3:], announce=announce)
if phase == "listen":
    print(*announce.heard)
sys.exit(code)
"""


def write_texts(folder: Path) -> Path:
    folder.mkdir()
    rng = random.Random(1)
    for number in range(5):
        paragraphs = [" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for _ in range(50)]
        (folder / f"{number}.txt").write_text("\n\n".join(paragraphs))
    (folder / "5.txt").write_text((folder / "2.txt").read_text())
    return folder


def objects(folder: Path) -> dict[str, bytes]:
    store = open_store(str(folder))
    return {key: store.get(key) for key in store.list("")}


def run(folder: Path, out: Path, workers: int, *stop: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *(stop or ("never", "")), str(folder), *OPTIONS]
    return subprocess.run(
        [*command, "--out", str(out), "--workers", str(workers)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "in")


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The objects of an unbroken preparation in one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prepare_here(texts, out)
    return objects(out)


def prepare_here(folder: Path, out: Path, workers: int = 1) -> None:
    prepare(
        FileCorpus([folder]),
        open_store(str(out)),
        make_tokenizer("bytes"),
        recipe=RECIPE,
        validation_permille=200,
        workers=workers,
    )


PHASES = [
    *("prepare:ledger", "prepare:hashes", "prepare:hashes-done", "prepare:duplicates"),
    *("prepare:duplicates-done", "prepare:unit", "prepare:unit-done", "prepare:shard"),
    *("prepare:bucket", "prepare:bucket-done", "prepare:index", "prepare:done", "prepare:swept"),
]
OF_WORKERS = [p for p in PHASES if p.rpartition(":")[2] not in ("ledger", "index", "done", "swept")]


def test_any_number_of_workers_gives_the_same_bytes(
    texts: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    for workers in (2, 3):
        done = run(texts, tmp_path / str(workers), workers, "listen", "")
        assert done.returncode == 0, done.stderr
        assert objects(tmp_path / str(workers)) == whole
        assert set(done.stdout.splitlines()[-1].split()) == set(PHASES)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("workers", [1, 3])
def test_killed_at_any_phase_it_goes_on_and_ends_bit_equal(
    phase: str, workers: int, texts: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    killed = run(texts, tmp_path, workers, phase, "parent")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = [int(n) for n in killed.stdout.split()]
    assert len(left) == (workers if workers > 1 and phase in OF_WORKERS else 0)
    assert not [process for process in left if outlives(process)]
    prepare_here(texts, tmp_path, workers=2 if phase == "prepare:unit" else 1)
    assert objects(tmp_path) == whole


@pytest.mark.parametrize("phase", OF_WORKERS)
def test_killed_workers_are_one_error_and_the_next_start_goes_on(
    phase: str, texts: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    killed = run(texts, tmp_path, 2, phase, "workers")
    assert killed.returncode == 75
    assert killed.stderr.count("error:") == 1
    assert "a worker ended by signal 9" in killed.stderr
    prepare_here(texts, tmp_path)
    assert objects(tmp_path) == whole


def test_without_the_look_for_objects_a_lost_shard_is_not_made_again(
    texts: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of resuming: the ledger alone is not believed."""
    prepare_here(texts, tmp_path)
    store = open_store(str(tmp_path))
    lost = next(key for key in whole if key.startswith("train-"))
    made_again = []
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr(data_service.tasks, "are_there", lambda store, entries: True)
        store.delete(lost)
        store.delete("index.json")
        prepare_here(texts, tmp_path)
        made_again.append(lost in objects(tmp_path))
    assert made_again == [True, False]


def test_with_keys_that_depend_on_the_process_the_bytes_differ(
    texts: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of equality: a shuffle that draws its keys."""
    monkeypatch.setattr(data_service.tasks, "shuffle_key", lambda *place: os.urandom(16))
    prepare_here(texts, tmp_path)
    assert objects(tmp_path) != whole


def test_what_lies_in_memory_is_prepared_in_this_process(texts: Path) -> None:
    store = open_store("memory://workers")
    prepare(FileCorpus([texts]), store, make_tokenizer("bytes"), shard_tokens=6_000, workers=2)
    assert "index.json" in store.list("")


def test_what_a_worker_refuses_is_the_error_of_the_preparation(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "in")
    (folder / "3.txt").write_bytes(b"ok \xff" * 2000)
    with pytest.raises(DataError, match=r"3\.txt: not UTF-8 at byte 3"):
        prepare(
            FileCorpus([folder]),
            open_store(str(tmp_path / "out")),
            make_tokenizer("bytes"),
            shard_tokens=6_000,
            workers=2,
        )


def test_a_worker_that_is_lost_says_how_and_where(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "in")
    before = children()

    def kill(phase: str) -> None:
        if phase == "prepare:unit":
            for child in children() - before:
                os.kill(child, signal.SIGKILL)

    with pytest.raises(WorkerLostError, match=r"ended by signal 9 in unit .*with fewer --workers"):
        prepare(
            FileCorpus([folder]),
            open_store(str(tmp_path / "out")),
            make_tokenizer("bytes"),
            shard_tokens=6_000,
            workers=2,
            announce=kill,
        )
    assert children() <= before


def children() -> set[int]:
    us = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return {int(process) for process in us.read_text().split()}


def outlives(process: int, seconds: float = 30.0) -> bool:
    """Whether a process that may be ending is still there then."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return False
    try:
        return not select.select([descriptor], [], [], seconds)[0]
    finally:
        os.close(descriptor)
