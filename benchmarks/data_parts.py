"""The parts of the data benchmark: which tasks they run, and the rows that come of them."""

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_contestants import Share, installed
from benchmarks.data_corpus import NAMES, SHARD_TOKENS, SHARES, Corpus
from benchmarks.data_downloads import OPENERS, folder_bytes
from benchmarks.data_processes import Limits, Outcome, run_ranks, run_task
from benchmarks.data_registry import MAKERS, OURS
from benchmarks.data_tasks import Task
from benchmarks.measuring import Row, rotated

RESUME_AFTER, RESUME_BATCHES, ELASTIC_BATCHES = 100, 200, 50
CACHED_TOKENS, CACHED_SHARDS = 20_000_000, 200
CACHE_SHARES = (0.25, 0.5, 1.25)

DRIFT = "drift of the mixture"
EQUAL = "equal batches after a resume"
WRONG = "samples skipped or repeated by a resume"
GLOBAL = "equal global batches"
DOWNLOADED = "downloaded in 0.9 of an epoch"
FILLED = "most in the cache"


class Measure:
    """The parts, on corpora that are written once."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self._folder, self._args = folder, args
        self._limits = Limits(seconds=args.limit, bytes=int(args.memory * 2**30))
        self._written: set[tuple[str, str]] = set()
        self.missing: list[str] = []
        self._names = []
        for name in args.contestants:
            if installed(MAKERS[name]()):
                self._names.append(name)
            else:
                self.missing.append(f"{name}: not installed")
        self._small = min(args.context)

    def throughput(self) -> list[Row]:
        """Tokens a second, for each context."""
        turns = [(name, workers) for name in self._names for workers in MAKERS[name]().workers]
        labels = {_label(name, workers): (name, workers) for name, workers in turns}
        rows = []
        for context in self._args.context:
            corpus = self._corpus(context)
            values: dict[str, list[float]] = {label: [] for label in labels}
            for number in range(self._args.repeats):
                for label in rotated(list(labels), number):
                    name, workers = labels[label]
                    found = self._run(
                        "throughput", name, corpus, workers, seconds=self._args.seconds
                    )
                    if found is not None:
                        values[label].append(found.answers[0]["tokens_a_second"] / 1e6)
            rows += [
                _row(f"throughput, T={context}", label, value, "M tokens/s", against=OURS)
                for label, value in values.items()
                if value
            ]
        return rows

    def start(self) -> list[Row]:
        """Seconds and memory to the first batch, near and far."""
        shard = SHARD_TOKENS // self._small
        copies = -(-2 * self._args.far // shard)
        corpus = Corpus(
            folder=self._folder / "far",
            context=self._small,
            windows=shard,
            shard_windows=shard,
            copies=max(10, -(-copies // 10) * 10),
        )
        rows = []
        for samples in (0, self._args.far):
            figures: dict[tuple[str, str], list[Row]] = {}
            for number in range(self._args.repeats):
                for name in rotated(self._names, number):
                    for row in self._first(name, corpus, samples, number):
                        figures.setdefault((row.figure, name), []).append(row)
            for _, parts in sorted(figures.items(), key=lambda item: item[0][0]):
                values = tuple(value for part in parts for value in part.values)
                rows.append(
                    _row(
                        parts[0].figure,
                        parts[0].contestant,
                        values,
                        parts[0].unit,
                        note=parts[-1].note,
                    )
                )
        return rows

    def _first(self, name: str, corpus: Corpus, samples: int, number: int) -> list[Row]:
        """One start; a contestant that was cut at a limit is not started again."""
        where = f"first batch at {samples:.0e} samples" if samples else "first batch at 0"
        task: dict[str, Any] = {}
        if samples:
            if not MAKERS[name]().stateful:
                self._miss(name, where, "has no state of the data")
                return []
            path = self._folder / f"far-{name}.state"
            if not path.exists():
                made = self._run("state", name, corpus, None, samples=samples, save=str(path))
                if made is None:
                    return []
            task["state"] = str(path)
        if any(line.startswith(f"{name}: {where}") for line in self.missing):
            return []
        found = self._run("first", name, corpus, None, what=where, **task)
        if found is None:
            return []
        answer = found.answers[0]
        return [
            _row(where, name, [answer["opening"]], "s"),
            _row(f"{where}, imports and all", name, [answer["whole"]], "s"),
            _row(f"{where}, peak memory", name, [found.peak_bytes / 1e6], "MB"),
        ]

    def mixture(self) -> list[Row]:
        """The largest deviation from the exact shares."""
        rows = []
        for name in self._names:
            if not MAKERS[name]().mixes:
                self._miss(name, DRIFT, "does not mix")
                continue
            batches = -(-self._args.samples // self._args.batch)
            found = self._batches(name, batches=batches, what=DRIFT)
            if found is not None:
                rows.append(_row(DRIFT, name, [drift(found["sources"])], "samples"))
        return rows

    def resume(self) -> list[Row]:
        """Equality after a restore in a new process."""
        rows = []
        for name in self._names:
            state = str(self._folder / f"resume-{name}.state")
            whole = self._batches(
                name,
                batches=RESUME_AFTER + RESUME_BATCHES,
                save_after=RESUME_AFTER,
                save=state,
                what=EQUAL,
            )
            again = whole and self._batches(name, batches=RESUME_BATCHES, state=state, what=EQUAL)
            if whole and again:
                expected, found = whole["names"][RESUME_AFTER:], again["names"]
                rows += [
                    _row(EQUAL, name, [equal_share(expected, found)], "of all"),
                    _row(
                        WRONG,
                        name,
                        [wrong_samples(expected, found)],
                        f"of {len(expected) * len(expected[0])}",
                    ),
                ]
        return sorted(rows, key=lambda row: row.figure == WRONG)

    def elastic(self) -> list[Row]:
        """Equality of global batches, as sets, after changes of world size."""
        rows = []
        for name in self._names:
            reason = MAKERS[name]().inelastic
            if reason:
                self._miss(name, GLOBAL, reason)
                continue
            state = str(self._folder / f"elastic-{name}.state")
            whole = self._batches(
                name,
                batches=3 * ELASTIC_BATCHES,
                save_after=ELASTIC_BATCHES,
                save=state,
                elastic=True,
                what=GLOBAL,
            )
            expected = whole["names"] if whole else []
            for number, world in enumerate((2, 4), 1):
                after = f"{state}-{world}"
                found = expected and self._batches(
                    name,
                    batches=ELASTIC_BATCHES,
                    state=state,
                    save_after=ELASTIC_BATCHES,
                    save=after,
                    elastic=True,
                    world=world,
                    what=GLOBAL,
                )
                if not found:
                    break
                part = expected[number * ELASTIC_BATCHES : (number + 1) * ELASTIC_BATCHES]
                as_sets = [sorted(batch) for batch in part], [sorted(b) for b in found["names"]]
                rows.append(
                    _row(
                        f"{GLOBAL}, world {world // 2} -> {world}",
                        name,
                        [equal_share(*as_sets)],
                        "of all",
                    )
                )
                state = after
        return sorted(rows, key=lambda row: row.figure)

    def downloads(self) -> list[Row]:
        """What an epoch downloads, and the most in the cache, for caches of several sizes."""
        tokens = min(self._args.tokens, CACHED_TOKENS)
        corpus = Corpus(
            folder=self._folder / "cached",
            context=self._small,
            windows=tokens // self._small,
            shard_windows=max(1, tokens // self._small // CACHED_SHARDS),
        )
        rows = []
        for name in (name for name in self._names if name in OPENERS):
            if not self._write(name, corpus):
                continue
            whole = folder_bytes(corpus.at(MAKERS[name]().layout))
            for share in CACHE_SHARES:
                rows += self._downloads(name, corpus, whole, share)
        return sorted(rows, key=lambda row: row.figure)

    def _downloads(self, name: str, corpus: Corpus, whole: int, share: float) -> list[Row]:
        where = f"cache of {share:.0%}"
        limit = int(whole * share)
        log = self._folder / "downloads.log"
        log.write_text("")
        cache = self._folder / "cache"
        found = self._run(
            "downloads",
            name,
            corpus,
            None,
            what=f"{DOWNLOADED}, {where}",
            cache=str(cache),
            cache_bytes=limit,
            downloads=str(log),
        )
        shutil.rmtree(cache, ignore_errors=True)
        downloaded = sum(int(line) for line in log.read_text().splitlines()) / whole
        if found is None:
            if not downloaded:
                return []
            note = "or more: ended before the epoch"
            return [_row(f"{DOWNLOADED}, {where}", name, [downloaded], "of the corpus", note=note)]
        filled = found.answers[0]["most_bytes"] / limit
        return [
            _row(f"{DOWNLOADED}, {where}", name, [downloaded], "of the corpus"),
            _row(f"{FILLED}, {where}", name, [filled], "of its limit"),
        ]

    def _batches(
        self, name: str, *, what: str, world: int = 1, elastic: bool = False, **task: Any
    ) -> dict[str, Any] | None:
        """Names and sources of the rows of the global batches."""
        corpus = self._corpus(self._small)
        if not self._write(name, corpus):
            return None
        tasks = []
        for rank in range(world):
            share = Share(
                batch=self._args.batch // world,
                workers=MAKERS[name]().workers[0],
                rank=rank,
                world=world,
                elastic=elastic,
            )
            mine = dict(task, rows=str(self._folder / f"rows-{rank}.json"))
            if rank:
                mine["save_after"] = -1
            tasks.append(_task("batches", name, corpus, share, **mine))
        print(f"{what}: {name}, world {world}", file=sys.stderr)
        found = run_ranks(tasks, self._limits)
        if found.failure:
            self._miss(name, what, found.failure)
            return None
        read = [json.loads(Path(one.rows).read_text()) for one in tasks]
        return {
            key: [list(chain(*parts)) for parts in zip(*(one[key] for one in read), strict=True)]
            for key in ("names", "sources")
        }

    def _run(
        self,
        kind: str,
        name: str,
        corpus: Corpus,
        workers: int | None,
        *,
        what: str = "",
        **task: Any,
    ) -> Outcome | None:
        """One task in one process; None when it did not come to an end, and why in `missing`."""
        if not self._write(name, corpus):
            return None
        share = Share(
            batch=self._args.batch,
            workers=MAKERS[name]().workers[0] if workers is None else workers,
        )
        print(f"{what or kind}: {name}, {share.workers} workers", file=sys.stderr)
        found = run_task(_task(kind, name, corpus, share, **task), self._limits)
        if found.failure:
            self._miss(
                name,
                what or kind,
                f"{found.failure} (after {found.seconds:.0f} s, {found.peak_bytes / 1e9:.1f} GB)",
            )
            return None
        return found

    def _corpus(self, context: int) -> Corpus:
        return Corpus(
            folder=self._folder / f"T{context}",
            context=context,
            windows=self._args.tokens // context,
            shard_windows=SHARD_TOKENS // context,
        )

    def _write(self, name: str, corpus: Corpus) -> bool:
        """The corpus in this contestant's format, written once."""
        key = (MAKERS[name]().layout, str(corpus.folder))
        if key in self._written:
            return corpus.at(key[0]).exists()
        self._written.add(key)
        print(f"writing {corpus.at(key[0])}", file=sys.stderr)
        share = Share(batch=self._args.batch, workers=0)
        found = run_task(_task("write", name, corpus, share), Limits(bytes=self._limits.bytes))
        if found.failure:
            self._miss(name, "writing", found.failure)
            shutil.rmtree(corpus.at(key[0]), ignore_errors=True)
        return not found.failure

    def _miss(self, name: str, what: str, why: str) -> None:
        line = f"{name}: {what}: {why}"
        if line not in self.missing:
            print(line, file=sys.stderr)
            self.missing.append(line)


def drift(batches: Sequence[Sequence[int]]) -> float:
    """The largest |count - exact share| of a source over all prefixes of these samples."""
    sources = np.concatenate([np.asarray(batch) for batch in batches])
    seen = np.arange(1, len(sources) + 1)
    worst = 0.0
    for number, name in enumerate(NAMES):
        counts = np.cumsum(sources == number)
        worst = max(worst, float(np.abs(counts - seen * (SHARES[name] / 1_000_000)).max()))
    return worst


def equal_share(expected: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> float:
    """How many batches are the same, in the same order, of all."""
    return sum(a == b for a, b in zip(expected, found, strict=True)) / len(expected)


def wrong_samples(expected: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> float:
    """Samples that did not come, or came in addition; whichever are more."""
    wanted = Counter(name for batch in expected for name in batch)
    came = Counter(name for batch in found for name in batch)
    return float(max((wanted - came).total(), (came - wanted).total()))


def _task(kind: str, name: str, corpus: Corpus, share: Share, **more: Any) -> Task:
    return Task(
        kind=kind,
        contestant=name,
        corpus={**asdict(corpus), "folder": str(corpus.folder)},
        share=asdict(share),
        **more,
    )


def _row(
    figure: str, name: str, values: Sequence[float], unit: str, against: str = "", note: str = ""
) -> Row:
    return Row(
        figure=figure, contestant=name, values=tuple(values), unit=unit, against=against, note=note
    )


def _label(name: str, workers: int) -> str:
    """The contestant's name, with the setting where it is not the recommended one."""
    if workers == MAKERS[name]().workers[0]:
        return name
    return f"{name}, {workers} workers"
