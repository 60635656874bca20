"""Loaders behind one shape: write the corpus, open it, the next batch, the state to resume from.

RangeFlow and nanoGPT's memmap are here, the packages in `data_peers.py` and `data_torchdata.py`.
Each is used as its own documentation shows; where that leaves a choice, the faster one was taken.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.data_corpus import NAMES, SHARES, Corpus, Rows, linked, windows_view
from data_service.batches import Batches
from data_service.loader import Loader
from data_service.plan import Plan, PlanSource, Segment
from data_service.shard_format import ENDS_DTYPE, npy_bytes
from data_service.source import Source, open_source
from data_service.source_index import ShardEntry, SourceIndex, write_index
from data_service.tokenizer import make_tokenizer
from data_service.validation_split import ValidationStamp
from storage.canonical import sha256_hex
from storage.store import LocalStore

SEED = 1
WEIGHTS = [SHARES[name] / 1_000_000 for name in NAMES]
VALIDATION_WINDOWS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one process loads: `batch` sequences a step, one rank of a world."""

    batch: int
    workers: int
    rank: int = 0
    world: int = 1
    elastic: bool = False
    """Whether the state is to be used in a world of another size."""


class Feed(Protocol):
    """An open loader. All calls on the training thread."""

    def next(self) -> Any:
        """The next batch in this process, int64: (B, T+1), or a pair of (B, T)."""

    def state(self) -> Any:
        """What to keep so that another process goes on after the last batch."""

    def close(self) -> None:
        """End threads and processes."""


class Contestant(Protocol):
    """One loader."""

    module: str
    """What is imported before the clock runs, and must be installed; "" for nothing."""
    layout: str
    """The folder of its format; those who share one share the files."""
    workers: tuple[int, ...]
    """Settings that are tried, the recommended one first; processes, 0 for none."""
    mixes: bool
    """Whether it mixes sources by weight or by size, and shuffles."""
    stateful: bool
    """Whether a state brings it back to a position."""
    inelastic: str
    """Why a state cannot be used in a world of another size; "" where documented that it can."""

    def write(self, corpus: Corpus, name: str) -> None:
        """Keep one source's windows in `corpus.at(layout)`."""

    def open(self, corpus: Corpus, share: Share, state: Any) -> Feed:
        """From the start, or from a state."""

    def state_at(self, corpus: Corpus, share: Share, samples: int) -> Any:
        """The state after that many samples of the world, which nobody waits for."""


def installed(contestant: Contestant) -> bool:
    """Whether the contestant can run here."""
    package = contestant.module.partition(".")[0]
    return not package or importlib.util.find_spec(package) is not None


def rows_of(batch: Any) -> Rows:
    """(B, T+1) int64, whatever the form of a batch."""
    if isinstance(batch, tuple):
        inputs, targets = batch
        batch = torch.cat([inputs, targets[:, -1:]], dim=1)
    rows: Rows = batch.numpy() if isinstance(batch, Tensor) else batch
    return rows


class LoaderFeed:
    """A loader with `state_dict`; its batches are turned to int64 in this process.

    What crosses from worker processes is 16 bits a token: faster than int64 made by workers.
    """

    def __init__(self, loader: Any, tokens: Callable[[Any], Any] = lambda batch: batch) -> None:
        self._loader, self._tokens = loader, tokens
        self._batches: Iterator[Any] | None = None

    def next(self) -> Any:
        if self._batches is None:
            self._batches = iter(self._loader)
        return self._tokens(next(self._batches)).to(torch.int64)

    def state(self) -> Any:
        return self._loader.state_dict()

    def close(self) -> None:
        self._batches = None
        self._loader = None


class OursFeed:
    """RangeFlow's Loader: one thread ahead of training."""

    def __init__(self, batches: Batches, share: Share, step: int, **options: Any) -> None:
        self._batches = batches
        self._step = step
        lo = share.rank * share.batch
        self._loader = Loader(batches, [(lo, lo + share.batch)], start_step=step, **options)

    def next(self) -> Rows:
        rows = self._loader.next(self._step).tokens
        self._step += 1
        return rows

    def state(self) -> dict[str, object]:
        return self._batches.cursor(self._step)

    def close(self) -> None:
        self._loader.close()


class Ours:
    """RangeFlow."""

    module = ""
    layout = "rangeflow"
    workers: tuple[int, ...] = (0,)
    mixes = True
    stateful = True
    inelastic = ""

    def write(self, corpus: Corpus, name: str) -> None:
        folder = corpus.at(self.layout, name)
        folder.mkdir(parents=True)
        tokens = corpus.tokens(name)
        windows, step = corpus.windows_of(name), corpus.shard_windows
        entries = []
        for number, lo in enumerate(range(0, windows, step)):
            hi = min(windows, lo + step)
            part = tokens[lo * corpus.context : hi * corpus.context + 1]
            entries.append(_write_shard(folder, f"train-{number:06d}", part))
        for number in range(1, corpus.copies_of(name)):
            shard = f"train-{number:06d}"
            for key in (entries[0].tokens_key, entries[0].ends_key):
                linked(folder / key, key.replace(entries[0].name, shard))
            entries.append(replace(entries[0], name=shard))
        held_out = _write_shard(
            folder, "validation-0", tokens[: VALIDATION_WINDOWS * corpus.context + 1]
        )
        tokenizer = make_tokenizer("bytes")
        index = SourceIndex(
            tokenizer=tokenizer.spec(),
            tokenizer_fingerprint=tokenizer.fingerprint,
            dtype="uint16",
            train=tuple(entries),
            validation=(held_out,),
            stamp=ValidationStamp(permille=10),
        )
        write_index(LocalStore(folder), index)

    def open(self, corpus: Corpus, share: Share, state: Any) -> OursFeed:
        batches = self._batches(corpus, share)
        return OursFeed(batches, share, 0 if state is None else batches.check_cursor(state))

    def state_at(self, corpus: Corpus, share: Share, samples: int) -> dict[str, object]:
        return self._batches(corpus, share).cursor(samples // (share.batch * share.world))

    def _batches(self, corpus: Corpus, share: Share) -> Batches:
        sources = {name: open_source(name, str(corpus.at(self.layout, name))) for name in NAMES}
        return batches_of(sources, corpus, share)


def batches_of(sources: Mapping[str, Source], corpus: Corpus, share: Share) -> Batches:
    """The sources mixed by their shares."""
    planned = tuple(
        PlanSource(
            name=name,
            url=source.url,
            fingerprint=source.fingerprint,
            weights=((0, SHARES[name]),),
        )
        for name, source in sources.items()
    )
    return Batches(
        plan=Plan(segments=(Segment(from_step=0, sources=planned),)),
        sources=sources,
        seed=SEED,
        context=corpus.context,
        global_batch_size=share.batch * share.world,
    )


def _write_shard(folder: Path, name: str, tokens: npt.NDArray[np.uint16]) -> ShardEntry:
    data = npy_bytes(tokens.astype("<u2", copy=False))
    ends = npy_bytes(np.array([tokens.size], dtype=ENDS_DTYPE))
    entry = ShardEntry(
        name=name,
        tokens=tokens.size,
        bytes=len(data),
        sha256=sha256_hex(data),
        documents=1,
        ends_bytes=len(ends),
        ends_sha256=sha256_hex(ends),
    )
    (folder / entry.tokens_key).write_bytes(data)
    (folder / entry.ends_key).write_bytes(ends)
    return entry


def write_memmap(corpus: Corpus, name: str) -> None:
    """`<name>.bin`: the bare tokens; a virtual one is a hole of the right length."""
    folder = corpus.at("memmap")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.bin", "wb") as file:
        _append_tokens(corpus, name, file)


def _append_tokens(corpus: Corpus, name: str, file: BinaryIO) -> None:
    if corpus.copies == 1:
        file.write(corpus.tokens(name).tobytes())
        return
    windows = corpus.windows_of(name) * corpus.copies_of(name)
    file.truncate(file.seek(0, os.SEEK_END) + 2 * (windows * corpus.context + 1))


def memmap_windows(corpus: Corpus, name: str) -> npt.NDArray[np.uint16]:
    """(windows, T+1): a source's windows, mapped."""
    tokens = np.memmap(corpus.at("memmap") / f"{name}.bin", dtype=np.uint16, mode="r")
    return windows_view(tokens, corpus.context)


class NanoGptFeed:
    """nanoGPT's `get_batch` (train.py), with its memmap made anew for each batch."""

    def __init__(self, path: Path, context: int, share: Share) -> None:
        self._path, self._context, self._share = path, context, share
        torch.manual_seed(1337 + share.rank)  # as train.py

    def next(self) -> tuple[Tensor, Tensor]:
        data = np.memmap(self._path, dtype=np.uint16, mode="r")
        size = self._context
        starts = torch.randint(len(data) - size, (self._share.batch,))
        x = torch.stack([torch.from_numpy(data[i : i + size].astype(np.int64)) for i in starts])
        y = torch.stack(
            [torch.from_numpy(data[i + 1 : i + 1 + size].astype(np.int64)) for i in starts]
        )
        return x, y

    def state(self) -> None:
        """Its checkpoints hold no state of the data."""

    def close(self) -> None:
        return


class NanoGpt:
    """nanoGPT's memmap: random windows of one file, with replacement."""

    module = ""
    layout = "nanogpt"
    workers: tuple[int, ...] = (0,)
    mixes = False
    stateful = False
    inelastic = "its checkpoints hold no position in the data"

    def write(self, corpus: Corpus, name: str) -> None:
        """All sources, one after the other, in one file."""
        path = corpus.at(self.layout) / "train.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            _append_tokens(corpus, name, file)

    def open(self, corpus: Corpus, share: Share, state: Any) -> NanoGptFeed:
        return NanoGptFeed(corpus.at(self.layout) / "train.bin", corpus.context, share)

    def state_at(self, corpus: Corpus, share: Share, samples: int) -> None:
        return
