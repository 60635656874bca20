"""Packages with formats of their own: mosaicml-streaming, litdata, Grain.

Packages are imported where they are used: a benchmark runs with those that are installed.
"""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.data_contestants import (
    SEED,
    WEIGHTS,
    LoaderFeed,
    Share,
    memmap_windows,
    write_memmap,
)
from benchmarks.data_corpus import NAMES, Corpus, linked, windows_view


class Streaming:
    """mosaicml-streaming: MDS shards, streams by proportion, py1e shuffle."""

    module = "streaming"
    layout = "mds"
    workers: tuple[int, ...] = (2, 0)
    mixes = True
    stateful = True
    inelastic = ""

    def write(self, corpus: Corpus, name: str) -> None:
        from streaming import MDSWriter

        folder = corpus.at(self.layout, name)
        row_bytes = 2 * (corpus.context + 1) + 4
        with MDSWriter(
            out=str(folder),
            columns={"tokens": f"ndarray:uint16:{corpus.context + 1}"},
            size_limit=corpus.shard_windows * row_bytes + 4096,
        ) as out:
            for row in windows_view(corpus.tokens(name), corpus.context):
                out.write({"tokens": row})
        if corpus.copies > 1:
            _link_shards(folder, corpus.copies_of(name), "shards", _renamed_mds)

    def open(self, corpus: Corpus, share: Share, state: Any) -> LoaderFeed:
        from streaming import Stream
        from streaming.base.util import clean_stale_shared_memory

        if share.world == 1:
            clean_stale_shared_memory()
        streams = [
            Stream(local=str(corpus.at(self.layout, name)), proportion=weight)
            for name, weight in zip(NAMES, WEIGHTS, strict=True)
        ]
        return self.loader(streams, share, state)

    def loader(self, streams: list[Any], share: Share, state: Any, **options: Any) -> LoaderFeed:
        """The loader of these streams."""
        from streaming import StreamingDataLoader, StreamingDataset

        dataset = StreamingDataset(
            streams=streams,
            batch_size=share.batch,
            shuffle=True,
            shuffle_seed=SEED,
            **options,
        )
        loader = StreamingDataLoader(
            dataset, batch_size=share.batch, num_workers=share.workers, drop_last=True
        )
        if state is not None:
            loader.load_state_dict(state)
        return LoaderFeed(loader, lambda batch: batch["tokens"])

    def state_at(self, corpus: Corpus, share: Share, samples: int) -> Any:
        return {
            "epoch": 0,
            "sample_in_epoch": samples,
            "num_canonical_nodes": 1,
            "shuffle_seed": SEED,
            "initial_physical_nodes": 1,
        }


def _renamed_mds(shard: dict[str, Any], number: int) -> tuple[str, str]:
    before = shard["raw_data"]["basename"]
    shard["raw_data"]["basename"] = f"shard.{number:05d}.mds"
    return before, shard["raw_data"]["basename"]


def _link_shards(
    folder: Path,
    copies: int,
    field: str,
    rename: Callable[[dict[str, Any], int], tuple[str, str]],
) -> None:
    """Let an index.json of one shard name as many, all of them the same file."""
    index = json.loads((folder / "index.json").read_text())
    assert len(index[field]) == 1, f"{folder} has {len(index[field])} shards, a virtual one needs 1"
    for number in range(1, copies):
        shard = copy.deepcopy(index[field][0])
        before, after = rename(shard, number)
        linked(folder / before, after)
        index[field].append(shard)
    (folder / "index.json").write_text(json.dumps(index))


class LitData:
    """litdata: chunks of tokens read by TokensLoader, combined by weight."""

    module = "litdata"
    layout = "litdata"
    workers: tuple[int, ...] = (2, 0)
    mixes = True
    stateful = True
    inelastic = "CombinedStreamingDataset resumes only with the same world size"

    def write(self, corpus: Corpus, name: str) -> None:
        from litdata import TokensLoader
        from litdata.streaming.cache import Cache

        folder = corpus.at(self.layout, name)
        folder.mkdir(parents=True)
        rows = windows_view(corpus.tokens(name), corpus.context)
        writer = Cache(
            str(folder),
            chunk_size=corpus.shard_windows * (corpus.context + 1),
            item_loader=TokensLoader(block_size=corpus.context + 1),
        )
        for number, row in enumerate(rows):
            writer[number] = torch.from_numpy(row.copy())
        writer.done()
        writer.merge()
        if corpus.copies > 1:
            _link_shards(folder, corpus.copies_of(name), "chunks", _renamed_chunk)

    def open(self, corpus: Corpus, share: Share, state: Any) -> LoaderFeed:
        places = [str(corpus.at(self.layout, name)) for name in NAMES]
        return self.loader(places, corpus, share, state, [{}] * len(places))

    def loader(
        self,
        places: list[str],
        corpus: Corpus,
        share: Share,
        state: Any,
        options: Sequence[dict[str, Any]],
    ) -> LoaderFeed:
        """The loader of these places, each with options of its own."""
        from litdata import (
            CombinedStreamingDataset,
            StreamingDataLoader,
            StreamingDataset,
            TokensLoader,
        )

        datasets = [
            StreamingDataset(
                place,
                item_loader=TokensLoader(block_size=corpus.context + 1),
                shuffle=True,
                drop_last=True,
                seed=SEED,
                **more,
            )
            for place, more in zip(places, options, strict=True)
        ]
        combined = CombinedStreamingDataset(
            datasets, seed=SEED, weights=WEIGHTS, iterate_over_all=False
        )
        loader = StreamingDataLoader(combined, batch_size=share.batch, num_workers=share.workers)
        if state is not None:
            loader.load_state_dict(state)
        return LoaderFeed(loader)

    def state_at(self, corpus: Corpus, share: Share, samples: int) -> Any:
        feed = self.open(corpus, share, None)
        workers = max(1, share.workers)
        for _ in range(2 * workers):
            feed.next()
        state = feed.state()
        taken = [int(samples * weight) for weight in WEIGHTS]
        state["num_samples_yielded"] = {
            worker: [count // workers for count in taken] for worker in range(workers)
        }
        for number, count in enumerate(taken):
            state["dataset"][str(number)] |= {
                "num_samples_yielded": count,
                "sample_in_epoch": count,
            }
        return state


def _renamed_chunk(chunk: dict[str, Any], number: int) -> tuple[str, str]:
    before = chunk["filename"]
    chunk["filename"] = f"chunk-0-{number}.bin"
    return before, chunk["filename"]


class Grain:
    """Grain: ArrayRecord files, shuffled and mixed by index."""

    module = "grain.experimental"
    layout = "arrayrecord"
    workers: tuple[int, ...] = (0, 2)
    mixes = True
    stateful = True
    inelastic = ""

    def write(self, corpus: Corpus, name: str) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        folder = corpus.at(self.layout, name)
        folder.mkdir(parents=True)
        rows = windows_view(corpus.tokens(name), corpus.context)
        for number, lo in enumerate(range(0, len(rows), corpus.shard_windows)):
            writer = ArrayRecordWriter(str(folder / f"{number:05d}.array_record"), "group_size:1")
            for row in rows[lo : lo + corpus.shard_windows]:
                writer.write(row.tobytes())
            writer.close()
        for number in range(1, corpus.copies_of(name)):
            linked(folder / "00000.array_record", f"{number:05d}.array_record")

    def open(self, corpus: Corpus, share: Share, state: Any) -> "GrainFeed":
        import grain
        from grain.experimental import ElasticIterator
        from grain.sharding import ShardOptions

        parts = [
            grain.MapDataset.source(self.source(corpus, name)).shuffle(seed=SEED).repeat()
            for name in NAMES
        ]
        mixed = grain.MapDataset.mix(parts, WEIGHTS).map(self.decoded)
        processes = grain.MultiprocessingOptions(num_workers=share.workers)
        if share.elastic:
            found = ElasticIterator(
                mixed,
                share.batch * share.world,
                ShardOptions(shard_index=share.rank, shard_count=share.world),
                read_options=self.read_options(),
                multiprocessing_options=processes if share.workers else None,
            )
        else:
            found = mixed.batch(share.batch).to_iter_dataset(self.read_options())
            if share.workers:
                found = found.mp_prefetch(processes)
        iterator = iter(found)
        if state is not None:
            iterator.set_state(state)
        return GrainFeed(iterator)

    def source(self, corpus: Corpus, name: str) -> Any:
        """Random access to a source's samples."""
        import grain

        paths = sorted(corpus.at(self.layout, name).iterdir())
        return grain.sources.ArrayRecordDataSource([str(path) for path in paths])

    def read_options(self) -> Any:
        """Threads and prefetch; None for Grain's own choice."""
        return None

    @staticmethod
    def decoded(record: Any) -> npt.NDArray[np.uint16]:
        """The tokens of a record."""
        return np.frombuffer(record, dtype=np.uint16)

    def state_at(self, corpus: Corpus, share: Share, samples: int) -> Any:
        feed = self.open(corpus, share, None)
        feed.next()
        state = feed.state()
        feed.close()
        state["next_index"] = samples // (share.batch * share.world)
        return state


class GrainMemmap(Grain):
    """Grain over memmaps, without threads, as it recommends for data that is in memory."""

    layout = "memmap"
    workers: tuple[int, ...] = (0, 2)

    def write(self, corpus: Corpus, name: str) -> None:
        write_memmap(corpus, name)

    def source(self, corpus: Corpus, name: str) -> Any:
        return memmap_windows(corpus, name)

    def read_options(self) -> Any:
        import grain

        return grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)

    @staticmethod
    def decoded(record: Any) -> npt.NDArray[np.uint16]:
        """The row itself."""
        row: npt.NDArray[np.uint16] = record
        return row


class GrainFeed:
    """An open Grain iterator."""

    def __init__(self, iterator: Any) -> None:
        self._iterator = iterator

    def next(self) -> npt.NDArray[np.int64]:
        found: npt.NDArray[np.int64] = next(self._iterator).astype(np.int64)
        return found

    def state(self) -> Any:
        return self._iterator.get_state()

    def close(self) -> None:
        self._iterator.close()
