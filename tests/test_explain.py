"""What is told of a step is what the trainer reads in it: ids, offsets, documents and text."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_service.explain import explain, main
from data_service.inputs import MemoryCorpus
from data_service.loader import Loader
from data_service.plan import Plan
from data_service.preparation import prepare
from data_service.run_data import batches_of, open_sources, plans_of, read_log
from data_service.source import Source, open_source
from data_service.tokenizer import make_tokenizer
from storage.errors import DataError
from storage.store import open_store
from tests.made_data_runs import DataRun
from tests.made_sources import plan_of, segment_of
from tests.programs import ROOT, train_here

TEXTS = {
    "tales": [
        f"Once there were {n} geese, and each had {n * n} eggs.\n" * (n % 7 + 1) for n in range(120)
    ],
    "sums": [f"{n} + {n} = {2 * n}; " * (n % 5 + 1) for n in range(200)],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("sources")
    for name, texts in TEXTS.items():
        prepare(
            MemoryCorpus([(f"{name}{n}", text) for n, text in enumerate(texts)]),
            open_store(str(folder / name)),
            make_tokenizer("bytes"),
            shard_tokens=2_000,
            validation_permille=100,
        )
    return {name: open_source(name, str(folder / name)) for name in TEXTS}


@pytest.fixture
def run(tmp_path: Path, sources: dict[str, Source]) -> DataRun:
    return DataRun(str(tmp_path / "run"), sources, plan_of(list(sources.values())))


@pytest.mark.parametrize("step", [0, 3, 700, 10**9])
def test_ids_rows_and_text_are_those_of_the_batch(step: int, run: DataRun) -> None:
    found = explain(run.place, step)
    rows, ids = run.batches.batch(step), run.batches.sample_ids(step)
    tokenizer = run.batches.tokenizer
    assert [told["sequence"] for told in found["sequences"]] == list(range(6))
    for told, row, (name, epoch, shard, window) in zip(found["sequences"], rows, ids, strict=True):
        assert (told["source"], told["epoch"], told["window"]) == (name, epoch, window)
        assert told["url"] == f"{run.sources[name].url}/{shard}.npy"
        assert told["text"] == tokenizer.decode(row)
        assert (told["first_token"], told["tokens"]) == (window * 8, 9)
        data = Path(told["url"]).read_bytes()
        part = data[told["first_byte"] : told["first_byte"] + told["bytes"]]
        assert np.frombuffer(part, dtype="<u2").tolist() == row.tolist()
    assert found["bookmarks"] == run.batches.bookmarks(step)


def test_documents_are_those_of_the_ends_file(run: DataRun) -> None:
    seen = 0
    for step in range(20):
        for told in explain(run.place, step)["sequences"]:
            source = run.sources[told["source"]]
            ends = source.ends(Path(told["url"]).stem).tolist()
            first, last = told["documents"]
            start, end = told["first_token"], told["first_token"] + told["tokens"]
            inside = [number for number, stop in enumerate([*ends, 10**9]) if stop > start]
            assert first == inside[0]
            assert last == first + sum(start < stop < end for stop in ends)
            seen += last > first
    assert seen, "no window held two documents: the test shows nothing"


def test_the_text_is_the_prepared_text(run: DataRun) -> None:
    whole = "".join(text + "<|endoftext|>" for text in TEXTS["tales"])
    for told in explain(run.place, 5)["sequences"]:
        if told["source"] == "tales":
            assert told["text"].split("<|endoftext|>")[0] in whole


def test_one_sequence_is_the_same_as_among_all(run: DataRun) -> None:
    every = explain(run.place, 7)
    assert explain(run.place, 7, sequence=4)["sequences"] == [every["sequences"][4]]


def test_without_text_no_shard_is_read(
    run: DataRun, sources: dict[str, Source], tmp_path: Path
) -> None:
    with_text = explain(run.place, 2)
    without = explain(run.place, 2, text_tokens=0)
    for told, other in zip(with_text["sequences"], without["sequences"], strict=True):
        assert {**other, "text": told["text"]} == told


def test_a_part_of_the_text_is_its_beginning(run: DataRun) -> None:
    whole, part = explain(run.place, 2), explain(run.place, 2, text_tokens=4)
    for told, other in zip(whole["sequences"], part["sequences"], strict=True):
        assert other == {**told, "text": told["text"][:4]} and len(told["text"]) > 4


def test_an_edited_plan_tells_its_segment(run: DataRun, sources: dict[str, Source]) -> None:
    plan = run.batches.plan.appended(segment_of([sources["sums"]], from_step=10))
    run.edit(plan.appended(segment_of(list(sources.values()), from_step=25)))
    expected = {0: (0, 0, 10), 9: (0, 0, 10), 10: (1, 10, 25), 24: (1, 10, 25), 25: (2, 25, None)}
    for step, (number, first, end) in expected.items():
        segment = explain(run.place, step, text_tokens=0)["segment"]
        assert (segment["number"], segment["from_step"], segment["to_step"]) == (number, first, end)
        assert segment["of"] == 3
    assert explain(run.place, 12)["segment"]["sources"] == ["sums"]
    assert {t["source"] for t in explain(run.place, 12)["sequences"]} == {"sums"}


def test_the_table_has_a_line_for_each_sequence_and_cuts_the_text(
    run: DataRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([run.place, "--step", "3"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"step 3 of {run.place}: segment 1 of 1, from step 0 (sums, tales)"
    assert "text" in shown[1]
    assert len(shown) == 2 + 6 + 2
    assert shown[-1].startswith("before this step tales has given 9 samples: epoch 0, 9 of ")
    assert main([run.place, "--step=3", "--no-text", "--sequence=2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "text" not in shown[1] and len(shown) == 5


def test_it_is_json_for_scripts(run: DataRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([run.place, "--step", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(explain(run.place, 3)))


def test_a_source_read_through_a_store_tells_the_same(
    run: DataRun, sources: dict[str, Source]
) -> None:
    mirror = "memory://explained-tales"
    store = open_store(mirror)
    folder = Path(sources["tales"].url)
    for path in folder.rglob("*"):
        if path.is_file() and not path.relative_to(folder).parts[0].startswith("."):
            store.put(path.relative_to(folder).as_posix(), path.read_bytes())
    here, there = explain(run.place, 4), explain(run.place, 4, data=[f"tales={mirror}"])
    for told, other in zip(here["sequences"], there["sequences"], strict=True):
        assert {**other, "url": told["url"]} == told
    assert {t["url"].partition("://")[0] for t in there["sequences"]} >= {"memory"}


# Mistakes and damage.


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 78
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert shown.out == "" and line.startswith("error: ")
    return line


def test_mistakes_are_told_in_one_line(
    run: DataRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (-1, 10**19):
        line = refused(capsys, run.place, f"--step={step}")
        assert f"--step must be from 0 to 1000000000000, got {step}" in line
    line = refused(capsys, run.place, "--step=1", "--sequence=6")
    assert "--sequence must be from 0 to 5" in line
    line = refused(capsys, str(tmp_path / "none"), "--step=1")
    assert "holds no run: there is no log" in line
    line = refused(capsys, run.place, "--step=1", "--data=other=x")
    assert "the run's plan has the sources sums, tales" in line


def test_a_source_that_is_not_there_is_told(
    run: DataRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, run.place, "--step=1", f"--data=tales={tmp_path / 'none'}")
    assert "source 'tales' at" in line and "there is no data here" in line


def test_a_store_that_cannot_be_reached_has_the_exit_code_of_its_kind(
    run: DataRun, capsys: pytest.CaptureFixture[str]
) -> None:
    place = "http://127.0.0.1:9/nothing"
    assert main([run.place, "--step=1", f"--data=tales={place}"]) == 75
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("harm", ["truncated", "no array", "gone"])
def test_a_damaged_shard_is_named(
    harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = MemoryCorpus([(f"{n}", text) for n, text in enumerate(TEXTS["tales"])])
    place = str(tmp_path / "tales")
    prepare(corpus, open_store(place), make_tokenizer("bytes"), validation_permille=100)
    source = open_source("tales", place)
    run = DataRun(str(tmp_path / "run"), {"tales": source}, plan_of([source]))
    url = Path(explain(run.place, 0)["sequences"][0]["url"])
    whole = url.read_bytes()
    if harm == "gone":
        url.unlink()
    else:
        url.write_bytes(whole[:128] if harm == "truncated" else b"x" * len(whole))
    line = refused(capsys, run.place, "--step=0")
    assert url.stem in line


def test_a_shard_that_the_step_does_not_read_is_not_looked_for(tmp_path: Path) -> None:
    corpus = MemoryCorpus([(f"{n}", text) for n, text in enumerate(TEXTS["tales"])])
    place = tmp_path / "tales"
    prepare(
        corpus,
        open_store(str(place)),
        make_tokenizer("bytes"),
        shard_tokens=1_000,
        validation_permille=100,
    )
    source = open_source("tales", str(place))
    run = DataRun(str(tmp_path / "run"), {"tales": source}, plan_of([source]))
    told = explain(run.place, 0)
    read = {Path(one["url"]).stem for one in told["sequences"]}
    other = next(entry for entry in source.shards("train") if entry.name not in read)
    (place / other.tokens_key).unlink()
    assert explain(run.place, 0) == told
    with pytest.raises(DataError, match=f"{other.tokens_key} is missing"):
        open_sources(run.place, plans_of(read_log(run.place))[-1], {})


# Real runs.


def test_explained_is_what_a_real_run_consumed(
    tmp_path: Path, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    consumed: dict[int, Any] = {}
    honest = Loader.next

    def watched(self: Loader, step: int) -> Any:
        consumed[step] = honest(self, step)
        return consumed[step]

    monkeypatch.setattr(Loader, "next", watched)
    run = tmp_path / "run"
    shape = ("--max_steps=4", "--n_embd=32", "--n_layer=1", "--context=16", "--warmup_steps=1")
    quiet = ("--eval_interval_steps=0", "--sample_interval_steps=0", "--global_batch_size=8")
    assert train_here("--run", run, *shape, *quiet, *data) == 0
    assert sorted(consumed) == [0, 1, 2, 3]
    recorded = plans_of(read_log(str(run)))[-1]
    batches = batches_of(recorded, open_sources(str(run), recorded, {}))
    for step, given in consumed.items():
        rows = np.asarray(getattr(given, "tokens", given))
        told = explain(str(run), step)["sequences"]
        assert [t["text"] for t in told] == [batches.tokenizer.decode(row) for row in rows]


def test_the_embedded_corpus_of_a_run_is_found_in_it_also_when_it_has_moved(
    tmp_path: Path, run: DataRun, sources: dict[str, Source]
) -> None:
    inside = Path(run.place) / "corpus" / "tales"
    inside.mkdir(parents=True)
    for path in Path(sources["tales"].url).iterdir():
        if path.is_file():
            (inside / path.name).write_bytes(path.read_bytes())
    plan = plan_of([sources["tales"]]).to_json()
    plan["segments"][0]["sources"][0]["url"] = "run:corpus/tales"  # type: ignore[index]
    run.edit(Plan.from_json(plan))
    moved = tmp_path / "moved"
    Path(run.place).rename(moved)
    told = explain(str(moved), 0)["sequences"]
    assert {t["url"].rpartition("/")[0] for t in told} == {f"{moved}/corpus/tales"}


def test_the_command_imports_neither_torch_nor_a_tokenizers_vocabulary(run: DataRun) -> None:
    program = (
        "import sys; from data_service.explain import main; "
        f"code = main([{run.place!r}, '--step=9', '--json']); "
        "assert not {'torch', 'tokenizers', 'datasets', 'tensorboard'} & sys.modules.keys(); "
        "sys.exit(code)"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 9
