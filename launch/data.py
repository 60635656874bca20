"""The data of a run: its plan, from the log or newly appended, and its sources, opened."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from checkpointing.history import history
from checkpointing.incarnation import Incarnation
from data_service.batches import LANES, Batches
from data_service.edits import contents
from data_service.embedded import prepare_embedded
from data_service.plan import (
    DataFlag,
    Plan,
    PlanSource,
    Segment,
    parse_data_flag,
    parse_weights_flag,
)
from data_service.recorded import (
    IN_RUN,
    KIND,
    RecordedPlan,
    located,
    plan_records,
    recorded_plans,
)
from data_service.source import Source
from launch.caching import RemoteData
from launch.config import RunConfig
from launch.phase import Phase
from launch.world import World
from storage.canonical import canonical_json, sha256_hex
from storage.display import numbers
from storage.errors import DataError

logger = logging.getLogger(__name__)


def open_batches(
    config: RunConfig,
    world: World,
    incarnation: Incarnation | None,
    announce: Phase,
    remote: RemoteData,
) -> Batches:
    """The batches of the run. Rank 0 prepares the embedded corpus and records the plan for all.

    The plan in the log wins, with all edits, unless the command line asks for other data than the
    one that this plan was recorded with: that is an edit at the step of the newest checkpoint. A
    plan that cannot be used is refused, and leaves no trace.
    """

    def work() -> dict[str, Any]:
        assert incarnation is not None, "rank 0 owns the run"
        past = history(incarnation.check())
        plans = recorded_plans(incarnation.records)
        recorded = plans[-1] if plans else None
        _tell_what_is_lost(incarnation)
        if recorded is not None and not config.data and not config.weights:
            return recorded.plan.to_json()
        sources = _open_flags(config, _flags(config, announce), remote)
        started_with = sha256_hex(canonical_json(contents(sources)))
        newest = past.live[-1].step if past.live else 0
        plan = _wanted_plan(recorded, sources, started_with, newest)
        if recorded is None or recorded.started_with != started_with:
            batches_of(config, plan, remote)  # raises for what cannot be used
            plan = record_plan(config, incarnation, plan, started_with=started_with)
        return plan.to_json()

    return batches_of(config, Plan.from_json(world.on_rank_0(work)), remote)


def record_plan(
    config: RunConfig,
    incarnation: Incarnation,
    plan: Plan,
    *,
    started_with: str,
    from_step: int | None = None,
    edit: dict[str, Any] | None = None,
) -> Plan:
    """Append a PLAN; returns the plan as it is recorded. `from_step` is its last segment's."""
    plan = plan.with_anchors(config.batch.global_batch_size)
    body = RecordedPlan(
        plan=plan,
        from_step=plan.segments[-1].from_step if from_step is None else from_step,
        seed=config.seed,
        context=config.model.context,
        global_batch_size=config.batch.global_batch_size,
        lanes=LANES,
        started_with=started_with,
        edit=edit,
    ).to_body()
    incarnation.append(KIND, lambda _: body)
    return plan


def batches_of(
    config: RunConfig,
    plan: Plan,
    remote: RemoteData,
    opened: Mapping[str, Source] | None = None,
) -> Batches:
    """The batches of a plan, with the sources `opened` already where it has the same.

    A source lies where the command line says, or else where the plan says.
    """
    urls = {flag.name: flag.url for flag in map(parse_data_flag, config.data)}
    found = dict(opened or {})
    for name, source in plan.sources.items():
        if name not in found:
            found[name] = remote.open(name, located(config.run, urls.get(name, source.url)))
    _refuse_changed(plan, found)
    batches = Batches(
        plan=plan,
        sources=found,
        seed=config.seed,
        context=config.model.context,
        global_batch_size=config.batch.global_batch_size,
    )
    remote.check(batches)
    return batches


def _flags(config: RunConfig, announce: Phase) -> list[DataFlag]:
    if config.data:
        return [parse_data_flag(text) for text in config.data]
    logger.info("no --data: the embedded corpus is used (the standard library and its reference)")
    names = prepare_embedded(located(config.run, f"{IN_RUN}corpus"), announce=announce)
    return [parse_data_flag(f"{name}={IN_RUN}corpus/{name}") for name in names]


def _open_flags(
    config: RunConfig, flags: Sequence[DataFlag], remote: RemoteData
) -> list[PlanSource]:
    weights = dict(parse_weights_flag(text) for text in config.weights)
    sources = [
        PlanSource(
            name=flag.name,
            url=flag.url,
            fingerprint=remote.open(flag.name, located(config.run, flag.url)).index.fingerprint,
            weights=weights.get(flag.name, ((0, flag.weight),)),
        )
        for flag in flags
    ]
    return sorted(sources, key=lambda source: source.name)


def _wanted_plan(
    recorded: RecordedPlan | None, sources: Sequence[PlanSource], started_with: str, step: int
) -> Plan:
    """The recorded plan when it was recorded with this command line; else the sources from `step`.

    Nothing that begins at `step` or later has been trained on in what is kept: it goes.
    """
    if recorded is None:
        return Plan(segments=(Segment(from_step=0, sources=tuple(sources)),))
    if recorded.started_with == started_with:
        return recorded.plan
    kept = tuple(segment for segment in recorded.plan.segments if segment.from_step < step)
    for segment in recorded.plan.segments[len(kept) :]:
        if recorded.edit and segment.from_step:
            logger.warning(
                "the edit from step %d on gives way to other --data on the command line",
                segment.from_step,
            )
    if kept and contents(kept[-1].sources) == contents(sources):
        return Plan(segments=kept)
    logger.info("the mixture changes from step %d on", step)
    return Plan(segments=(*kept, Segment(from_step=step, sources=tuple(sources))))


def _tell_what_is_lost(incarnation: Incarnation) -> None:
    """Nothing else shows that an edit is gone as long as no checkpoint was trained with it."""
    newest = max((record.index for record in plan_records(incarnation.records)), default=0)
    lost = [index for index in incarnation.damaged_records if index > newest]
    if lost:
        logger.warning(
            "records %s of the log cannot be read: an edit of the plan among them is not made. "
            "`python -m data_service.plan` shows the plan in force; ask for what is missing again",
            numbers(lost),
        )


def _refuse_changed(plan: Plan, sources: Mapping[str, Source]) -> None:
    for name, planned in plan.sources.items():
        source, expected = sources[name], planned.fingerprint
        if source.index.fingerprint != expected:
            raise DataError(
                f"source {name!r} at {source.url} is not the data that the run began with: its "
                f"fingerprint is {source.index.fingerprint[:12]}, expected {expected[:12]}. Put "
                "the old data back, or add the new one under another name"
            )
