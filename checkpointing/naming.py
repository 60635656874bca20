"""How people name things: a run by its place, a checkpoint by `latest`, `best` or its step."""

import json
import uuid
from collections.abc import Mapping
from typing import Any

from checkpointing.history import Checkpoint, History
from storage.canonical import canonical_json
from storage.errors import ConfigurationError
from storage.store import Store

RUN_KEY = "run.json"
RUN_FORMAT = 1

_MOST_BYTES = 2**20
_MOST_CHARACTERS = 100


def create_run(store: Store, identity: Mapping[str, Any]) -> None:
    """Write run.json with a new identifier, unless the place has one."""
    run = {"format": RUN_FORMAT, "run": uuid.uuid4().hex, "identity": dict(identity)}
    store.put_if_absent(RUN_KEY, canonical_json(run))


def read_run(store: Store) -> dict[str, Any]:
    """What run.json says: `run`, the identifier, and `identity`, the fields that decide bits."""
    path = store.local_path(RUN_KEY)
    try:
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(path)
        data = store.get(RUN_KEY, 0, _MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        run = json.loads(data)
    except FileNotFoundError:
        raise ConfigurationError(
            f"{store.url} holds no run: there is no {RUN_KEY}. RUN is the value of --run in "
            "training; `python -m checkpointing.runs ls PREFIX` finds runs"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{store.url}/{RUN_KEY} is damaged ({error}); put back a copy of it"
        ) from error
    found = run.get("format") if isinstance(run, dict) else None
    if found == RUN_FORMAT and not (
        _is_identifier(run.get("run")) and isinstance(run.get("identity"), dict)
    ):
        raise ConfigurationError(
            f"{store.url}/{RUN_KEY} is damaged (`run` or `identity` is not there); put back a copy"
        )
    if found != RUN_FORMAT:
        raise ConfigurationError(
            f"{store.url}/{RUN_KEY} has format {found}, expected {RUN_FORMAT}: it is no run, or "
            "one of another version of RangeFlow"
        )
    return dict(run)


def chosen(past: History, name: str, *, or_quarantined: bool = False) -> Checkpoint:
    """The live checkpoint that an operator calls `name`: `latest`, `best`, or the step of one.

    `best` has the lowest validation loss, the newest of equals. With `or_quarantined` a step may
    also be that of a checkpoint in quarantine. Raises ConfigurationError.
    """
    if or_quarantined:
        held = [c for c in past.checkpoints if c.quarantined and not c.retired]
        named = [c for c in held if str(c.step) == name]
        if named and name not in {str(c.step) for c in past.live}:
            return named[-1]
    if not past.live:
        raise ConfigurationError(
            "the run has no live checkpoint yet; `python -m checkpointing.runs show RUN` lists all"
        )
    steps = ", ".join(str(c.step) for c in past.live)
    if name == "latest":
        return past.live[-1]
    if name == "best":
        losses = [(c, c.validation_loss) for c in past.live]
        scored = [(loss, -c.index, c) for c, loss in losses if loss is not None]
        if not scored:
            raise ConfigurationError(
                f"no live checkpoint has a validation loss, so none is best; name a step ({steps}) "
                "or `latest`"
            )
        return min(scored)[-1]
    found = [c for c in past.live if str(c.step) == name]
    if not found:
        raise ConfigurationError(
            f"step must be `best`, `latest` or one of the live checkpoints ({steps}); got {name!r}"
        )
    return found[-1]


def _is_identifier(value: object) -> bool:
    """Whether it can be a run's identifier, which is printed as it is."""
    return isinstance(value, str) and 0 < len(value) <= _MOST_CHARACTERS and value.isprintable()
