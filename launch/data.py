"""The data of a run: its plan, from the log or newly appended, and its sources, opened."""

import logging
from collections.abc import Sequence
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
from storage.log import Record

logger = logging.getLogger(__name__)


def open_batches(
    config: RunConfig, world: World, incarnation: Incarnation | None, announce: Phase
) -> Batches:
    """The batches of the run. Rank 0 prepares the embedded corpus and records the plan for all.

    Weights or sources that differ from the plan in the log open a new segment at the step of the
    newest checkpoint.
    """

    def work() -> dict[str, Any]:
        assert incarnation is not None, "rank 0 owns the run"
        flags = _flags(config, announce)
        plan = _recorded_plan(config, incarnation, _open_flags(flags))
        return {"plan": plan.to_json(), "urls": {flag.name: flag.url for flag in flags}}

    outcome = world.on_rank_0(work)
    plan = Plan.from_json(outcome["plan"])
    opened = {
        name: open_source(name, outcome["urls"].get(name, source.url))
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


def _flags(config: RunConfig, announce: Phase) -> list[DataFlag]:
    if config.data:
        return [parse_data_flag(text) for text in config.data]
    logger.info("no --data: the embedded corpus is used (the standard library and its reference)")
    urls = prepare_embedded(f"{config.run.rstrip('/')}/corpus", announce=announce)
    return [parse_data_flag(f"{name}={url}") for name, url in urls.items()]


def _open_flags(flags: Sequence[DataFlag]) -> list[PlanSource]:
    sources = []
    for flag in flags:
        index = open_source(flag.name, flag.url).index
        sources.append(
            PlanSource(
                name=flag.name,
                url=flag.url,
                fingerprint=index.fingerprint,
                weights=((0, flag.weight),),
            )
        )
    return sources


def _recorded_plan(
    config: RunConfig, incarnation: Incarnation, sources: Sequence[PlanSource]
) -> Plan:
    """The plan in the log, with one more segment when `sources` differ from its last."""
    past = history(incarnation.check())
    wanted = tuple(sorted(sources, key=lambda source: source.name))
    if not past.plans:
        plan = Plan(segments=(Segment(from_step=0, sources=wanted),))
    else:
        plan = Plan.from_json(past.plans[-1].body["plan"])
        if _contents(plan.segments[-1].sources) == _contents(wanted):
            return plan
        step = past.live[-1].step if past.live else 0
        kept = tuple(s for s in plan.segments if s.from_step < step)
        plan = Plan(segments=(*kept, Segment(from_step=step, sources=wanted)))
        logger.info("the mixture changes from step %d on", step)
    plan = plan.with_anchors(config.batch.global_batch_size)

    def body(_: Sequence[Record]) -> dict[str, Any]:
        return {"plan": plan.to_json(), "from_step": plan.segments[-1].from_step}

    incarnation.append("PLAN", body)
    return plan


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
