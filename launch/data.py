"""The data of a run: its plan, from the log or newly appended, and its sources, opened."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from checkpointing.history import history
from checkpointing.incarnation import Incarnation
from data_service.batches import Batches
from data_service.embedded import prepare_embedded
from data_service.plan import DataFlag, Plan, PlanSource, Segment, parse_data_flag
from data_service.source import Source, open_source
from launch.config import RunConfig
from launch.phase import Phase
from launch.world import World
from storage.errors import DataError

logger = logging.getLogger(__name__)

IN_RUN = "run:"
"""Begins the URL of a source that lies in the run itself."""


def open_batches(
    config: RunConfig, world: World, incarnation: Incarnation | None, announce: Phase
) -> Batches:
    """The batches of the run. Rank 0 prepares the embedded corpus and records the plan for all.

    Weights or sources that differ from the plan in the log open a new segment at the step of the
    newest checkpoint. A plan that cannot be used is refused, and leaves no trace.
    """

    def work() -> dict[str, Any]:
        assert incarnation is not None, "rank 0 owns the run"
        flags = _flags(config, announce)
        urls = {flag.name: flag.url for flag in flags}
        past = history(incarnation.check())
        recorded = Plan.from_json(past.plans[-1].body["plan"]) if past.plans else None
        newest = past.live[-1].step if past.live else 0
        plan = _wanted_plan(recorded, _open_flags(config, flags), newest)
        if recorded is None or plan.hash != recorded.hash:
            _batches(config, plan, urls)  # raises for what cannot be used
            plan = plan.with_anchors(config.batch.global_batch_size)
            body = {"plan": plan.to_json(), "from_step": plan.segments[-1].from_step}
            incarnation.append("PLAN", lambda _: body)
        return {"plan": plan.to_json(), "urls": urls}

    outcome = world.on_rank_0(work)
    return _batches(config, Plan.from_json(outcome["plan"]), outcome["urls"])


def _batches(config: RunConfig, plan: Plan, urls: Mapping[str, str]) -> Batches:
    """The batches of a plan; `urls` says where sources lie now, the plan where they lay."""
    opened = {
        name: open_source(name, _located(config, urls.get(name, source.url)))
        for name, source in plan.sources.items()
    }
    _refuse_changed(plan, opened)
    return Batches(
        plan=plan,
        sources=opened,
        seed=config.seed,
        context=config.model.context,
        global_batch_size=config.batch.global_batch_size,
    )


def _located(config: RunConfig, url: str) -> str:
    """A URL with the run's own place in it: a run may be moved, with its corpus."""
    if not url.startswith(IN_RUN):
        return url
    return f"{config.run.rstrip('/')}/{url.removeprefix(IN_RUN)}"


def _flags(config: RunConfig, announce: Phase) -> list[DataFlag]:
    if config.data:
        return [parse_data_flag(text) for text in config.data]
    logger.info("no --data: the embedded corpus is used (the standard library and its reference)")
    names = prepare_embedded(_located(config, f"{IN_RUN}corpus"), announce=announce)
    return [parse_data_flag(f"{name}={IN_RUN}corpus/{name}") for name in names]


def _open_flags(config: RunConfig, flags: Sequence[DataFlag]) -> list[PlanSource]:
    sources = []
    for flag in flags:
        index = open_source(flag.name, _located(config, flag.url)).index
        sources.append(
            PlanSource(
                name=flag.name,
                url=flag.url,
                fingerprint=index.fingerprint,
                weights=((0, flag.weight),),
            )
        )
    return sources


def _wanted_plan(recorded: Plan | None, sources: Sequence[PlanSource], step: int) -> Plan:
    """The recorded plan when it ends in these sources; else with a segment of them from `step`.

    A segment that begins at `step` or later has not been trained on in what is kept: it goes.
    """
    wanted = tuple(sorted(sources, key=lambda source: source.name))
    if recorded is None:
        return Plan(segments=(Segment(from_step=0, sources=wanted),))
    if _contents(recorded.segments[-1].sources) == _contents(wanted):
        return recorded
    kept = tuple(segment for segment in recorded.segments if segment.from_step < step)
    if kept and _contents(kept[-1].sources) == _contents(wanted):
        return Plan(segments=kept)
    logger.info("the mixture changes from step %d on", step)
    return Plan(segments=(*kept, Segment(from_step=step, sources=wanted)))


def _contents(sources: Sequence[PlanSource]) -> list[tuple[object, ...]]:
    """What decides bits of sources; where they lie does not."""
    return [(source.name, source.fingerprint, source.weights) for source in sources]


def _refuse_changed(plan: Plan, sources: dict[str, Source]) -> None:
    for name, source in sources.items():
        expected = plan.sources[name].fingerprint
        if source.index.fingerprint != expected:
            raise DataError(
                f"source {name!r} at {source.url} is not the data that the run began with: its "
                f"fingerprint is {source.index.fingerprint[:12]}, expected {expected[:12]}. Put "
                "the old data back, or add the new one under another name"
            )
