"""A place that holds objects under keys: the contract, local folders, and any fsspec URL.

Covers: atomic creation, whole objects or none, sorted listings, keys that cannot leave the place.
Does not cover: retries of a network (issue of object storage), or a store that lies; `probe.py`
finds a store whose creation does not exclude a second writer.
"""

import errno
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec

from storage.errors import ConfigurationError, StoreUnavailableError

_KEY_PART = re.compile(r"[A-Za-z0-9_+=-][A-Za-z0-9._+=-]*")
_TEMPORARY = ".tmp"
_TEMPORARY_LIFE_SECONDS = 3600.0
_FOLDER_ATTEMPTS = 100

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectInfo:
    """What a store says of an object without reading it."""

    size_bytes: int


class Store(Protocol):
    """Objects under keys. A key is parts of letters, digits and `._+=-`, joined by `/`.

    Every method raises `StoreUnavailableError` when the place fails, and `ConfigurationError` for
    a key that is not one.
    """

    url: str
    creates_atomically: bool
    """False when a crash inside `put_if_absent` can leave a torn object (no hard links here)."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create the object, whole and durable. False, and no change, when the key exists."""

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write the whole object durably, replacing one of that key, which nobody else writes."""

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes [start, end) of the object. Raises FileNotFoundError when there is none."""

    def list(self, prefix: str, start_after: str = "") -> list[str]:
        """All keys that begin with `prefix` and sort after `start_after`, sorted."""

    def delete(self, key: str) -> None:
        """Remove the object; that there is none is not an error."""

    def stat(self, key: str) -> ObjectInfo:
        """Size of the object. Raises FileNotFoundError when there is none."""

    def local_path(self, key: str) -> Path | None:
        """A file that can be mapped into memory, or None when the objects are not files here."""


def open_store(url: str) -> Store:
    """The store at a path (`runs/x`, `file:///x`) or an fsspec URL (`memory://x`, `gs://b/x`)."""
    if not url:
        raise ConfigurationError(
            "the URL of a store is empty; give a path or a URL such as gs://b/x"
        )
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise ConfigurationError(
            f"the URL of a {url.partition('://')[0]} store holds credentials, which would reach "
            "logs; give them through the environment or a configuration file of the cloud"
        )
    if "://" not in url:
        return LocalStore(Path(url))
    for prefix in ("file://", "local://"):
        if url.startswith(prefix):
            return LocalStore(Path(url.removeprefix(prefix)))
    return FsspecStore(url)


def check_key(key: str) -> str:
    """The key, or ConfigurationError when it could name something outside the store."""
    parts = key.split("/")
    if not all(_KEY_PART.fullmatch(part) for part in parts):
        raise ConfigurationError(
            f"{key!r} is not a key: expected parts of letters, digits and '._+=-' joined by '/', "
            "none beginning with a dot"
        )
    return key


class LocalStore:
    """A folder. Creation is atomic by `os.link`, which never overwrites; files are fsynced."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.url = str(root)
        self.creates_atomically = True
        self._swept = False

    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self.root / check_key(key)
        with _translated(self.url, key):
            if path.exists():
                return False
            with self._temporary(data) as temporary:
                return _in_folder(path, lambda: self._link(temporary, path, data))

    def put(self, key: str, data: bytes | memoryview) -> None:
        path = self.root / check_key(key)
        with _translated(self.url, key), self._temporary(data) as temporary:
            _in_folder(path, lambda: os.replace(temporary, path))

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        with _translated(self.url, key), open(self.root / check_key(key), "rb") as file:
            file.seek(start)
            return file.read() if end is None else file.read(max(0, end - start))

    def list(self, prefix: str, start_after: str = "") -> list[str]:
        folder = self.root / prefix.rpartition("/")[0]
        with _translated(self.url, prefix):
            keys = [path.relative_to(self.root).as_posix() for path in _files(folder)]
        return sorted(key for key in keys if key.startswith(prefix) and key > start_after)

    def delete(self, key: str) -> None:
        path = self.root / check_key(key)
        with _translated(self.url, key):
            path.unlink(missing_ok=True)
            for folder in path.relative_to(self.root).parents[:-1]:
                try:
                    (self.root / folder).rmdir()
                except OSError:
                    return  # not empty: somebody else's objects

    def stat(self, key: str) -> ObjectInfo:
        with _translated(self.url, key):
            return ObjectInfo(size_bytes=os.stat(self.root / check_key(key)).st_size)

    def local_path(self, key: str) -> Path | None:
        return self.root / check_key(key)

    def _link(self, temporary: Path, path: Path, data: bytes) -> bool:
        """Give the file its name unless the name is taken; False when it is."""
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            self.creates_atomically = False  # no hard links here (Google Drive, FAT)
            return _create_exclusively(path, data)
        return True

    @contextmanager
    def _temporary(self, data: bytes | memoryview) -> Iterator[Path]:
        """A synced file with `data` on the store's disk, gone at the end whatever happens."""
        folder = self.root / _TEMPORARY
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / uuid.uuid4().hex
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._sweep_temporaries(temporary)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _sweep_temporaries(self, newest: Path) -> None:
        """Once, remove what killed writers left; ages by the file system's own clock."""
        if self._swept:
            return
        self._swept = True
        now = newest.stat().st_mtime
        for path in newest.parent.iterdir():
            try:
                if now - path.stat().st_mtime > _TEMPORARY_LIFE_SECONDS:
                    path.unlink()
            except FileNotFoundError:
                continue  # its writer, or another sweeper, was faster


class FsspecStore:
    """Any place that fsspec reaches; creation relies on `pipe_file(mode="create")`."""

    def __init__(self, url: str) -> None:
        protocol = url.partition("://")[0]
        try:
            self._fs: Any = fsspec.filesystem(
                protocol, use_listings_cache=False, skip_instance_cache=True
            )
            self._root: str = self._fs._strip_protocol(url).rstrip("/")
        except (ImportError, ValueError, TypeError, AttributeError, OSError) as error:
            raise ConfigurationError(f"no store for {protocol}:// URLs: {error}") from error
        self.url = url
        self.creates_atomically = True

    def put_if_absent(self, key: str, data: bytes) -> bool:
        try:
            with _translated(self.url, key):
                self._fs.pipe_file(self._path(key), bytes(data), mode="create")
        except FileExistsError:
            return False
        return True

    def put(self, key: str, data: bytes | memoryview) -> None:
        with _translated(self.url, key):
            self._fs.pipe_file(self._path(key), bytes(data))

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        with _translated(self.url, key):
            data: bytes = self._fs.cat_file(self._path(key), start=start or None, end=end)
        return data

    def list(self, prefix: str, start_after: str = "") -> list[str]:
        folder = f"{self._root}/{prefix.rpartition('/')[0]}".rstrip("/")
        try:
            with _translated(self.url, prefix):
                paths = self._fs.find(folder)
        except FileNotFoundError:
            return []
        keys = [path[len(self._root) :].lstrip("/") for path in paths]
        return sorted(key for key in keys if key.startswith(prefix) and key > start_after)

    def delete(self, key: str) -> None:
        try:
            with _translated(self.url, key):
                self._fs.rm_file(self._path(key))
        except FileNotFoundError:
            return

    def stat(self, key: str) -> ObjectInfo:
        with _translated(self.url, key):
            return ObjectInfo(size_bytes=int(self._fs.info(self._path(key))["size"]))

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"


@contextmanager
def _translated(url: str, key: str) -> Iterator[None]:
    """Turns what a place raises into our errors; "there is none" and "exists" stay as they are."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except (NotImplementedError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{url} cannot hold objects: {error or type(error)}") from error
    except NotADirectoryError as error:
        raise ConfigurationError(f"{url} is a file, expected a folder, or a new place") from error
    except OSError as error:
        what = os.strerror(error.errno) if error.errno else type(error).__name__
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "no space left; free some or move the run, then start again"
        raise StoreUnavailableError(f"{url}: {key}: {what}") from error


def _create_exclusively(path: Path, data: bytes) -> bool:
    """Not atomic: a crash leaves a torn file, which a log record's own digest makes invisible."""
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def _in_folder(path: Path, name_file: Callable[[], Result]) -> Result:
    """Do what gives `path` its file, in a folder that a deleter may be taking away meanwhile."""
    for _ in range(_FOLDER_ATTEMPTS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            result = name_file()
            _sync_folder(path.parent)
            return result
        except FileNotFoundError:
            continue
    raise OSError(errno.EIO, f"the folder of {path} cannot be made")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _files(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.name == _TEMPORARY:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        else:
            yield Path(entry.path)
