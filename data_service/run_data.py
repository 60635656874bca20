"""The data of a run, opened from its log by commands that change nothing.

Covers: runs that train meanwhile, runs and sources that have moved.
Does not cover: a run of `checkpointing.alone`, whose log holds no plan.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from data_service.batches import Batches
from data_service.lineage import lineage
from data_service.plan import PlanSource, parse_data_flag
from data_service.recorded import RecordedPlan, located, recorded_plans
from data_service.source import Source, open_source
from storage.errors import ConfigurationError
from storage.log import Log, Record
from storage.store import LocalStore, open_store

_OPENERS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class RunLog:
    """What a run's log says. `damaged` are the records that cannot be read."""

    url: str
    records: Sequence[Record]
    damaged: Sequence[int]

    @property
    def committed_step(self) -> int:
        """The step of the newest checkpoint that a start may choose; 0 when there is none."""
        commits = lineage(self.records).commits
        return commits[-1].step if commits else 0

    @property
    def max_steps(self) -> int:
        """The length of the run as its newest start was configured; 0 when it is not known."""
        for record in reversed(self.records):
            past = record.body["history"]["claim"] if record.kind == "BASE" else None
            body = record.body if record.kind == "CLAIM" else (past or {}).get("body", {})
            steps = body.get("schedule", {}).get("schedule.max_steps")
            if isinstance(steps, int):
                return steps
        return 0


def read_log(run: str, *, whole: bool = False) -> RunLog:
    """The log of the run at a path or URL; without `whole`, from its newest BASE on.

    There are no records when the place is empty.
    """
    store = open_store(run)
    if isinstance(store, LocalStore) and not store.root.is_dir():
        return RunLog(url=run, records=(), damaged=())
    log = Log(store, whole=whole)
    return RunLog(url=run, records=log.refresh(), damaged=tuple(log.damaged))


def plans_of(log: RunLog) -> list[RecordedPlan]:
    """Every plan of the run, at least one; ConfigurationError when its log has none."""
    if not log.records:
        raise ConfigurationError(
            f"{log.url} holds no run: there is no log. RUN is the value of --run in training"
        )
    plans = recorded_plans(log.records)
    if not plans:
        damaged = f" (damaged records: {', '.join(map(str, log.damaged))})" if log.damaged else ""
        raise ConfigurationError(
            f"the log of {log.url} holds no plan{damaged}: training records one before its first "
            "step"
        )
    return plans


def moved_sources(flags: Sequence[str], plan_names: Sequence[str]) -> dict[str, str]:
    """Where sources of a plan lie now, as `--data NAME=URL` says."""
    places: dict[str, str] = {}
    for text in flags:
        flag = parse_data_flag(text)
        if flag.name not in plan_names:
            raise ConfigurationError(
                f"--data {text}: the run's plan has the sources {', '.join(plan_names)}; here "
                "--data says where one of them lies now"
            )
        places[flag.name] = flag.url
    return places


def open_sources(
    run: str, recorded: RecordedPlan, moved: Mapping[str, str], *, look: bool = True
) -> dict[str, Source]:
    """The sources that the plan names, by name; several at a time, since a store may be far.

    Without `look` the shards are not looked for: for who reads few of them, or none.
    """

    def opened(source: PlanSource) -> Source:
        place = located(run, moved.get(source.name, source.url))
        return open_source(source.name, place, look=look)

    with ThreadPoolExecutor(_OPENERS, thread_name_prefix="open") as pool:
        return dict(
            zip(
                recorded.plan.sources, pool.map(opened, recorded.plan.sources.values()), strict=True
            )
        )


def batches_of(recorded: RecordedPlan, sources: Mapping[str, Source]) -> Batches:
    """The batches that a PLAN record decides."""
    return Batches(
        plan=recorded.plan,
        sources=sources,
        seed=recorded.seed,
        context=recorded.context,
        global_batch_size=recorded.global_batch_size,
        lanes=recorded.lanes,
    )
