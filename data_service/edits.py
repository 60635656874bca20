"""What operators ask of the plan of a run, and the plan that comes of it: pure functions.

An edit begins at a step that none has begun, and leaves every step before it as it was. Weights
are those that people gave; a ramp goes from the present shares to those of the weights at its end,
and each source's share is linear in between. From its end on, all is as without a ramp.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_service.plan import (
    DataFlag,
    Plan,
    PlanSource,
    Segment,
    Weights,
    check_source_name,
    parse_data_flag,
    parse_weight,
)
from data_service.shares import PPM, shares_of_steps
from storage.errors import ConfigurationError

KIND = "edit"
"""The kind of request (`storage.requests`) whose body is an edit."""

WHAT = ("add", "remove", "reweight", "skip", "undo")
MOST_RAMP_STEPS = 1_000_000
_MOST_STEPS = 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """One edit of a plan.

    `sources` are those to add, with their URLs, to remove, or to weigh anew. `at_step` is where it
    begins, None for the earliest step possible. To skip is to pass over the data of the steps from
    `at_step` to `to_step`; to undo is to go back to the mixture before the last `count` edits.
    """

    what: str
    sources: tuple[DataFlag, ...] = ()
    ramp_steps: int = 0
    at_step: int | None = None
    to_step: int = 0
    count: int = 0

    def __post_init__(self) -> None:
        if self.what not in WHAT:
            raise ConfigurationError(
                f"an edit must be one of {', '.join(WHAT)}; got {self.what!r:.40}"
            )
        if bool(self.sources) != (self.what in ("add", "remove", "reweight")):
            raise ConfigurationError(f"{self.what} with {len(self.sources)} sources is no edit")
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ConfigurationError(f"a source is named twice: {', '.join(names)}")
        for source in self.sources:
            check_source_name(source.name)
            if bool(source.url) != (self.what == "add"):
                raise ConfigurationError(f"{self.what} {source.name} with URL {source.url!r:.80}")
        if not 0 <= self.ramp_steps <= MOST_RAMP_STEPS:
            raise ConfigurationError(
                f"a ramp must have from 0 to {MOST_RAMP_STEPS} steps; got {self.ramp_steps}"
            )
        if self.at_step is not None and not 0 <= self.at_step <= _MOST_STEPS:
            raise ConfigurationError(f"there is no step {self.at_step}")
        if self.what == "skip" and (
            self.at_step is None or not self.at_step < self.to_step <= _MOST_STEPS
        ):
            raise ConfigurationError(
                f"skip needs FROM and a larger TO; got {self.at_step} and {self.to_step}"
            )
        if self.what == "skip" and self.ramp_steps:
            raise ConfigurationError("skip changes no weights, so it has no ramp")
        if self.what == "undo" and self.count < 1:
            raise ConfigurationError(f"undo needs a number of edits from 1; got {self.count}")

    def to_body(self) -> dict[str, Any]:
        """The edit as the body of a request."""
        return {
            "what": self.what,
            "sources": [[s.name, s.url, s.weight] for s in self.sources],
            "ramp_steps": self.ramp_steps,
            "at_step": self.at_step,
            "to_step": self.to_step,
            "count": self.count,
        }

    @staticmethod
    def from_body(body: Mapping[str, Any]) -> "Edit":
        """What `to_body` made; ConfigurationError, saying why, for anything else."""
        fields = dict(body)
        expected = {"what", "sources", "ramp_steps", "at_step", "to_step", "count"}
        if set(fields) != expected or not isinstance(fields["sources"], list):
            raise ConfigurationError(f"an edit has the fields {', '.join(sorted(expected))}")
        numbers = {name: fields[name] for name in ("ramp_steps", "to_step", "count")}
        if fields["at_step"] is not None:
            numbers["at_step"] = fields["at_step"]
        for source in fields["sources"]:
            if not (isinstance(source, list) and [type(x) for x in source] == [str, str, int]):
                raise ConfigurationError(f"a source is [name, URL, weight]; got {source!r:.80}")
        for name, number in numbers.items():
            if type(number) is not int:
                raise ConfigurationError(f"{name} must be a whole number, found {number!r:.40}")
        if not isinstance(fields["what"], str):
            raise ConfigurationError(f"an edit must be one of {', '.join(WHAT)}")
        flags = [DataFlag(name=n, url=u, weight=w) for n, u, w in fields["sources"]]
        return Edit(**{**fields, "sources": tuple(flags)})

    def __str__(self) -> str:
        if self.what == "skip":
            return f"skip the data of steps {self.at_step} to {self.to_step}"
        if self.what == "undo":
            return f"undo {self.count}"
        named = {
            "add": [f"{s.name}={s.url}:{s.weight / PPM:g}" for s in self.sources],
            "remove": [s.name for s in self.sources],
            "reweight": [f"{s.name}={s.weight / PPM:g}" for s in self.sources],
        }
        over = f" over {self.ramp_steps} steps" if self.ramp_steps else ""
        return f"{self.what} {' '.join(named[self.what])}{over}"


def parse_edit(
    what: str, items: Sequence[str], *, ramp_steps: int = 0, at_step: int | None = None
) -> Edit:
    """The edit that a command line asks for; ConfigurationError, saying how, if it does not."""
    if what in ("add", "remove", "reweight") and not items:
        raise ConfigurationError(f"{what} which source? {_USAGE[what]}")
    if what == "add":
        sources = tuple(parse_data_flag(item) for item in items)
    elif what == "remove":
        sources = tuple(DataFlag(name=item, url="", weight=0) for item in items)
    elif what == "reweight":
        sources = tuple(_weight(item) for item in items)
    elif what == "skip":
        if len(items) != 2 or not all(item.isdecimal() for item in items) or at_step is not None:
            raise ConfigurationError(f"{_USAGE[what]}, without --at")
        return Edit(what=what, at_step=int(items[0]), to_step=int(items[1]), ramp_steps=ramp_steps)
    else:
        if len(items) > 1 or not all(item.isdecimal() for item in items):
            raise ConfigurationError(_USAGE["undo"])
        count = int(items[0]) if items else 1
        return Edit(what=what, count=count, ramp_steps=ramp_steps, at_step=at_step)
    return Edit(what=what, sources=sources, ramp_steps=ramp_steps, at_step=at_step)


_USAGE = {
    "add": "say `add NAME=URL` or `add NAME=URL:WEIGHT`",
    "remove": "say `remove NAME`",
    "reweight": "say `reweight NAME=WEIGHT`",
    "skip": "say `skip FROM TO`, two steps",
    "undo": "say `undo`, or `undo N` for the last N edits",
}


def edited(
    history: Sequence[Plan],
    edit: Edit,
    earliest: int,
    fingerprint_of: Callable[[str, str], str],
) -> tuple[Plan, int]:
    """The plan after an edit, and the first step that it changes.

    `history` are all plans that the run had, oldest first; `earliest` is the first step that none
    has begun. `fingerprint_of` opens the source of a name and a URL. ConfigurationError for an edit
    that cannot be; it names the next possible step when that is what is wrong.
    """
    plan = history[-1]
    if edit.what == "undo":
        return _undone(history, edit, earliest)
    last = plan.segments[-1]
    possible = max(earliest, last.from_step)
    step = possible if edit.at_step is None else edit.at_step
    if step < possible:
        _refuse_step(step, earliest, last.from_step)
    if edit.what == "skip":
        before, skip_steps = last.sources, edit.to_step - step
    else:
        before, skip_steps = _changed(plan, edit, step, fingerprint_of), 0
    if last.from_step == step:  # not begun, so that both edits are one
        segment = replace(last, sources=before, skip_steps=last.skip_steps + skip_steps, anchors=())
        return Plan(segments=(*plan.segments[:-1], segment)), step
    return plan.appended(Segment(from_step=step, sources=before, skip_steps=skip_steps)), step


def contents(sources: Sequence[PlanSource]) -> list[tuple[object, ...]]:
    """What decides bits of sources; where they lie does not."""
    return [(source.name, source.fingerprint, source.weights) for source in sources]


def _weight(item: str) -> DataFlag:
    name, equals, weight = item.partition("=")
    if not equals:
        raise ConfigurationError(f"{_USAGE['reweight']}; got {item!r}")
    return DataFlag(name=name, url="", weight=parse_weight(weight))


def _refuse_step(step: int, earliest: int, planned: int) -> None:
    if step < earliest:
        raise ConfigurationError(
            f"step {step} has begun; the next possible step is {max(earliest, planned)}"
        )
    raise ConfigurationError(
        f"the plan changes at step {planned} already, and edits are in order of steps; the next "
        f"possible step is {planned}, or `undo` that edit first"
    )


def _changed(
    plan: Plan, edit: Edit, step: int, fingerprint_of: Callable[[str, str], str]
) -> tuple[PlanSource, ...]:
    """The sources from `step` on, after an edit of sources."""
    last = plan.segments[-1]
    present = {s.name: s for s in last.sources if s.weights[-1][1] or step < s.weights[-1][0]}
    targets = {name: source.weights[-1][1] for name, source in present.items()}
    found = dict(present)
    for flag in edit.sources:
        if edit.what == "add":
            if targets.get(flag.name):
                raise ConfigurationError(
                    f"source {flag.name!r} is in the mixture already; use `reweight` to change it"
                )
            found[flag.name] = PlanSource(
                name=flag.name,
                url=flag.url,
                fingerprint=fingerprint_of(flag.name, flag.url),
                weights=((step, flag.weight),),
            )
        elif flag.name not in present:
            raise ConfigurationError(
                f"there is no source {flag.name!r} in the mixture of step {step}; there are "
                f"{', '.join(sorted(present))}"
            )
        targets[flag.name] = flag.weight
    if not any(targets.values()):
        raise ConfigurationError(
            "nothing would be left to train on; `add` another source or weigh one above 0 first"
        )
    named = {flag.name: flag.weight for flag in edit.sources}
    if edit.ramp_steps:
        return _ramped(last.sources, list(found.values()), named, step, edit.ramp_steps)
    if edit.what == "remove":
        return tuple(source for name, source in found.items() if name not in named)
    return tuple(
        replace(source, weights=((step, targets[name]),)) if name in named else source
        for name, source in found.items()
    )


def _ramped(
    before: Sequence[PlanSource],
    sources: Sequence[PlanSource],
    targets: Mapping[str, int],
    step: int,
    ramp_steps: int,
) -> tuple[PlanSource, ...]:
    """Sources whose shares go linearly from those of `before` at a step to those at its end.

    There the weights are those of `targets`, or else what the sources have at that step, and these
    go on as planned. The weights at the beginning are scaled to the sum of those at the end: while
    the sum stays, shares are as linear as weights.
    """
    shares = shares_of_steps([source.weights for source in before], step, step + 1)[0].tolist()
    present = {source.name: share for source, share in zip(before, shares, strict=True)}
    end = step + ramp_steps
    rest = {
        source.name: ((end, targets[source.name]),)
        if source.name in targets
        else _weights_from(source.weights, end)
        for source in sources
    }
    total = sum(weights[0][1] for weights in rest.values())

    def line(name: str) -> Weights:
        return (step, present.get(name, 0) * total // PPM), *rest[name]

    return tuple(replace(source, weights=line(source.name)) for source in sources)


def _weights_from(weights: Weights, step: int) -> Weights:
    """The weights from a step on, at which the first point is then."""
    later = tuple(point for point in weights if point[0] > step)
    start, weight = max((p for p in weights if p[0] <= step), default=weights[0])
    if later and start < step:
        end, following = later[0]
        weight += (following - weight) * (step - start) // (end - start)
    return (step, weight), *later


def _undone(history: Sequence[Plan], edit: Edit, earliest: int) -> tuple[Plan, int]:
    """From a step on, the plan as it was; edits that have not begun are left out as if never made.

    What was skipped stays consumed.
    """
    if edit.count >= len(history):
        raise ConfigurationError(
            f"cannot undo {edit.count} edits: the plan was changed {len(history) - 1} times"
        )
    plan, target = history[-1], history[-1 - edit.count]
    step = earliest if edit.at_step is None else edit.at_step
    if step < earliest:
        _refuse_step(step, earliest, 0)
    kept = [segment for segment in plan.segments if segment.from_step < step]
    later = [segment for segment in target.segments if segment.from_step >= step]
    if not later or later[0].from_step > step:
        in_force = [s for s in target.segments if s.from_step <= step][-1].sources
        if contents(in_force) != contents(kept[-1].sources):
            if edit.ramp_steps:
                stays = {source.name for source in in_force}
                leaving = {s.name: s for s in kept[-1].sources if s.name not in stays}
                in_force = _ramped(
                    kept[-1].sources,
                    [*in_force, *leaving.values()],
                    dict.fromkeys(leaving, 0),
                    step,
                    edit.ramp_steps,
                )
            kept.append(Segment(from_step=step, sources=in_force))
    undone = Plan(segments=(*kept, *later))
    if undone.hash == plan.hash:
        raise ConfigurationError(
            "there is nothing to undo: the mixture is the same, and what was skipped stays consumed"
        )
    return undone, step
