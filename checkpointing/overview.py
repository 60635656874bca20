"""What there is to say of runs without reading a checkpoint: from their logs and pins alone."""

from dataclasses import asdict
from typing import Any

from checkpointing.history import history
from checkpointing.naming import RUN_KEY, read_run
from checkpointing.pins import all_pins
from storage.errors import ConfigurationError
from storage.log import Log
from storage.store import open_store


def runs_below(prefix: str) -> list[dict[str, Any]]:
    """What there is to say of each run below a path or URL, in the order of their keys.

    A run that cannot be read has an `error`, and nothing else but its `url`.
    """
    store = open_store(prefix)
    folder = store.local_path(RUN_KEY)
    if folder is not None and not folder.parent.is_dir():
        raise ConfigurationError(f"there is no folder {prefix}; give the place that holds the runs")
    keys = [key for key in store.list("") if f"/{key}".endswith(f"/{RUN_KEY}")]
    return [_overview(f"{prefix.rstrip('/')}/{key}".removesuffix(f"/{RUN_KEY}")) for key in keys]


def description(url: str, *, whole: bool = True) -> dict[str, Any]:
    """What a run holds. `pinned` checkpoints are those pinned for ever; `pins` says why.

    Without `whole`, retired checkpoints that are gone may be left out.
    """
    store = open_store(url)
    run = read_run(store)["run"]
    log = Log(store, whole=whole)
    past = history(log.refresh())
    reasons = {pin.checkpoint: pin.reason for pin in all_pins(store) if pin.until is None}
    return {
        "run": run,
        "url": url,
        "generation": log.highest_generation,
        "complete": past.end is not None,
        "checkpoints": [
            {**asdict(c), "live": c.live, "pinned": c.index in reasons} for c in past.checkpoints
        ],
        "pins": [
            {"step": c.step, "index": c.index, "reason": reasons[c.index]}
            for c in past.checkpoints
            if c.index in reasons
        ],
        "damaged_records": list(log.damaged),
    }


def _overview(url: str) -> dict[str, Any]:
    try:
        run = description(url, whole=False)
    except ConfigurationError as error:
        return {"url": url, "error": str(error)}
    live = [c for c in run["checkpoints"] if c["live"]]
    return {
        "run": run["run"],
        "url": url,
        "step": live[-1]["step"] if live else None,
        "live": len(live),
        "generation": run["generation"],
        "complete": run["complete"],
    }
