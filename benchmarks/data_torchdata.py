"""What torch and Hugging Face give: torchdata's two loaders over memmaps, and datasets.

Packages are imported where they are used: a benchmark runs with those that are installed.
"""

import json
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

ITERABLE_SHARDS = 64
INTERLEAVED_SHARDS = 10  # `max_buffer_input_shards` of IterableDataset.shuffle, its default


class WindowDataset(torch.utils.data.Dataset[torch.Tensor]):
    """The windows of a memmap."""

    def __init__(self, windows: npt.NDArray[np.uint16]) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self._windows[index].copy())


class TorchData:
    """torchdata's StatefulDataLoader over memmaps: one shuffle of all, mixed by size."""

    module = "torchdata.stateful_dataloader"
    layout = "memmap"
    workers: tuple[int, ...] = (2, 0)
    mixes = True
    stateful = True
    inelastic = "not documented: its state is that of one rank's sampler and workers"

    def write(self, corpus: Corpus, name: str) -> None:
        write_memmap(corpus, name)

    def open(self, corpus: Corpus, share: Share, state: Any) -> LoaderFeed:
        return self._open([memmap_windows(corpus, name) for name in NAMES], share, state)

    def state_at(self, corpus: Corpus, share: Share, samples: int) -> Any:
        """The sampler's state is its generator's at the epoch's start, and a count."""
        few = [memmap_windows(corpus, name)[: 64 * share.batch] for name in NAMES]
        feed = self._open(few, share, None)
        feed.next()
        return _advanced(
            feed.state(),
            samples - share.batch,
            share.batch,
            {"samples_yielded", "yielded"},
            {"_sampler_iter_yielded", "_snapshot_step", "_num_yielded"},
        )

    def _open(self, windows: list[Any], share: Share, state: Any) -> LoaderFeed:
        from torchdata.stateful_dataloader import StatefulDataLoader

        loader = StatefulDataLoader(
            torch.utils.data.ConcatDataset([WindowDataset(part) for part in windows]),
            batch_size=share.batch,
            shuffle=True,
            num_workers=share.workers,
            drop_last=True,
            generator=torch.Generator().manual_seed(SEED),
        )
        if state is not None:
            loader.load_state_dict(state)
        return LoaderFeed(loader)


def _advanced(
    state: Any, samples: int, batch: int, counts: set[str], batch_counts: set[str]
) -> Any:
    """A state with its counts of samples and of batches moved on."""
    if not isinstance(state, dict):
        return state
    moved = {}
    for key, value in state.items():
        if key in counts:
            moved[key] = value + samples
        elif key in batch_counts:
            moved[key] = value + samples // batch
        else:
            moved[key] = _advanced(value, samples, batch, counts, batch_counts)
    return moved


class TorchDataNodes:
    """torchdata.nodes: a sampler for each source, mixed by weight, batches read by threads."""

    module = "torchdata.nodes"
    layout = "memmap"
    workers: tuple[int, ...] = (2,)
    mixes = True
    stateful = True
    inelastic = "not documented: every rank samples on its own"

    def write(self, corpus: Corpus, name: str) -> None:
        write_memmap(corpus, name)

    def open(self, corpus: Corpus, share: Share, state: Any) -> LoaderFeed:
        return self._open({name: memmap_windows(corpus, name) for name in NAMES}, share, state)

    def state_at(self, corpus: Corpus, share: Share, samples: int) -> Any:
        """A sampler's state is a count; the generator's is that of the epoch's start."""
        few = {name: memmap_windows(corpus, name)[: 64 * share.batch] for name in NAMES}
        feed = self._open(few, share, None)
        feed.next()
        state = feed.state()
        state["num_yielded"] = samples // share.batch
        mixed = state["root"]["snapshot"]["it_state"]["snapshot"]["source"]
        mixed["num_yielded"] = samples
        for name, weight in zip(NAMES, WEIGHTS, strict=True):
            sampler = mixed["dataset_node_states"][name]["it_state"]["source"]
            sampler["_num_yielded"] = int(samples * weight)
        return state

    def _open(self, windows: dict[str, Any], share: Share, state: Any) -> LoaderFeed:
        from torchdata import nodes

        def read(batch: list[tuple[str, int]]) -> torch.Tensor:
            return torch.from_numpy(np.stack([windows[name][index] for name, index in batch]))

        mixed = nodes.MultiNodeWeightedSampler(
            {name: _sampled(name, part) for name, part in windows.items()},
            dict(zip(NAMES, WEIGHTS, strict=True)),
            stop_criteria="FIRST_DATASET_EXHAUSTED",
            rank=share.rank,
            world_size=share.world,
            seed=SEED,
        )
        batches = nodes.Batcher(mixed, batch_size=share.batch, drop_last=True)
        mapped = nodes.ParallelMapper(batches, read, num_workers=share.workers, method="thread")
        loader = nodes.Loader(nodes.Prefetcher(mapped, prefetch_factor=2))
        if state is not None:
            loader.load_state_dict(state)
        return LoaderFeed(loader)


def _sampled(name: str, windows: Any) -> Any:
    """A node that gives (name, index) in random order."""
    from torchdata import nodes

    generator = torch.Generator().manual_seed(SEED)
    sampler = torch.utils.data.RandomSampler(windows, generator=generator)
    return nodes.Mapper(nodes.SamplerWrapper(sampler), lambda index: (name, index))


class Datasets:
    """Hugging Face datasets: Arrow files as iterable datasets, interleaved by probability."""

    module = "datasets"
    layout = "arrow"
    workers: tuple[int, ...] = (2, 0)
    mixes = True
    stateful = True
    inelastic = "not documented: split_dataset_by_node keeps no position"

    def write(self, corpus: Corpus, name: str) -> None:
        import pyarrow
        from datasets import Dataset
        from datasets.table import InMemoryTable

        folder = corpus.at(self.layout, name)
        rows = windows_view(corpus.tokens(name), corpus.context)
        flat = pyarrow.array(rows.reshape(-1))
        column = pyarrow.FixedSizeListArray.from_arrays(flat, corpus.context + 1)
        table = pyarrow.table({"tokens": column})
        shards = -(-len(rows) // corpus.shard_windows)
        Dataset(InMemoryTable(table)).save_to_disk(str(folder), num_shards=shards)
        if corpus.copies > 1:
            _link_arrow(folder, corpus.copies_of(name))

    def open(self, corpus: Corpus, share: Share, state: Any) -> LoaderFeed:
        from datasets import interleave_datasets, load_from_disk
        from datasets.distributed import split_dataset_by_node

        parts = [
            load_from_disk(str(corpus.at(self.layout, name))).to_iterable_dataset(
                num_shards=ITERABLE_SHARDS
            )
            for name in NAMES
        ]
        mixed = interleave_datasets(parts, probabilities=WEIGHTS, seed=SEED)
        mixed = mixed.shuffle(seed=SEED).with_format("torch")
        if share.world > 1:
            mixed = split_dataset_by_node(mixed, rank=share.rank, world_size=share.world)
        return self.loader(mixed, share, state)

    def loader(self, dataset: Any, share: Share, state: Any) -> LoaderFeed:
        """The StatefulDataLoader that the documentation names for states."""
        from torchdata.stateful_dataloader import StatefulDataLoader

        loader = StatefulDataLoader(
            dataset, batch_size=share.batch, num_workers=share.workers, drop_last=True
        )
        if state is not None:
            loader.load_state_dict(state)
        return LoaderFeed(loader, lambda batch: batch["tokens"])

    def state_at(self, corpus: Corpus, share: Share, samples: int) -> Any:
        """Each part that a worker reads in turn moved on alike; they all are under way by then."""
        feed = self.open(corpus, share, None)
        for _ in range(4 * max(1, share.workers)):
            feed.next()
        state = feed.state()
        lengths = [corpus.windows_of(name) * corpus.copies_of(name) for name in NAMES]
        shards = [length // ITERABLE_SHARDS for length in lengths]
        readers = INTERLEAVED_SHARDS * max(1, share.workers)
        places = [
            divmod(int(samples * weight) // readers, shard)
            for weight, shard in zip(WEIGHTS, shards, strict=True)
        ]
        _move_readers(state, places)
        return state


def _move_readers(state: Any, places: list[tuple[int, int]], source: int = -1) -> None:
    """Set (shard, example) of each reader of a source, wherever they are in the state."""
    if not isinstance(state, dict):
        return
    if state.get("type") == "ArrowExamplesIterable":
        state["shard_idx"], state["shard_example_idx"] = places[source]
        return
    mixes = state.get("type") == "RandomlyCyclingMultiSourcesExamplesIterable"
    for key, value in state.items():
        if key == "previous_states":
            for number, part in enumerate(value):
                _move_readers(part, places, number if mixes else source)
        else:
            _move_readers(value, places, source)


def _link_arrow(folder: Path, copies: int) -> None:
    """Let a saved dataset of one file name as many, all of them the same file."""
    state = json.loads((folder / "state.json").read_text())
    (first,) = [entry["filename"] for entry in state["_data_files"]]
    for number in range(1, copies):
        linked(folder / first, f"data-copy-{number:05d}.arrow")
        state["_data_files"].append({"filename": f"data-copy-{number:05d}.arrow"})
    (folder / "state.json").write_text(json.dumps(state))


class DatasetsMapStyle(Datasets):
    """Hugging Face datasets: the same files at random access, shuffled, interleaved by indices."""

    def open(self, corpus: Corpus, share: Share, state: Any) -> LoaderFeed:
        from datasets import interleave_datasets, load_from_disk

        parts = [
            load_from_disk(str(corpus.at(self.layout, name))).shuffle(seed=SEED) for name in NAMES
        ]
        mixed = interleave_datasets(parts, probabilities=WEIGHTS, seed=SEED).with_format("torch")
        return self.loader(mixed, share, state)
