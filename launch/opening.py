"""Opens a run for training: the store is probed, the configuration compared, the run claimed."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from checkpointing.history import History, history
from checkpointing.incarnation import Incarnation, claim_run
from checkpointing.naming import RUN_KEY, create_run, read_run
from launch.config import FIXED, RunConfig, fields_of_kind
from launch.phase import Phase
from launch.rendezvous import FOLDER
from launch.world import World, fingerprint
from storage.errors import (
    ConfigurationError,
    RangeFlowError,
    StoreRefusedError,
    StoreUnavailableError,
    UnlikeHostsError,
)
from storage.log import Log
from storage.probe import probe
from storage.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenRun:
    """A run that this process works on. Only rank 0 has the incarnation."""

    complete: bool
    generation: int
    incarnation: Incarnation | None


def open_run(store: Store, config: RunConfig, world: World, announce: Phase) -> OpenRun:
    """Probe the store, compare the configuration, and claim the run, on rank 0 for all.

    A run that has reached its last step is complete, and is not claimed. Every error of rank 0 is
    raised on every rank; so is that a host has another run at its --run, or none.
    """
    owner: list[Incarnation] = []

    def work() -> int:
        try:
            incarnation = _open(store, config, world, announce)
        except StoreRefusedError as error:  # at the start, no restart helps
            raise ConfigurationError(str(error)) from error
        if incarnation is None:
            return 0
        owner.append(incarnation)
        return incarnation.generation

    generation = world.on_rank_0(work)
    if not world.one_host:
        _refuse_another_run(world.gather(_seen(store)))
    return OpenRun(
        complete=generation == 0,
        generation=generation,
        incarnation=owner[0] if owner else None,
    )


def _open(store: Store, config: RunConfig, world: World, announce: Phase) -> Incarnation | None:
    announce("open")
    run = _existing_run(store)
    if run is None:
        if not config.allow_unfenced_store:
            probe(store)
        if store.url.startswith("memory://"):
            logger.warning("%s is this process's memory: nothing remains of the run", store.url)
        create_run(store, fields_of_kind(config, "identity"))
        run = read_run(store)
    log = Log(store)
    past = history(log.refresh())
    changes = _accepted_changes(run, past, config)
    if past.end is not None and past.end.body["step"] >= config.schedule.max_steps:
        logger.info(
            "the run is complete: %d steps, digest %s. A larger --max_steps continues it",
            past.end.body["step"],
            past.end.body["digest"],
        )
        return None
    body = {
        "run": run["run"],
        "job": world.job,
        "rendezvous": world.place,
        "world_size": world.size,
        "fingerprint": fingerprint(world.device),
        "schedule": fields_of_kind(config, "schedule"),
        "accepted_changes": changes,
        "retention": asdict(config.retention),
    }
    _tell_what_changed(past, body)
    announce("claim")

    def wait(seconds: float) -> None:
        announce("claim:wait")
        time.sleep(seconds)

    return claim_run(store, log, body=body, take_over=config.take_over, sleep=wait)


def _seen(store: Store) -> list[str]:
    """The run that this process finds in the store, and the reason when it finds none."""
    try:
        return [str(read_run(store)["run"]), ""]
    except RangeFlowError as error:
        return ["", str(error)]


def _refuse_another_run(told: Sequence[Sequence[str]]) -> None:
    """What a host writes elsewhere is in no checkpoint, and what it reads there is of another."""
    for rank, (run, why_not) in enumerate(told):
        if why_not:  # it may be mounted later
            raise StoreUnavailableError(
                f"rank {rank} does not find the run, and all hosts need the same store: {why_not}"
            )
        if run != told[0][0]:
            raise UnlikeHostsError(
                f"rank {rank} finds run {run} at its --run, and rank 0 {told[0][0]}: all hosts "
                "need the same store"
            )


def _existing_run(store: Store) -> dict[str, Any] | None:
    """What run.json says, or None when the place is empty. Anything else there is refused."""
    keys = [key for key in store.list("") if not key.startswith(("probe/", FOLDER))]
    if RUN_KEY not in keys and keys:
        raise ConfigurationError(
            f"{store.url} holds something that is not a run ({keys[0]}"
            f"{' and more' if len(keys) > 1 else ''}); give --run an empty or a new place"
        )
    return read_run(store) if keys else None


def _accepted_changes(run: dict[str, Any], past: History, config: RunConfig) -> dict[str, Any]:
    """Identity fields that differ and were accepted; others are refused by name."""
    identity = run["identity"] | past.accepted_changes()
    wanted = fields_of_kind(config, "identity")
    changed = {name: value for name, value in wanted.items() if identity.get(name) != value}
    accepted = {_full_name(name, wanted) for name in config.accept_change}
    for name, value in changed.items():
        short = name.rpartition(".")[2]
        if name in FIXED or name not in accepted:
            other_way = f", or pass --accept_change {short}, and exactness ends there"
            raise ConfigurationError(
                f"{short} decides bits: the run has {identity.get(name)!r}, this start asks for "
                f"{value!r}. Start anew with --run runs/other{'' if name in FIXED else other_way}"
            )
        before = identity.get(name)
        logger.warning("%s changes from %r to %r: exact up to here", name, before, value)
    return changed


def _full_name(name: str, identity: dict[str, Any]) -> str:
    """The dotted name of an identity field that may be named without its section."""
    plain = name.replace("-", "_")
    for dotted in identity:
        if plain in (dotted, dotted.rpartition(".")[2]):
            return dotted
    raise ConfigurationError(f"--accept_change {name}: there is no such field that decides bits")


def _tell_what_changed(past: History, body: dict[str, Any]) -> None:
    """Warn of another device or torch, which may change bits, and name a new schedule."""
    if past.claim is None:
        return
    before = past.claim.body
    for name, value in body["fingerprint"].items():
        if before["fingerprint"].get(name) != value:
            logger.warning(
                "%s was %s and is %s: the bits may differ from here on",
                name,
                before["fingerprint"].get(name),
                value,
            )
    for name, value in body["schedule"].items():
        if before["schedule"].get(name) != value:
            logger.info("%s changes from %s to %s", name, before["schedule"].get(name), value)
