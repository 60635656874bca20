"""The plan of a run: the append-only list of mixture edits that decides which data comes when.

An edit opens a *segment* at a step. Within a segment the shares of the sources are counted from
its first sample, as if it lasted for ever. A source keeps its own sequence over segments: one that
is not in a segment stays where it was, and goes on from there when it is added again. An edit may
also skip: its segment then begins where the plan before it would have been some steps later, and
the samples in between count as consumed.

The plan's hash covers names, contents (fingerprints), weights and steps, and not URLs: data may
move, or be read from a mirror, without becoming another plan.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from data_service.mixture import Mixture
from data_service.shares import PPM
from storage.canonical import canonical_json, sha256_hex
from storage.errors import ConfigurationError, DataError

SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}")
_LARGEST_WEIGHT = 10**12
_WEIGHT = re.compile(r"-?(\d+(\.\d*)?|\.\d+)", re.ASCII)
_TRAILING_WEIGHT = re.compile(f"(?P<url>.+):(?P<weight>{_WEIGHT.pattern})", re.ASCII)

_STEP = re.compile(r"[0-9]{1,7}")  # every step of a ramp takes memory

Weights = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSource:
    """A source in a segment. `weights` are (step, weight) points, linear between them, constant
    outside; only their ratio to the other sources' matters (by custom in parts per million)."""

    name: str
    url: str
    fingerprint: str
    weights: Weights

    def __post_init__(self) -> None:
        check_source_name(self.name)
        if not self.weights:
            raise ConfigurationError(f"source {self.name!r} has no weight; give [[0, 1000000]]")
        steps = [step for step, _ in self.weights]
        if steps != sorted(set(steps)) or steps[0] < 0:
            raise ConfigurationError(
                f"the weights of source {self.name!r} must be at ascending steps, got {steps}"
            )
        for step, weight in self.weights:
            if not 0 <= weight <= _LARGEST_WEIGHT:
                raise ConfigurationError(
                    f"the weight of source {self.name!r} at step {step} must be from 0 to "
                    f"{_LARGEST_WEIGHT}, got {weight}; 0 means none of it"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """The sources from a step on. They are kept sorted by name: the order given never matters.

    `anchors` are `Mixture.anchors()` of this segment, stored so that a start need not go through
    a long ramp again; they follow from the rest, and the plan's hash does not cover them.
    `skip_steps` is how many steps' data of the segment before is passed over where this one begins.
    """

    from_step: int
    sources: tuple[PlanSource, ...]
    skip_steps: int = 0
    anchors: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(sorted(self.sources, key=lambda s: s.name)))
        if self.from_step < 0:
            raise ConfigurationError(f"a segment cannot begin at step {self.from_step}")
        if self.skip_steps < 0:
            raise ConfigurationError(f"a segment cannot skip {self.skip_steps} steps of data")
        if not self.sources:
            raise ConfigurationError("a plan needs at least one source; give --data NAME=URL")
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ConfigurationError(
                    f"source name {name!r} is given twice; each source needs its own name"
                )
        for step in self._steps():
            if not any(_weight_at(source.weights, step) for source in self.sources):
                raise ConfigurationError(
                    f"the weights of all sources ({', '.join(names)}) are 0 at step {step}; "
                    "one must be above 0"
                )

    def mixture(self, global_batch_size: int) -> Mixture:
        try:
            return Mixture(
                weights=[source.weights for source in self.sources],
                from_step=self.from_step,
                samples_per_step=global_batch_size,
                anchors=self.anchors,
            )
        except ValueError as error:
            raise DataError(f"the plan's segment from step {self.from_step}: {error}") from None

    def _steps(self) -> list[int]:
        """Where the sum of weights can be least: lines between points of non-negative weights."""
        points = {step for source in self.sources for step, _ in source.weights}
        return sorted({self.from_step, *(step for step in points if step > self.from_step)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if not self.segments or self.segments[0].from_step != 0:
            raise ConfigurationError("a plan's first segment must begin at step 0")
        if self.segments[0].skip_steps:
            raise ConfigurationError("a plan's first segment has no data before it to skip")
        steps = [segment.from_step for segment in self.segments]
        if steps != sorted(set(steps)):
            raise ConfigurationError(
                f"a plan's segments must begin at ascending steps, got {steps}: an edit opens a "
                "segment later than all before it"
            )
        contents: dict[str, str] = {}
        for segment in self.segments:
            for source in segment.sources:
                known = contents.setdefault(source.name, source.fingerprint)
                if known != source.fingerprint:
                    raise ConfigurationError(
                        f"source {source.name!r} stands for other data ({known[:12]}) since an "
                        f"earlier segment, got {source.fingerprint[:12]}; give it a new name"
                    )

    @property
    def hash(self) -> str:
        decides = [
            {
                "from_step": segment.from_step,
                "sources": [
                    [source.name, source.fingerprint, [list(point) for point in source.weights]]
                    for source in segment.sources
                ],
                **({"skip_steps": segment.skip_steps} if segment.skip_steps else {}),
            }
            for segment in self.segments
        ]
        return sha256_hex(canonical_json(decides))

    @property
    def sources(self) -> dict[str, PlanSource]:
        """Every source that any segment names, as its last segment gives it, sorted by name."""
        named = {source.name: source for segment in self.segments for source in segment.sources}
        return dict(sorted(named.items()))

    def appended(self, segment: Segment) -> "Plan":
        """This plan and one more edit."""
        return Plan(segments=(*self.segments, segment))

    def prefix(self, step: int) -> "Plan":
        """The plan as far as the steps before `step` depend on it."""
        kept = tuple(s for s in self.segments if s.from_step == 0 or s.from_step < step)
        return Plan(segments=kept)

    def with_anchors(self, global_batch_size: int) -> "Plan":
        """The same plan with its ramps gone through once and their anchors stored."""
        return Plan(
            segments=tuple(
                replace(segment, anchors=segment.mixture(global_batch_size).anchors())
                for segment in self.segments
            )
        )

    def to_json(self) -> dict[str, object]:
        return {
            "segments": [
                {
                    "from_step": segment.from_step,
                    "sources": [
                        {
                            "name": source.name,
                            "url": source.url,
                            "fingerprint": source.fingerprint,
                            "weights": [list(point) for point in source.weights],
                        }
                        for source in segment.sources
                    ],
                    **({"skip_steps": segment.skip_steps} if segment.skip_steps else {}),
                    **({"anchors": [list(a) for a in segment.anchors]} if segment.anchors else {}),
                }
                for segment in self.segments
            ]
        }

    @staticmethod
    def from_json(value: object) -> "Plan":
        try:
            data = json.loads(json.dumps(value))
            return Plan(segments=tuple(_segment(segment) for segment in data["segments"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"this is no plan: {type(error).__name__}: {error}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFlag:
    """What `--data NAME=URL[:WEIGHT]` says; the weight is 1.0 = 1,000,000 when not given."""

    name: str
    url: str
    weight: int


def parse_data_flag(text: str) -> DataFlag:
    """`NAME=URL[:WEIGHT]`. A trailing `:number` is the weight; the URL may hold other colons."""
    name, equals, rest = text.partition("=")
    if not equals or not rest:
        raise ConfigurationError(f"--data must be NAME=URL or NAME=URL:WEIGHT, got {text!r}")
    check_source_name(name)
    match = _TRAILING_WEIGHT.fullmatch(rest)
    if match is None:
        return DataFlag(name=name, url=rest, weight=PPM)
    return DataFlag(name=name, url=match["url"], weight=parse_weight(match["weight"]))


def parse_weight(text: str) -> int:
    """A weight as people write it, 1.0 = 1,000,000."""
    if not _WEIGHT.fullmatch(text):
        raise ConfigurationError(f"a weight must be a number such as 0.3 or 2; got {text!r}")
    return int((Decimal(text) * PPM).to_integral_value())


def parse_weights_flag(text: str) -> tuple[str, Weights]:
    """`NAME=WEIGHT[@STEP],WEIGHT@STEP...`: the name, and its weights, linear between the steps."""
    name, equals, rest = text.partition("=")
    points: list[tuple[int, int]] = []
    for part in rest.split(","):
        weight, at, step = part.partition("@")
        if not equals or (at and not _STEP.fullmatch(step)) or (points and not at):
            raise ConfigurationError(
                "--weights must be NAME=WEIGHT or NAME=WEIGHT@STEP,WEIGHT@STEP..., such as "
                f"web=1@1000,0.5@5000; got {text!r}"
            )
        points.append((int(step or 0), parse_weight(weight)))
    check_source_name(name)
    return name, tuple(points)


def check_source_name(name: str) -> None:
    if not SOURCE_NAME.fullmatch(name):
        raise ConfigurationError(
            "a source's name must be 1 to 48 letters, digits, '_' or '-', beginning with a letter "
            f"or digit; got {name!r}"
        )


def _weight_at(weights: Sequence[tuple[int, int]], step: int) -> bool:
    """Whether the line through the points is above 0 at a step."""
    if step <= weights[0][0]:
        return weights[0][1] > 0
    for (start, weight), (end, following) in itertools.pairwise(weights):
        if start < step < end:
            return weight > 0 or following > 0
        if step == end:
            return following > 0
    return weights[-1][1] > 0


def _segment(value: dict[str, object]) -> Segment:
    sources = value["sources"]
    anchors = value.get("anchors", [])
    assert isinstance(sources, list) and isinstance(anchors, list)
    return Segment(
        from_step=_integer(value["from_step"]),
        sources=tuple(
            PlanSource(
                name=str(source["name"]),
                url=str(source["url"]),
                fingerprint=str(source["fingerprint"]),
                weights=tuple((_integer(step), _integer(w)) for step, w in source["weights"]),
            )
            for source in sources
        ),
        skip_steps=_integer(value.get("skip_steps", 0)),
        anchors=tuple(tuple(_integer(count) for count in anchor) for anchor in anchors),
    )


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"expected a whole number, found {value!r}")
    return value


if __name__ == "__main__":  # the command's name in the contract
    import sys

    from data_service.forecast import main

    sys.exit(main())
