"""Opens the place at a path or URL: a local folder, or any place that fsspec reaches."""

from pathlib import Path

from storage.contract import ObjectInfo, Store, check_key
from storage.errors import ConfigurationError
from storage.local_store import LocalStore

__all__ = ["LocalStore", "ObjectInfo", "Store", "check_key", "open_store"]


def open_store(url: str) -> Store:
    """The store at a path (`runs/x`, `file:///x`) or an fsspec URL (`memory://x`, `gs://b/x`).

    Credentials come from where the cloud's own tools look. `STORAGE_EMULATOR_HOST` (GCS),
    `AWS_ENDPOINT_URL` (S3) and fsspec's configuration (`FSSPEC_GS_TOKEN=anon`) lead elsewhere.
    """
    if not url:
        raise ConfigurationError(
            "the URL of a store is empty; give a path or a URL such as gs://b/x"
        )
    try:
        url.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair: a byte that is no text
        raise ConfigurationError(
            f"{url!a} is no text in the encoding of this locale, so that no log could name it; "
            "give another place, or set LC_ALL=C.UTF-8 if its name is UTF-8"
        ) from error
    protocol, separator, place = url.partition("://")
    if not separator:
        return LocalStore(Path(url))
    if "@" in place.partition("/")[0]:
        raise ConfigurationError(
            f"the URL of a {protocol} store holds credentials, which would reach logs; give them "
            "through the environment or a configuration file of the cloud"
        )
    if protocol in ("file", "local"):
        return LocalStore(Path(place))
    if "?" in place:
        raise ConfigurationError(
            f"the URL of a {protocol} store has a query (?...), which may hold a signature and "
            "would reach logs; give the plain URL of the place"
        )
    if protocol in ("gs", "gcs", "s3", "s3a") and not place.strip("/"):
        raise ConfigurationError(f"{url} names no bucket; expected {protocol}://BUCKET/PLACE")
    from storage.fsspec_store import FsspecStore  # 0.1 s that a local place need not wait

    return FsspecStore(url)
