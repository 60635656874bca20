"""The tokens that every loader reads, and the places where each keeps them in its own format.

Three sources whose sizes are their shares, so that one epoch is one pass over all. Tokens of source
k lie in [80 k, 80 k + 80): a row tells where it comes from. Window w of a source is the T+1 tokens
from w*T, and every format holds the same windows as its samples.

A *virtual* corpus is longer than any disk: one file in each format, under as many names (hard
links) as the length asks for. It shows what opening and seeking cost, not what reading costs.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

SHARES = {"web": 500_000, "books": 300_000, "code": 200_000}
"""Parts per million."""
NAMES = tuple(SHARES)

TOKENS_OF_SOURCE = 80
SHARD_TOKENS = 10_000_000

Windows = npt.NDArray[np.uint16]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Windows of `context` + 1 tokens; of each source `windows`, then the same again."""

    folder: Path
    context: int
    windows: int
    """Windows on disk, all sources together."""
    shard_windows: int
    """The most windows in one file, in the formats that have several."""
    copies: int = 1
    """How often each file appears; above 1 a virtual corpus, with one file in each source."""

    def windows_of(self, name: str) -> int:
        """Windows of a source on disk."""
        if self.copies > 1:
            return self.shard_windows
        return self.windows * SHARES[name] // 1_000_000

    def copies_of(self, name: str) -> int:
        """How often a source's files appear."""
        return self.copies * SHARES[name] // 1_000_000 if self.copies > 1 else 1

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return sum(self.windows_of(name) * self.copies_of(name) for name in NAMES)

    def tokens(self, name: str) -> Windows:
        """(windows * T + 1,) uint16: a source from end to end, the same at every call."""
        rng = np.random.default_rng(NAMES.index(name) + 1)
        count = self.windows_of(name) * self.context + 1
        first = NAMES.index(name) * TOKENS_OF_SOURCE
        return rng.integers(first, first + TOKENS_OF_SOURCE, size=count, dtype=np.uint16)

    def at(self, layout: str, name: str = "") -> Path:
        """Where a format keeps a source."""
        return self.folder / layout / name


def windows_view(tokens: Windows, context: int) -> Windows:
    """(windows, T+1) uint16: a view, in which neighbours share a token."""
    view: Windows = np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[::context]
    return view


def linked(path: Path, name: str) -> None:
    """The same file under another name."""
    os.link(path, path.with_name(name))


def sources_of(rows: Rows) -> npt.NDArray[np.int64]:
    """The number of the source of each row, in the order of NAMES."""
    found: npt.NDArray[np.int64] = rows[:, 0] // TOKENS_OF_SOURCE
    return found


def identities(rows: Rows) -> list[str]:
    """One name for each row, the same for the same tokens."""
    return [hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in rows]
