"""One epoch from another place through a cache of limited size: what is downloaded.

The other place is a folder that is read like a remote store. RangeFlow reads it through a store
without local paths; streaming and litdata copy files from it (`shutil.copy`), which is counted.
"""

import importlib
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.data_contestants import WEIGHTS, Feed, Ours, OursFeed, Share, batches_of
from benchmarks.data_corpus import NAMES, Corpus
from benchmarks.data_peers import LitData, Streaming
from data_service.source import open_source
from storage.store import LocalStore

LOOK_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Remote:
    """Where downloads go, how much may be there, and the file in which they are counted."""

    cache: Path
    limit_bytes: int
    log: Path

    def count(self, size_bytes: int) -> None:
        """Add a line; any process may."""
        with open(self.log, "a") as file:
            file.write(f"{size_bytes}\n")


def download_epoch(contestant: str, corpus: Corpus, share: Share, remote: Remote) -> dict[str, Any]:
    """Read nine tenths of an epoch, after which a peer may end; the most bytes in the cache."""
    remote.cache.mkdir(parents=True, exist_ok=True)
    with _Watched(remote.cache) as watched:
        feed = OPENERS[contestant](corpus, share, remote)
        batches = int(corpus.samples * 0.9) // share.batch
        for _ in range(batches):
            feed.next()
    return {"most_bytes": watched.most_bytes, "share_read": batches * share.batch / corpus.samples}


class _RemoteStore(LocalStore):
    """A local folder as a remote store: nothing is read in place, and reads are counted."""

    def __init__(self, folder: Path, remote: Remote) -> None:
        super().__init__(folder)
        self._remote = remote

    def local_path(self, key: str) -> None:
        return None

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        data = super().get(key, start, end)
        if key.startswith("train-"):
            self._remote.count(len(data))
        return data


def _ours(corpus: Corpus, share: Share, remote: Remote) -> Feed:
    cache_module = importlib.import_module("data_service.cache")
    folder = importlib.import_module("data_service.cache_folder").CacheFolder(
        remote.cache, limit_bytes=remote.limit_bytes
    )
    schedule = importlib.import_module("data_service.shard_schedule").ShardSchedule
    cache = cache_module.Cache(folder)
    opened: Callable[..., Any] = open_source
    sources = {
        name: opened(
            name,
            f"remote/{name}",
            store=_RemoteStore(corpus.at(Ours.layout, name), remote),
            cache=cache,
        )
        for name in NAMES
    }
    batches = batches_of(sources, corpus, share)
    cache.follow(schedule(batches), 0)
    return OursFeed(batches, share, 0, before_step=cache.at)


def _streaming(corpus: Corpus, share: Share, remote: Remote) -> Feed:
    from streaming import Stream
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    _count_copies(remote)
    peer = Streaming()
    streams = [
        Stream(
            remote=str(corpus.at(peer.layout, name)),
            local=str(remote.cache / name),
            proportion=weight,
        )
        for name, weight in zip(NAMES, WEIGHTS, strict=True)
    ]
    return peer.loader(streams, share, None, cache_limit=remote.limit_bytes)


def _litdata(corpus: Corpus, share: Share, remote: Remote) -> Feed:
    _count_copies(remote)
    peer = LitData()
    return peer.loader(
        [f"local:{corpus.at(peer.layout, name)}" for name in NAMES],
        corpus,
        share,
        None,
        [  # each dataset has its own folder and limit
            {
                "cache_dir": str(remote.cache / name),
                "max_cache_size": int(remote.limit_bytes * weight),
            }
            for name, weight in zip(NAMES, WEIGHTS, strict=True)
        ],
    )


def _count_copies(remote: Remote) -> None:
    """From now on count what this process, and those that it forks, copy from the other place."""
    copy = shutil.copy

    def counted(source: Any, to: Any, **options: Any) -> Any:
        if not str(source).endswith(".json"):
            remote.count(Path(source).stat().st_size)
        return copy(source, to, **options)

    shutil.copy = counted  # type: ignore[assignment]


class _Watched:
    """The most that a folder held, looked at 50 times a second."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.most_bytes = 0

    def __enter__(self) -> "_Watched":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self.most_bytes = max(self.most_bytes, folder_bytes(self._folder))


def folder_bytes(folder: Path) -> int:
    """What the files below a folder hold, indexes left out; files under way count in full."""
    total = 0
    for path in folder.rglob("*"):
        try:
            size = path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue  # evicted
        total += size if path.suffix != ".json" else 0
    return total


OPENERS: dict[str, Callable[[Corpus, Share, Remote], Feed]] = {
    "rangeflow": _ours,
    "streaming": _streaming,
    "litdata": _litdata,
}
