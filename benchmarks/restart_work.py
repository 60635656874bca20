"""What the peers of benchmarks/restart.py train: the model of the preset `tiny`, on the same text.

Sample i is window i of the run's own corpus. Peers read it as the fastest of them would: a memory
map, in which every window can be reached at once.
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from trainer.model import GPT, ModelConfig, initial_model

VOCABULARY = 257
BATCH = 16
_CONFIG = ModelConfig()


class Windows(Dataset[tuple[int, Tensor]]):
    """The first `count` windows of a folder of shards: (sample, (T+1,) int64)."""

    def __init__(self, corpus: Path, count: int) -> None:
        paths = sorted(corpus.glob("*/train-*.npy"))
        shards = [np.load(path, mmap_mode="r") for path in paths if ".ends" not in path.name]
        self._count = count
        self._size = _CONFIG.context + 1
        self._windows = [
            shard[: len(shard) // self._size * self._size].reshape(-1, self._size)
            for shard in shards
        ]
        self._total = sum(len(shard) for shard in self._windows)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, sample: int) -> tuple[int, Tensor]:
        place = sample * 7919 % self._total  # a prime: all over the corpus
        for shard in self._windows:
            if place < len(shard):
                return sample, torch.from_numpy(shard[place].astype(np.int64))
            place -= len(shard)
        raise AssertionError("the place is below the total")

    def rows(self, samples: list[int]) -> Tensor:
        """(B, T+1) int64."""
        return torch.stack([self[sample][1] for sample in samples])


def make_model() -> GPT:
    """As the preset `tiny` makes it; on one thread, as it trains."""
    torch.set_num_threads(1)
    return initial_model(_CONFIG, VOCABULARY, seed=1)


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """torch's fused AdamW, as the preset has it."""
    return torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), fused=True)


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """The mean loss of a batch."""
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def of_environment(name: str, default: int) -> int:
    """A number that torchrun tells."""
    return int(os.environ.get(name, default))
