"""The ledger of a preparation: which batches of work are done, bound to inputs and settings.

`ledger/binding.json` is written first and says what is prepared and how; `ledger/<batch>.json`
after the objects of a batch, and names them. So at any kill a batch is done or is done again, and
work under other settings is refused instead of mixed in. Batches may be done in any order, by
several processes.
"""

import json
from collections.abc import Mapping
from typing import Any

from storage.canonical import canonical_json, sha256_hex
from storage.errors import ConfigurationError
from storage.store import Store

BINDING_KEY = "ledger/binding.json"


class BindingError(ConfigurationError):
    """The place holds a preparation of other inputs, or with other settings."""


def bound_ledger(store: Store, binding: Mapping[str, object]) -> "Ledger":
    """Bind the store to `binding`; BindingError, naming what differs, if it is bound already.

    `binding` is {"inputs": [{path, size_bytes, sha256}], "settings": {...}}.
    """
    data = canonical_json(dict(binding))
    ledger = Ledger(store, sha256_hex(data))
    if store.put_if_absent(BINDING_KEY, data):
        return ledger
    found = store.get(BINDING_KEY)
    if found == data:
        return ledger
    try:
        earlier = json.loads(found)
    except ValueError:
        store.put(BINDING_KEY, data)  # torn by a kill where creation is not atomic
        return ledger
    raise BindingError(
        f"{store.url} holds a preparation with {_difference(earlier, binding)}; "
        "prepare into another --out, or delete that folder first"
    )


class Ledger:
    """The batches that are done of the preparation whose binding has this sha256."""

    def __init__(self, store: Store, binding: str) -> None:
        self.binding = binding
        self._store = store

    def done(self, batch: str) -> dict[str, Any] | None:
        """What `finish` recorded for a batch, or None if it is not done."""
        try:
            record = json.loads(self._store.get(f"ledger/{batch}.json"))
        except (FileNotFoundError, ValueError):  # none, or torn where writing is not atomic
            return None
        if not isinstance(record, dict) or record.get("binding") != self.binding:
            return None
        return record

    def finish(self, batch: str, record: Mapping[str, object]) -> None:
        """The commit of a batch: its objects must be in the store by now."""
        data = canonical_json({**record, "binding": self.binding})
        self._store.put(f"ledger/{batch}.json", data)


def _difference(earlier: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    old, new = earlier.get("settings"), wanted.get("settings")
    if isinstance(old, dict) and isinstance(new, dict) and old != new:
        name = next(name for name in sorted({*old, *new}) if old.get(name) != new.get(name))
        return f"other settings: {name} was {old.get(name)!r:.120}, now {new.get(name)!r:.120}"
    old, new = earlier.get("inputs"), wanted.get("inputs")
    if isinstance(old, list) and isinstance(new, list):
        for before, now in zip(old, new, strict=False):
            if before != now:
                same = before.get("path") == now.get("path")
                return f"other inputs: {before.get('path')} " + (
                    "has changed" if same else f"where now {now.get('path')} is"
                )
        return f"other inputs: there were {len(old)}, now {len(new)}"
    return "another binding"
