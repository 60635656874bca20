"""Remote data of a run: the cache of this host, opened when it is needed, and how data comes."""

import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from data_service.batches import Batches
from data_service.cache import Cache
from data_service.cache_folder import CacheFolder
from data_service.plan import check_source_name
from data_service.shard_schedule import ShardSchedule
from data_service.source import Source, open_source
from launch.config import RunConfig
from storage.errors import ConfigurationError
from storage.store import open_store

logger = logging.getLogger(__name__)

MOST_GIGABYTES = 30.0
FREE_SHARE = 0.8
"""Of the disk's free space, what a cache without a size takes at most."""
_TELL_SECONDS = 60.0


class RemoteData:
    """Opens the sources of a run; those that are not on this host through its cache.

    Use it with `with`. `waited_seconds` gives how long data has been waited for so far.
    """

    def __init__(self, config: RunConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._cache: Cache | None = None
        self._alternates = dict(_alternate(text) for text in config.data_alternate)
        self._told: tuple[float, float] = (clock(), 0.0)  # when, and the wait until then
        self._counted = 0.0
        self.waited_seconds: Callable[[], float] = lambda: 0.0

    def __enter__(self) -> "RemoteData":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End downloads, and waits for them; closing twice is fine."""
        if self._cache is not None:
            self._cache.close()

    def open(self, name: str, url: str) -> Source:
        """The source at a URL."""
        store = open_store(url)
        remote = store.local_path("index.json") is None
        alternate = self._alternates.get(name)
        return open_source(
            name,
            url,
            store=store,
            cache=self._opened() if remote else None,
            alternates=[open_store(alternate)] if alternate else [],
        )

    def check(self, batches: Batches) -> None:
        """Raise ConfigurationError when the cache is too small for them, or a flag names none."""
        unknown = self._alternates.keys() - batches.sources.keys()
        if unknown:
            raise ConfigurationError(
                f"--data_alternate names {', '.join(sorted(unknown))}, which is no source of this "
                f"run; there are {', '.join(batches.sources)}"
            )
        if self._cache is not None:
            self._cache.check(ShardSchedule(batches))

    def follow(self, batches: Batches, step: int) -> None:
        """Fetch ahead what the batches read from `step` on."""
        if self._cache is not None:
            self._cache.follow(ShardSchedule(batches), step)

    def at(self, step: int) -> None:
        """The step that is read now."""
        if self._cache is not None:
            self._cache.at(step)

    def measured(self) -> dict[str, float]:
        """For the row of a step: what was waited since the last call, and how the cache does."""
        waited = self.waited_seconds()
        row = {"data_wait_seconds": round(waited - self._counted, 4)}
        self._counted = waited
        if self._cache is not None:
            report = self._cache.report()
            row["data_cache_hit_rate"] = round(report.hit_rate, 4)
            row["data_downloaded_megabytes"] = round(report.downloaded_bytes / 1e6, 3)
            since, before = self._told
            if self._clock() - since >= _TELL_SECONDS:
                self._told = self._clock(), waited
                logger.info(
                    "data: waited %.1f s of the last %.0f; %s",
                    waited - before,
                    self._clock() - since,
                    report,
                )
        return row

    def beat(self) -> dict[str, Any]:
        """For the heartbeat: how data comes."""
        said: dict[str, Any] = {"data_wait_seconds": round(self.waited_seconds(), 1)}
        return said | ({"cache": str(self._cache.report())} if self._cache is not None else {})

    def _opened(self) -> Cache:
        if self._cache is None:
            folder = cache_folder(self._config.cache_dir, self._config.cache_gigabytes)
            logger.info(
                "remote shards are kept in %s, up to %.1f GB",
                folder.folder,
                folder.limit_bytes / 1e9,
            )
            run = self._config.run
            group = run if "://" in run else str(Path(run).absolute())
            self._cache = Cache(folder, group=group)
        return self._cache


def cache_folder(folder: str, gigabytes: float, *, home: Path | None = None) -> CacheFolder:
    """The folder that is configured, or one of this user's; with a size that fits on its disk."""
    place = Path(folder) if folder else _default_folder(home)
    limit = int(gigabytes * 1e9)
    if not limit:
        found = CacheFolder(place, limit_bytes=0)
        free = shutil.disk_usage(found.folder).free
        limit = int(min(MOST_GIGABYTES * 1e9, FREE_SHARE * (free + found.used_bytes())))
    return CacheFolder(place, limit_bytes=limit)


def _default_folder(home: Path | None) -> Path:
    """Below the home folder, or with temporary files where nothing can be written there."""
    try:
        below_home = (Path.home() if home is None else home) / ".cache" / "rangeflow"
        below_home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=below_home):
            return below_home
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return Path(tempfile.gettempdir()) / "rangeflow"


def _alternate(text: str) -> tuple[str, str]:
    name, equals, url = text.partition("=")
    if not equals or not url:
        raise ConfigurationError(f"--data_alternate must be NAME=URL, got {text!r}")
    check_source_name(name)
    return name, url
