"""Replays spot traces against the costs that a run measured, and shows what becomes of the time."""

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from launch.accounting import lives_of, measured
from launch.spot_processes import replay_with_processes
from launch.spot_simulation import MODES, PARTS, Costs, Mode, Outcome, Policy, segments, simulate
from storage.display import print_table
from storage.errors import ConfigurationError

_POLICY = re.compile(r"(?:auto|(?P<number>[0-9.]+)(?P<unit>s|steps))(?P<blocking>:blocking)?")

_MOST_SECONDS = 1e9

DEFAULT_POLICIES = ("auto", "600s", "100steps:blocking")


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """What is asked of a replay."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Path or URL of the run whose costs are taken; with --processes, of the run to train."""
    trace: tuple[Path, ...]
    """Files of traces."""
    policy: tuple[str, ...] = DEFAULT_POLICIES
    """`auto`, `60s` or `100steps` between saves; `:blocking` behind it holds up training."""
    mode: tuple[Mode, ...] = ()
    """Which machines a trace gives: one, all `--nodes` or none, any number. All three, or one."""
    nodes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """The full world; the most machines of the trace if not given."""
    notice_seconds: float = 0.0
    """How long before each loss the run is told of it; 0 for never."""
    step_seconds: float | None = None
    """A step of the full world, in place of what the run measured."""
    stall_seconds: float | None = None
    """What a save takes from training, in place of what the run measured."""
    durable_seconds: float | None = None
    """From the beginning of a save until it counts, in place of what the run measured."""
    restart_seconds: float | None = None
    """From a machine to the first new step, in place of what the run measured."""
    blocking_seconds: float | None = None
    """What a blocking save takes; `durable_seconds` if not given."""
    processes: bool = False
    """Start the real training program, and kill it when the trace takes the machine."""
    compress: float = 60.0
    """With --processes: seconds of the trace that pass in one second."""
    json: bool = False
    """Print it as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """How many machines there are at each tick."""

    name: str
    gap_seconds: float
    counts: tuple[int, ...]


def replay(arguments: Replay, training: Sequence[str]) -> int:
    """The command. `training` is what the training program is given with `--processes`."""
    if not 0 <= arguments.notice_seconds < _MOST_SECONDS:
        raise ConfigurationError(
            f"--notice_seconds must be a number from 0, got {arguments.notice_seconds:g}"
        )
    if not arguments.trace:
        raise ConfigurationError("--trace names no file")
    traces = [read_trace(path) for path in arguments.trace]
    if arguments.processes:
        if len(traces) != 1:
            raise ConfigurationError(f"--processes replays one trace at a time, got {len(traces)}")
        trace = traces[0]
        stretches = segments(trace.counts, trace.gap_seconds, "single", 1)
        report = replay_with_processes(arguments.run, training, stretches, arguments.compress)
        print(json.dumps(report) if arguments.json else _sentence(report))
        return 0
    if training:
        raise ConfigurationError(f"{' '.join(training)}: arguments after -- go with --processes")
    costs = run_costs(arguments)
    blocking = (
        costs.durable_seconds
        if arguments.blocking_seconds is None
        else (arguments.blocking_seconds)
    )
    policies = [parse_policy(text, costs, blocking) for text in arguments.policy]
    results = [
        result
        for trace in traces
        for mode in _modes(trace, arguments)
        for result in _outcomes(trace, mode, arguments, policies)
    ]
    summary = summarised(results)
    if arguments.json:
        print(json.dumps({"costs": asdict(costs), "results": results, "summary": summary}))
        return 0
    _show(results, summary)
    return 0


def read_trace(path: Path) -> Trace:
    """The trace in a file; ConfigurationError, saying what is wrong, where there is none."""
    try:
        content = json.loads(path.read_text())
        gap, counts = content["metadata"]["gap_seconds"], content["data"]
        if type(gap) not in (int, float) or not 1e-6 <= gap < _MOST_SECONDS:
            raise ValueError(f"gap_seconds is {gap!r}, expected a number above 0, in seconds")
        if not isinstance(counts, list) or not counts:
            raise ValueError("`data` is empty, expected a list of numbers of machines")
        bad = [n for n in counts if not (type(n) is int and n >= 0)]
        if bad:
            raise ValueError(f"`data` holds {bad[0]!r}, expected numbers of machines from 0")
        if not any(counts):
            raise ValueError("it never has a machine")
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from error
    except (KeyError, TypeError) as error:
        raise ConfigurationError(
            f'{path} is no trace: expected {{"metadata": {{"gap_seconds": G}}, "data": [...]}}, '
            f"found {f'no {error}' if isinstance(error, KeyError) else 'something else'}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is no trace: {error}") from error
    return Trace(name=path.stem, gap_seconds=gap, counts=tuple(counts))


def parse_policy(text: str, costs: Costs, blocking_seconds: float) -> Policy:
    """The policy that is named so, with these costs; a blocking save counts once it is over."""
    found = _POLICY.fullmatch(text)
    if found is None:
        raise ConfigurationError(
            f"--policy must be auto, 60s or 100steps, with :blocking or without; got {text!r}"
        )
    if found["blocking"]:
        costs = replace(costs, stall_seconds=blocking_seconds, durable_seconds=blocking_seconds)
    try:
        number = float(found["number"] or 0)
        if found["unit"] == "steps":
            return Policy(name=text, costs=costs, every_steps=int(found["number"]))
    except ValueError:
        raise ConfigurationError(f"--policy {text}: {found['number']} is no such number") from None
    if found["unit"] and number == 0:
        raise ConfigurationError(f"--policy {text}: the interval must be above 0")
    return Policy(name=text, costs=costs, every_seconds=number)


def run_costs(arguments: Replay) -> Costs:
    """What the run measured, where the arguments say nothing else."""
    given = {field.name: getattr(arguments, field.name) for field in fields(Costs)}
    if None in given.values():
        found = measured(lives_of(arguments.run))
        given = {n: getattr(found, n) if value is None else value for n, value in given.items()}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ConfigurationError(
            f"{arguments.run} has not measured {', '.join(missing)} yet (a restart and a save in "
            f"the middle of training would); give --{' --'.join(missing)}"
        )
    return Costs(**given)


def summarised(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over all traces, by mode and policy: mean and worst goodput."""
    groups: dict[tuple[str, str], list[float]] = {}
    for result in results:
        groups.setdefault((result["mode"], result["policy"]), []).append(result["goodput"])
    return [
        {
            "mode": mode,
            "policy": policy,
            "traces": len(values),
            "mean": statistics.fmean(values),
            "worst": min(values),
        }
        for (mode, policy), values in groups.items()
    ]


def _modes(trace: Trace, arguments: Replay) -> Sequence[Mode]:
    """Those asked for; a trace of one machine is the same in all."""
    return arguments.mode or (MODES if max(trace.counts) > 1 else MODES[:1])


def _outcomes(
    trace: Trace, mode: Mode, arguments: Replay, policies: Sequence[Policy]
) -> list[dict[str, Any]]:
    most = max(trace.counts)
    nodes = most if arguments.nodes is None else arguments.nodes
    if nodes < 1:
        raise ConfigurationError(f"--nodes must be at least 1, got {nodes}")
    if mode == "gang" and nodes > most:
        raise ConfigurationError(
            f"{trace.name} has at most {most} machines at a time, so that a gang of --nodes "
            f"{nodes} never runs; give at most {most}, or another --mode"
        )
    stretches = segments(trace.counts, trace.gap_seconds, mode, nodes)
    world = nodes if mode == "elastic" else 1
    return [
        _result(
            trace,
            mode,
            policy,
            simulate(stretches, policy, nodes=world, notice_seconds=arguments.notice_seconds),
        )
        for policy in policies
    ]


def _result(trace: Trace, mode: Mode, policy: Policy, outcome: Outcome) -> dict[str, Any]:
    return {
        "trace": trace.name,
        "mode": mode,
        "policy": policy.name,
        "goodput": outcome.goodput,
        "available_seconds": outcome.available / 1e6,
        "parts": {name: amount / 1e6 for name, amount in outcome.parts.items()},
        "losses": outcome.losses,
        "restarts": outcome.restarts,
        "saves": outcome.saves,
        "notices_met": outcome.notices_met,
        "notices_missed": outcome.notices_missed,
    }


def _show(results: Sequence[dict[str, Any]], summary: Sequence[dict[str, Any]]) -> None:
    parts = [name for name in PARTS if name != "useful"]
    rows = [
        (
            result["trace"],
            result["mode"],
            result["policy"],
            f"{result['available_seconds'] / 3600:.1f} h",
            result["losses"],
            f"{result['goodput']:.4f}",
            *(share(result["parts"][name], result["available_seconds"]) for name in parts),
        )
        for result in results
    ]
    print_table(("trace", "mode", "policy", "available", "losses", "goodput", *parts), rows)
    print("\nOf available time, over all traces:")
    print_table(
        ("mode", "policy", "traces", "mean", "worst"),
        [
            (s["mode"], s["policy"], s["traces"], f"{s['mean']:.4f}", f"{s['worst']:.4f}")
            for s in summary
        ],
    )


def share(amount: float, whole: float) -> str:
    """In percent; "" of nothing."""
    return f"{100 * amount / whole:.2f} %" if whole else ""


def _sentence(report: dict[str, Any]) -> str:
    return (
        f"{report['starts']} starts, {report['kills']} kills; "
        f"{'complete' if report['complete'] else 'not complete'}; "
        f"`python -m launch.goodput {report['url']}` tells where the time went"
    )
