"""Preparation: all that goes in comes out, killed or not, and duplicates stay on one side."""

import hashlib
import logging
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_service.inputs import FileCorpus, MemoryCorpus
from data_service.preparation import passes_of, prepare
from data_service.recipe import Recipe
from data_service.source import Source, open_source
from data_service.source_index import SPLITS
from data_service.tokenizer import CharacterTokenizer, Tokenizer, make_tokenizer
from data_service.validation_split import ValidationStamp, pieces, split_document
from storage.errors import ConfigurationError, DataError, StoreUnavailableError
from storage.store import open_store

ROOT = Path(__file__).resolve().parents[1]
SHAKESPEARE = ROOT.parent / "shared" / "corpus" / "shakespeare"
WORDS = (
    *("the", "of", "and", "a", "to", "in", "is", "was", "he", "for", "it", "with", "as", "his"),
    *("on", "be", "at", "by", "I", "this", "had", "not", "are", "but"),
)


def prose(seed: int, paragraphs: int) -> str:
    rng = random.Random(seed)
    return "\n\n".join(
        " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 60))) for _ in range(paragraphs)
    )


CORPUS = MemoryCorpus([(f"d{n}", prose(n, 3 + 40 * (n % 3))) for n in range(12)])
OPTIONS = {"shard_tokens": 9_000, "validation_permille": 200}


class KilledError(Exception):
    """Raised by an announcement, in place of a kill."""


def objects(folder: Path) -> dict[str, bytes]:
    store = open_store(str(folder))
    return {key: store.get(key) for key in store.list("")}


def documents(source: Source, split: str) -> list[str]:
    """The documents of a split, read back through the shards and their ends."""
    shards = source.shards(split)
    tokens = [source.tokens(entry.name, 0, entry.tokens) for entry in shards]
    starts = np.cumsum([0, *(part.size for part in tokens)])
    ends = [source.ends(e.name) + at for e, at in zip(shards, starts[:-1], strict=True)]
    whole, cuts = np.concatenate(tokens), np.concatenate(ends)
    assert (whole[cuts - 1] == source.tokenizer.end_of_text).all()
    assert (whole == source.tokenizer.end_of_text).sum() == cuts.size
    parts = np.split(whole, cuts)[:-1]
    return [source.tokenizer.decode(part[:-1].astype(np.int64)) for part in parts]


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_every_text_is_in_the_source_on_its_own_side(tmp_path: Path, kind: str) -> None:
    texts = [text for unit in CORPUS.units(10**6) for p in unit for text in CORPUS.documents(p)]
    tokenizer: Tokenizer = (
        CharacterTokenizer.of_texts(texts) if kind == "characters" else make_tokenizer(kind)
    )
    prepare(CORPUS, open_store(str(tmp_path)), tokenizer, **OPTIONS)  # type: ignore[arg-type]
    source = open_source("a", str(tmp_path))
    stamp = ValidationStamp(permille=200)
    for split in SPLITS:
        expected = [
            part for text in texts for side, part in split_document(text, stamp) if side == split
        ]
        assert documents(source, split) == expected
        assert max(entry.tokens for entry in source.shards(split)) <= 9_000
        assert sum(entry.documents for entry in source.shards(split)) == len(expected)


def test_killed_at_any_announcement_it_ends_bit_equal(tmp_path: Path) -> None:
    heard: list[str] = []
    prepare(
        CORPUS,
        open_store(str(tmp_path / "whole")),
        make_tokenizer("bytes"),
        announce=heard.append,
        **OPTIONS,  # type: ignore[arg-type]
    )
    assert {"prepare:ledger", "prepare:shard", "prepare:unit", "prepare:unit-done"} < set(heard)
    assert heard[-2:] == ["prepare:index", "prepare:done"]
    whole = objects(tmp_path / "whole")
    for at in range(len(heard)):
        folder = tmp_path / f"killed-{at}"
        left = [at]

        def kill(phase: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KilledError(phase)

        store = open_store(str(folder))
        with pytest.raises(KilledError):
            prepare(CORPUS, store, make_tokenizer("bytes"), announce=kill, **OPTIONS)  # type: ignore[arg-type]
        assert ("index.json" in objects(folder)) == (heard[at] == "prepare:done")
        again: list[str] = []
        prepare(CORPUS, store, make_tokenizer("bytes"), announce=again.append, **OPTIONS)  # type: ignore[arg-type]
        assert objects(folder) == whole
        done = heard[: at + 1].count("prepare:unit-done")
        if heard[at] != "prepare:done":
            assert again.count("prepare:unit") == heard.count("prepare:unit") - done


def test_killed_at_every_announcement_in_turn_it_still_ends_bit_equal(tmp_path: Path) -> None:
    whole, store = open_store(str(tmp_path / "a")), open_store(str(tmp_path / "b"))
    prepare(CORPUS, whole, make_tokenizer("bytes"), **OPTIONS)  # type: ignore[arg-type]
    kills = 0
    while True:
        seen: list[str] = []

        def kill(phase: str, seen: list[str] = seen) -> None:
            seen.append(phase)
            if phase in ("prepare:unit-done", "prepare:done"):
                raise KilledError

        try:
            prepare(CORPUS, store, make_tokenizer("bytes"), announce=kill, **OPTIONS)  # type: ignore[arg-type]
        except KilledError:
            kills += 1
        else:
            break
    assert kills > 3
    assert objects(tmp_path / "a") == objects(tmp_path / "b")


PROGRAM = """
import signal, sys
from data_service.prepare import main

def announce(phase):
    print(phase, flush=True)
    if phase == sys.argv[1] and int(sys.argv[2]) == announce.heard:
        signal.pause()
    announce.heard += phase == sys.argv[1]

announce.heard = 0
sys.exit(main(sys.argv[3:], announce=announce))
"""


@pytest.mark.parametrize(("phase", "heard"), [("prepare:unit", 2), ("prepare:index", 0)])
def test_a_process_killed_for_real_goes_on_and_ends_bit_equal(
    tmp_path: Path, phase: str, heard: int
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / "in" / f"{number}.txt").write_text(prose(number, 60))
    options = ["--shard_tokens", "9000", "--validation_permille", "200"]

    def start(out: str, stop_at: str, count: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, stop_at, str(count), str(tmp_path / "in")]
        return subprocess.Popen(
            [*command, "--out", str(tmp_path / out), *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )

    with start("killed", phase, heard) as process:
        assert process.stdout is not None
        seen = 0
        for line in process.stdout:
            seen += line.strip() == phase
            if seen > heard:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    assert "index.json" not in objects(tmp_path / "killed")
    for out in ("killed", "whole"):
        with start(out, "never", 0) as process:
            process.communicate(timeout=60)
        assert process.returncode == 0
    assert objects(tmp_path / "killed") == objects(tmp_path / "whole")


def held_out_and_trained(sources: list[Source]) -> tuple[set[str], set[str]]:
    sides: dict[str, set[str]] = {split: set() for split in SPLITS}
    for source in sources:
        for split in SPLITS:
            for text in documents(source, split):
                sides[split].update(normalised for _, normalised in pieces(text))
    return sides["validation"], sides["train"]


def test_a_duplicate_is_never_on_both_sides_of_two_sources(tmp_path: Path) -> None:
    rng = random.Random(1)
    shared = [prose(seed, rng.choice([2, 40])) for seed in range(120)]
    one = MemoryCorpus([(f"a{n}", text) for n, text in enumerate(shared)])
    two = MemoryCorpus(
        [(f"b{n}", text.upper() + " \n") for n, text in enumerate(shared[::-1])]
        + [(f"c{n}", prose(1000 + n, 3)) for n in range(100)]
    )
    for name, corpus in (("one", one), ("two", two)):
        prepare(corpus, open_store(str(tmp_path / name)), make_tokenizer("bytes"), **OPTIONS)  # type: ignore[arg-type]
    sources = [open_source(name, str(tmp_path / name)) for name in ("one", "two")]
    held_out, trained = held_out_and_trained(sources)
    assert len(held_out) > 15
    assert not held_out & trained


def test_a_split_by_position_would_put_duplicates_on_both_sides() -> None:
    """The negative control: every fifth document held out, as one might."""
    shared = [prose(seed, 2) for seed in range(50)]
    first, second = shared, shared[::-1]
    held_out = {text for texts in (first, second) for text in texts[::5]}
    trained = {text for texts in (first, second) for n, text in enumerate(texts) if n % 5}
    assert held_out & trained


def test_a_finished_source_is_left_as_it_is(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    first = prepare(CORPUS, store, make_tokenizer("bytes"), **OPTIONS)  # type: ignore[arg-type]
    times = {
        path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.npy")
    }
    assert prepare(CORPUS, store, make_tokenizer("bytes"), **OPTIONS) == first  # type: ignore[arg-type]
    assert {
        path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.npy")
    } == times


def test_other_settings_in_the_same_place_are_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    prepare(CORPUS, store, make_tokenizer("bytes"), **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="shard_tokens was 9000, now 500"):
        prepare(CORPUS, store, make_tokenizer("bytes"), shard_tokens=500, validation_permille=200)
    with pytest.raises(ConfigurationError, match="other inputs"):
        prepare(MemoryCorpus([("x", "y")]), store, make_tokenizer("bytes"), **OPTIONS)  # type: ignore[arg-type]


def test_a_changed_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(1, 9))
    store = open_store(str(tmp_path / "out"))
    prepare(FileCorpus([tmp_path / "a.txt"]), store, make_tokenizer("bytes"), **OPTIONS)  # type: ignore[arg-type]
    (tmp_path / "a.txt").write_text(prose(2, 9))
    with pytest.raises(ConfigurationError, match=r"other inputs: .*a\.txt has changed"):
        prepare(FileCorpus([tmp_path / "a.txt"]), store, make_tokenizer("bytes"), **OPTIONS)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", ["append", "replace", "remove"])
def test_an_input_that_changes_meanwhile_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(prose(1, 90))
    store = open_store(str(tmp_path / "out"))

    def write(phase: str) -> None:
        if phase == "prepare:ledger" and change == "append":
            path.write_text(prose(1, 90) + "more")
        elif phase == "prepare:unit" and change == "replace":
            (tmp_path / "new.txt").write_text(prose(2, 90))
            (tmp_path / "new.txt").rename(path)
        elif phase == "prepare:unit":
            path.unlink(missing_ok=True)

    corpus = FileCorpus([path])
    with pytest.raises(DataError, match=r"a\.txt: (was written to while|cannot be read)"):
        prepare(corpus, store, make_tokenizer("bytes"), shard_tokens=10**6, announce=write)
    assert "index.json" not in store.list("")


def test_a_folder_with_other_things_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="is not empty and holds no preparation"):
        prepare(CORPUS, open_store(str(tmp_path)), make_tokenizer("bytes"))


def test_no_text_and_no_shard_size_are_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with pytest.raises(ConfigurationError, match="shard_tokens must be at least 1, got 0"):
        prepare(CORPUS, store, make_tokenizer("bytes"), shard_tokens=0)
    with pytest.raises(DataError, match="hold no text to train on"):
        prepare(MemoryCorpus([("empty", "")]), store, make_tokenizer("bytes"))


def test_little_held_out_text_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="data_service"):
        prepare(CORPUS, open_store(str(tmp_path)), make_tokenizer("bytes"))
    assert "tokens are held out for validation" in caplog.text


def test_shakespeare_is_all_there(tmp_path: Path) -> None:
    if not SHAKESPEARE.is_dir():
        pytest.skip(f"no Shakespeare at {SHAKESPEARE}")
    plays = sorted(SHAKESPEARE.glob("*.txt"))[:4]
    index = prepare(FileCorpus(plays), open_store(str(tmp_path)), make_tokenizer("bytes"))
    source = open_source("plays", str(tmp_path))
    tokens = sum(entry.tokens for split in SPLITS for entry in index.shards(split))
    ends = sum(entry.documents for split in SPLITS for entry in index.shards(split))
    assert tokens - ends == sum(path.stat().st_size for path in plays)
    whole = "".join(documents(source, "train"))
    held_out, trained = held_out_and_trained([source])
    assert held_out
    assert not held_out & trained
    assert len(whole) > 0.95 * sum(path.stat().st_size for path in plays)


@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_preparing_again_makes_a_missing_shard_again(damage: str, tmp_path: Path) -> None:
    """Training says "prepare the source again" of a missing shard: that must help."""
    store = open_store(str(tmp_path))
    corpus = MemoryCorpus([(f"d{i}", f"document {i} " * 40) for i in range(40)])
    arguments = {"shard_tokens": 3000, "validation_permille": 100}
    index = prepare(corpus, store, make_tokenizer("bytes"), **arguments)
    before = {key: store.get(key) for key in store.list("")}
    key = index.train[-1].tokens_key
    if damage == "deleted":
        store.delete(key)
    else:
        store.put(key, before[key][:-5])
    assert prepare(corpus, store, make_tokenizer("bytes"), **arguments) == index
    assert {key: store.get(key) for key in store.list("")} == before


LIMIT_BYTES = 120 << 20
LIMITED = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_DATA, ({LIMIT_BYTES}, {LIMIT_BYTES}))
"""
PREPARES = (
    LIMITED
    + """
sys.argv[0] = "prepare"
runpy.run_module("data_service.prepare", run_name="__main__")
"""
)
READS = (
    LIMITED
    + """
print(len(open(sys.argv[1], "rb").read()))
"""
)


def test_memory_stays_below_a_limit_that_the_input_exceeds(tmp_path: Path) -> None:
    """Each process has 120 MiB for its data; the input has more, and is shuffled all the same."""
    rng = random.Random(1)
    words = ["".join(rng.choices("etaoin", k=1000)) for _ in range(50)]
    path = tmp_path / "a.jsonl"
    with open(path, "w") as file:
        for number in range(13_000):
            text = " ".join(rng.choices(words, k=10))
            file.write(f'{{"text": "{number} {text}"}}\n')
    assert path.stat().st_size > LIMIT_BYTES

    def limited(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=ROOT,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    options = ["--out", str(tmp_path / "out"), "--shard_tokens", "1000000", "--workers", "2"]
    done = limited(PREPARES, str(path), *options)
    assert done.returncode == 0, done.stderr
    index = open_source("a", str(tmp_path / "out")).index
    assert sum(entry.documents for split in SPLITS for entry in index.shards(split)) == 13_000
    # The control: the limit is one that a program which holds its input does not keep.
    assert "MemoryError" in limited(READS, str(path)).stderr


def test_the_tail_is_held_out_in_order_and_the_stamp_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As nanoGPT and the from-scratch course divide tiny Shakespeare: 90/10 in order."""
    text = "".join(prose(number, 40) for number in range(9))
    (tmp_path / "a.txt").write_text(text)
    corpus = FileCorpus([tmp_path / "a.txt"], tail_permille=100)
    tokenizer = CharacterTokenizer.of_texts([text])
    index = prepare(corpus, open_store(str(tmp_path / "out")), tokenizer)
    assert index.stamp == ValidationStamp.by_position(100)
    assert "a larger --validation_tail (now 100) or more text" in caplog.text
    source = open_source("a", str(tmp_path / "out"))
    assert documents(source, "train") == [text[: int(0.9 * len(text)) + 1]]
    assert documents(source, "validation") == [text[int(0.9 * len(text)) + 1 :]]


def test_a_shuffled_source_has_the_same_documents_in_another_order(tmp_path: Path) -> None:
    texts = [f"{number} {prose(number, 1)}" for number in range(300)]
    corpus = MemoryCorpus([(str(number), text) for number, text in enumerate(texts)])
    found: dict[object, list[str]] = {}
    for seed in (None, 0, 1):
        out = tmp_path / str(seed)
        recipe = Recipe(shard_tokens=5_000, shuffle=seed is not None, shuffle_seed=seed or 0)
        prepare(corpus, open_store(str(out)), make_tokenizer("bytes"), recipe=recipe)
        source = open_source("a", str(out))
        found[seed] = documents(source, "train")
        assert len(source.shards("train")) > 5
    assert sorted(found[None]) == sorted(found[0]) == sorted(found[1])
    assert found[None] != found[0] != found[1]
    numbers = np.array([int(text.split()[0]) for text in found[0]])
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.2  # 3.4 sigma


def test_what_is_spilled_goes_to_the_work_place_and_is_cleared_away(tmp_path: Path) -> None:
    heard: list[str] = []
    store, work = open_store(str(tmp_path / "out")), open_store(str(tmp_path / "work"))

    def announce(phase: str) -> None:
        heard.append(phase)
        if phase == "prepare:index":
            assert not store.list("spill/")
            assert work.list("spill/")

    recipe = Recipe(shard_tokens=9_000, shuffle=True, deduplicate=True)
    prepare(CORPUS, store, make_tokenizer("bytes"), recipe=recipe, work=work, announce=announce)
    assert heard[-1] == "prepare:swept"
    assert not work.list("")


def test_a_shard_that_was_lost_after_a_shuffle_is_made_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    recipe = Recipe(shard_tokens=9_000, shuffle=True, deduplicate=True)
    index = prepare(CORPUS, store, make_tokenizer("bytes"), recipe=recipe)
    before = objects(tmp_path)
    store.delete(index.train[0].tokens_key)
    assert prepare(CORPUS, store, make_tokenizer("bytes"), recipe=recipe) == index
    assert objects(tmp_path) == before


@pytest.mark.parametrize("lost", ["train-", "validation-", "index.json"])
def test_preparing_again_makes_a_lost_table_and_a_torn_index_again(
    lost: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Opening a source says "prepare the source again" of them: that must help."""
    store = open_store(str(tmp_path))
    index = prepare(CORPUS, store, make_tokenizer("bytes"), **OPTIONS)  # type: ignore[arg-type]
    before = objects(tmp_path)
    key = next(key for key in before if key.startswith(lost) and not key.endswith(".npy"))
    if key == "index.json":
        store.put(key, before[key][:-9])
    else:
        store.delete(key)
    assert prepare(CORPUS, store, make_tokenizer("bytes"), **OPTIONS) == index  # type: ignore[arg-type]
    assert objects(tmp_path) == before
    assert "it is made again" in caplog.text


def test_no_workers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="workers must be at least 1, got 0"):
        prepare(CORPUS, open_store(str(tmp_path)), make_tokenizer("bytes"), workers=0)


def test_the_embedded_kind_of_source_is_frozen(tmp_path: Path) -> None:
    """Unshuffled bytes in units: what every run without data has. Its bits must not change."""
    prepare(CORPUS, open_store(str(tmp_path)), make_tokenizer("bytes"), **OPTIONS)  # type: ignore[arg-type]
    shards = {key: data for key, data in objects(tmp_path).items() if key.endswith(".npy")}
    digest = hashlib.sha256()
    for key in sorted(shards):
        digest.update(key.encode() + hashlib.sha256(shards[key]).digest())
    assert digest.hexdigest()[:16] == "e45f2954f3e4c2e1"


@pytest.mark.parametrize("stage", ["bucket", "hashes-done", "duplicates-done"])
def test_what_was_written_on_the_way_and_is_gone_is_said_and_made_again(
    stage: str, tmp_path: Path
) -> None:
    store = open_store(str(tmp_path))
    recipe = Recipe(shard_tokens=9_000, shuffle=True, deduplicate=True)

    def take_away(phase: str) -> None:
        if phase == f"prepare:{stage}":
            for key in store.list("spill/"):
                store.delete(key)

    with pytest.raises(StoreUnavailableError, match="what was written there on the way is"):
        prepare(CORPUS, store, make_tokenizer("bytes"), recipe=recipe, announce=take_away)
    index = prepare(CORPUS, store, make_tokenizer("bytes"), recipe=recipe)
    whole = prepare(CORPUS, open_store("memory://whole"), make_tokenizer("bytes"), recipe=recipe)
    assert index == whole


@pytest.mark.parametrize("extra", [False, True])
def test_progress_hears_of_every_byte_in_every_pass(extra: bool, tmp_path: Path) -> None:
    told: list[tuple[int, int, bool]] = []
    recipe = Recipe(shard_tokens=9_000, shuffle=extra, deduplicate=extra)
    for is_new in (True, False):
        told.clear()
        store = open_store(str(tmp_path))
        index = prepare(
            CORPUS,
            store,
            make_tokenizer("bytes"),
            recipe=recipe,
            advance=lambda *batch: told.append(batch),
        )
        size = sum(item.size_bytes for item in CORPUS.inputs)
        assert sum(size_bytes for size_bytes, _, _ in told) == size * passes_of(recipe)
        entries = [entry for split in SPLITS for entry in index.shards(split)]
        assert sum(tokens for _, tokens, _ in told) == sum(entry.tokens for entry in entries)
        if not extra:
            assert {new for _, _, new in told} == {is_new}
        store.delete("index.json")
