"""Real text: the model learns more than the frequencies of tokens."""

import math
from pathlib import Path

import numpy as np
import pytest

from data_service.prepare import main as prepare
from data_service.source import open_source
from tests.programs import ROOT, final_digest, rows, train, train_here, train_until_killed

SHARED = ROOT.parent / "shared"
SHAKESPEARE = SHARED / "corpus" / "shakespeare"
VOCABULARY = SHARED / "tiktoken"


def unigram_entropy(source: str) -> float:
    """Nats a token of the held-out split under its own frequencies: the best that any model
    without context could do, told the split."""
    opened = open_source("split", source)
    parts = [opened.tokens(s.name, 0, s.tokens) for s in opened.shards("validation")]
    counts = np.unique(np.concatenate(parts), return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def last_row(run: Path) -> dict[str, float]:
    return rows(run)[-1]  # type: ignore[return-value]


@pytest.mark.skipif(not SHAKESPEARE.is_dir(), reason="there is no Shakespeare here")
def test_on_shakespeare_in_bytes_the_model_beats_the_unigram_entropy(tmp_path: Path) -> None:
    source = str(tmp_path / "shakespeare")
    assert prepare([str(SHAKESPEARE), "--tokenizer", "bytes", "--out", source]) == 0
    run = tmp_path / "run"
    arguments = ("--run", run, f"--data=shakespeare={source}", "--max_steps=150")
    assert train_here(*arguments, "--sample_interval_steps=0") == 0
    assert last_row(run)["validation_loss"] < unigram_entropy(source) - 0.4


@pytest.mark.soak
@pytest.mark.skipif(not SHAKESPEARE.is_dir(), reason="there is no Shakespeare here")
@pytest.mark.skipif(not VOCABULARY.is_dir(), reason="GPT-2's vocabulary is not on this machine")
def test_gpt2_tokens_of_shakespeare_mixed_with_python_are_learnt_and_killed_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(VOCABULARY))
    shakespeare, python = str(tmp_path / "shakespeare"), str(tmp_path / "python")
    common = ["--tokenizer", "gpt2", "--validation_permille", "20", "--out"]
    assert prepare([str(SHAKESPEARE), *common, shakespeare]) == 0
    assert prepare(["--embedded", "python", *common, python]) == 0
    run = tmp_path / "run"
    arguments = (
        "--run",
        run,
        f"--data=shakespeare={shakespeare}:0.7",
        f"--data=python={python}:0.3",
        "--max_steps=240",
        "--eval_interval_steps=240",
        "--sample_interval_steps=0",
        "--save_interval_steps=20",
        "--wait_for_saves",
        "--log_interval_steps=10",
    )
    train_until_killed(*arguments, phase="reduce", nth=25)
    train_until_killed(*arguments, phase="save:manifest", nth=2)
    train(*arguments, world=2)
    row = last_row(run)
    assert math.isfinite(row["loss"])
    assert len(rows(run)) == 240
    assert row["validation_loss/shakespeare"] < unigram_entropy(shakespeare) - 0.4
    assert row["validation_loss/python"] < unigram_entropy(python) - 0.4
    assert final_digest(run)
