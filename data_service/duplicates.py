"""Exact duplicates, over all inputs: which documents occur earlier, whatever the order of work.

A first pass notes a hash of each document's normalised text (16 bytes of its sha256), one object
per batch, sorted; then each share of the hashes is sorted on its own and gives the documents to
leave out. All that is ever in memory is a batch, or a share. Objects begin with a directory
(where each share, or each unit, begins; uint64).
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data_service.chat import rendered_text
from data_service.inputs import Document
from data_service.validation_split import normalise
from storage.store import Store

_NOTED = np.dtype([("high", "<u8"), ("low", "<u8"), ("ordinal", "<u8")])
_SHARE_BYTES = 1 << 28

Noted = npt.NDArray[np.void]


def shares_for(text_bytes: int) -> int:
    """Into how many shares the hashes of so much text are cut."""
    return 1 + text_bytes // _SHARE_BYTES


def document_hash(document: Document) -> tuple[int, int]:
    """128 bits of the sha256 of the normalised text, in two halves."""
    text = document if isinstance(document, str) else rendered_text(document)
    digest = hashlib.sha256(normalise(text).encode()).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")


def note_bytes(hashes: Sequence[tuple[int, int, int]], shares: int) -> bytes:
    """The object of a batch; `hashes` are (high, low, ordinal of the document in its unit)."""
    noted = np.array(hashes, dtype=_NOTED)
    noted = noted[np.lexsort((noted["ordinal"], noted["low"], noted["high"]))]
    borders = np.array([(share << 64) // shares for share in range(1, shares)], dtype=np.uint64)
    starts = [0, *np.searchsorted(noted["high"], borders).tolist(), noted.size]
    return _with_directory(starts, _NOTED.itemsize, noted.tobytes())


def find_duplicates(
    store: Store, notes: Sequence[tuple[int, str]], share: int, units: int
) -> bytes:
    """The object of a share: the ordinals to leave out, by unit.

    `notes` are (unit, key of the object), in the order of the inputs.
    """
    parts = [_noted(store, key, share) for _, key in notes]
    noted = np.concatenate(parts) if parts else np.zeros(0, dtype=_NOTED)
    places = np.repeat([unit for unit, _ in notes], [part.size for part in parts])
    order = np.lexsort((noted["ordinal"], places, noted["low"], noted["high"]))
    noted, places = noted[order], places[order]
    same = (noted["high"][1:] == noted["high"][:-1]) & (noted["low"][1:] == noted["low"][:-1])
    late = np.flatnonzero(np.append(False, same))
    late = late[np.argsort(places[late], kind="stable")]
    starts = np.searchsorted(places[late], np.arange(units + 1)).tolist()
    return _with_directory(starts, 8, noted["ordinal"][late].astype("<u8").tobytes())


def duplicates_in(store: Store, keys: Sequence[str], unit: int) -> frozenset[int]:
    """The ordinals of a unit's documents to leave out, from the objects of all shares."""
    parts = [np.frombuffer(_entry(store, key, unit), dtype="<u8") for key in keys]
    return frozenset(ordinal for part in parts for ordinal in part.tolist())


def _noted(store: Store, key: str, share: int) -> Noted:
    found: Noted = np.frombuffer(_entry(store, key, share), dtype=_NOTED)
    return found


def _with_directory(starts: Sequence[int], item_bytes: int, data: bytes) -> bytes:
    directory = 8 * len(starts) + np.array(starts, dtype=np.int64) * item_bytes
    return directory.astype("<u8").tobytes() + data


def _entry(store: Store, key: str, number: int) -> bytes:
    lo, hi = np.frombuffer(store.get(key, 8 * number, 8 * number + 16), dtype="<u8").tolist()
    return store.get(key, lo, hi) if lo < hi else b""
