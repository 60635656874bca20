"""One task of one contestant in a process of its own: `python -m benchmarks.data_tasks TASK`.

TASK is JSON. The answer is the last line of standard output, JSON as well. Batches go to a file of
rows' names, states to a file as the peers' documentation shows (torch.save).
"""

import importlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.data_contestants import Share, rows_of
from benchmarks.data_corpus import NAMES, Corpus, identities, sources_of
from benchmarks.data_downloads import Remote, download_epoch
from benchmarks.data_registry import MAKERS

WARM_SECONDS = 1.0
WARM_BATCHES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What to do; paths are written as text."""

    kind: str
    """write, throughput, first, state, batches or downloads."""
    contestant: str
    corpus: dict[str, Any]
    share: dict[str, Any]
    seconds: float = 0.0
    started: float = 0.0
    """When the parent started this process (`time.time`)."""
    samples: int = 0
    batches: int = 0
    save_after: int = -1
    """Save the state after so many batches."""
    state: str = ""
    save: str = ""
    rows: str = ""
    cache: str = ""
    cache_bytes: int = 0
    downloads: str = ""
    """A file that gets a line for each download: its bytes."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def run(task: Task) -> dict[str, Any]:
    """Do it."""
    contestant = MAKERS[task.contestant]()
    corpus = Corpus(**{**task.corpus, "folder": Path(task.corpus["folder"])})
    share = Share(**task.share)
    if task.kind == "state":
        torch.save(contestant.state_at(corpus, share, task.samples), task.save)
        return {}
    if task.kind == "write":
        for name in NAMES:
            contestant.write(corpus, name)
        return {}
    if task.kind == "downloads":
        return download_epoch(
            task.contestant,
            corpus,
            share,
            Remote(cache=Path(task.cache), limit_bytes=task.cache_bytes, log=Path(task.downloads)),
        )
    if contestant.module:
        importlib.import_module(contestant.module)
    imported = time.time()
    state = torch.load(task.state, weights_only=False) if task.state else None
    feed = contestant.open(corpus, share, state)
    if task.kind == "first":
        rows = rows_of(feed.next())
        now = time.time()
        assert rows.shape == (share.batch, corpus.context + 1), rows.shape
        return {"opening": now - imported, "whole": now - task.started}
    if task.kind == "throughput":
        return _throughput(feed, corpus, share, task.seconds)
    return _batches(feed, task)


def _throughput(feed: Any, corpus: Corpus, share: Share, seconds: float) -> dict[str, Any]:
    """Tokens a second, within one epoch: for so long, or nine tenths of what it holds."""
    most = int(corpus.samples * 0.9) // (share.batch * share.world)
    warm_until = time.perf_counter() + WARM_SECONDS
    warmed = 0
    while warmed < WARM_BATCHES or (time.perf_counter() < warm_until and warmed < most // 4):
        rows = rows_of(feed.next())
        warmed += 1
    assert rows.dtype == "int64" and rows.shape == (share.batch, corpus.context + 1)
    begun = time.perf_counter()
    batches = 0
    while warmed + batches < most and time.perf_counter() - begun < seconds:
        feed.next()
        batches += 1
    passed = time.perf_counter() - begun
    return {"tokens_a_second": batches * share.batch * corpus.context / passed, "batches": batches}


def _batches(feed: Any, task: Task) -> dict[str, Any]:
    """The names and sources of the rows of each batch, and the state where it is asked for."""
    names, sources = [], []
    for number in range(task.batches):
        if number == task.save_after:
            torch.save(feed.state(), task.save)
        rows = rows_of(feed.next())
        names.append(identities(rows))
        sources.append(sources_of(rows).tolist())
    if task.save_after == task.batches:
        torch.save(feed.state(), task.save)
    Path(task.rows).write_text(json.dumps({"names": names, "sources": sources}))
    return {}


if __name__ == "__main__":
    answer = run(Task(**json.loads(sys.argv[1])))
    print(json.dumps(answer), flush=True)
    os._exit(0)  # workers and threads of peers may hold an ordinary exit for seconds
