"""Goodput under spot traces: our measured costs and policy beside the usual ways to save.

Two parts:

- restart: the real program below its supervisor (preset `tiny`) is killed with SIGKILL in the
  middle of training; from the start of the next supervisor to the first step. On the same host the
  dead process is proved to be gone. On another one its heartbeats tell: at once after the kill they
  are waited for; later the store's clock shows that none came. A new PID namespace counts as
  another host (needs root). In the traces a machine is away for 32 s at least, so that the last of
  these figures counts;
- traces: a simulation of every trace in a folder, in microseconds, without any notice. What a save
  costs is what benchmarks/checkpoint.py measured of the state of GPT-2 124M; see --help.

Available time is that in which the trace has a machine: of a gang, all machines; of an elastic
world, each machine by itself. A trace is {"metadata": {"gap_seconds": G}, "data": [n0, n1, ...]}.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # run as a file, with `benchmarks/` in front of the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.goodput_plot import plot
from benchmarks.measuring import (
    Claim,
    Row,
    arguments,
    at_least,
    at_most,
    machine,
    report,
    scratch_folder,
)
from checkpointing.beats import BEAT_SECONDS
from checkpointing.incarnation import SILENT_SECONDS
from launch.replay import Trace, read_trace
from launch.spot_simulation import MODES, Costs, Mode, Policy, segments, simulate

OURS = "rangeflow, --save_interval auto"
WAITED = "if heartbeats were waited for"
SAME_HOST, AT_ONCE, LATER = (
    f"restart, {where}" for where in ("same host", "another host at once", "another host, later")
)
_ROOT = Path(__file__).resolve().parents[1]
_STEP = re.compile(r"step (\d+)/\d+ ")
_NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, simulate, print, write; 0 when it ran, whether or not the claims hold."""
    parser = arguments(
        argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
    )
    parser.add_argument("--traces", type=Path, required=True, metavar="DIR", help="*.json in it")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw goodput by trace there")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="on the disk to measure")
    parser.add_argument(
        "--restart_seconds", type=float, help="instead of measuring it; without --load_seconds"
    )
    said = "GPT-2 124M in docs/benchmarks.md, default: %(default)s"
    parser.add_argument("--load_seconds", type=float, default=1.02, help=f"restoring {said}")
    parser.add_argument("--stall_seconds", type=float, default=0.34, help=f"a save of {said}")
    parser.add_argument("--durable_seconds", type=float, default=1.5, help=f"a save of {said}")
    parser.add_argument(
        "--blocking_seconds", type=float, default=4.34, help=f"torch.save of {said}"
    )
    parser.add_argument(
        "--step_seconds",
        type=float,
        nargs="+",
        default=[5.0, 1.0, 15.0],
        help="of the full world; the plot is of the first. Default: %(default)s",
    )
    args = parser.parse_args(argv)
    traces = [read_trace(path) for path in sorted(args.traces.glob("*.json"))]
    if args.repeats < 1 or not traces:
        parser.error("--repeats must be at least 1, and the folder must hold traces (*.json)")
    rows: list[Row] = []
    if args.restart_seconds is None:
        with scratch_folder(args.folder) as folder:
            rows = restarts(folder, args.repeats)
        _, waited, restart = (row.median + args.load_seconds for row in rows)
    else:
        restart, waited = args.restart_seconds, args.restart_seconds + 2 * BEAT_SECONDS
    costs = [
        Costs(
            step_seconds=step,
            stall_seconds=args.stall_seconds,
            durable_seconds=args.durable_seconds,
            restart_seconds=restart,
        )
        for step in args.step_seconds
    ]
    for of in costs:
        rows += goodput(traces, of, args, waited)
    about = machine() | {
        "restart seconds": round(restart, 2),
        **{name: getattr(args, name) for name in ("stall_seconds", "durable_seconds")},
        "traces": len(traces),
    }
    if args.plot:
        names: dict[str, list[str]] = {
            mode: [trace.name for trace in traces_of(traces, mode)] for mode in MODES
        }
        plot(rows, names, costs[0].step_seconds, args.plot)
    report("Goodput under spot traces", rows, claims(rows), about, args.json)
    return 0


def policies(costs: Costs, args: argparse.Namespace, waited: float) -> list[Policy]:
    """Ours, the alternatives, and ours with another cost.

    `waited` is what a restart takes where heartbeats must be waited for.
    """
    blocking = replace(
        costs, stall_seconds=args.blocking_seconds, durable_seconds=args.blocking_seconds
    )
    return [
        Policy(name=OURS, costs=costs),
        Policy(name="asynchronous, every 10 min", costs=costs, every_seconds=600),
        Policy(name="torch.save, every 100 steps", costs=blocking, every_steps=100),
        Policy(name=WAITED, costs=replace(costs, restart_seconds=waited)),
        Policy(name="if a save took 0.1 s", costs=replace(costs, stall_seconds=0.1)),
    ]


def goodput(
    traces: Sequence[Trace], costs: Costs, args: argparse.Namespace, waited: float
) -> list[Row]:
    """Percent of available time by mode and policy, a value for each trace."""
    rows = []
    for mode in MODES:
        of = traces_of(traces, mode)
        for policy in policies(costs, args, waited) if of else ():
            values = tuple(100 * _one(trace, mode, policy) for trace in of)
            mean = sum(values) / len(values)
            rows.append(
                Row(
                    figure=figure(mode, costs.step_seconds),
                    contestant=policy.name,
                    values=values,
                    unit="%",
                    note=f"(mean {mean:.3f})",
                )
            )
    return rows


def traces_of(traces: Sequence[Trace], mode: Mode) -> list[Trace]:
    """Those of one machine for single hosts, the others for gangs and elastic worlds."""
    return [trace for trace in traces if (max(trace.counts) > 1) == (mode != "single")]


def figure(mode: str, step_seconds: float) -> str:
    """The name of the figure."""
    return f"{mode}, steps of {step_seconds:g} s"


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Mean and worst of single hosts; traces of any kind on which an alternative is as good."""
    found = []
    of = {(row.figure, row.contestant): row.values for row in rows}
    for (told, name), values in of.items():
        if name == OURS and told.startswith("single"):
            mean = sum(values) / len(values)
            found.append(at_least(f"{told}: goodput, mean over traces", mean, 99.0, "%"))
            found.append(at_least(f"{told}: goodput, worst trace", min(values), 98.0, "%"))
    behind = sum(
        ours <= other
        for (told, name), values in of.items()
        if (told, OURS) in of and name != OURS and not name.startswith("if ")
        for ours, other in zip(of[told, OURS], values, strict=True)
    )
    found.append(
        at_most("traces on which an alternative is as good, all modes and steps", behind, 0, "")
    )
    return found


def restarts(folder: Path, repeats: int) -> list[Row]:
    """Seconds from the start of a supervisor to the first step of its rank, after a kill."""
    waits = {SAME_HOST: 0.0, AT_ONCE: 0.0, LATER: SILENT_SECONDS}
    if not _may_make_namespaces():
        raise SystemExit("a restart on another host needs PID namespaces; give --restart_seconds")
    rows: list[Row] = []
    for name, wait in waits.items():
        run = folder / str(len(rows))
        prefix = () if name == SAME_HOST else _NAMESPACE
        _until_step(run, prefix, beyond=21)  # prepares the corpus, saves at step 20
        values = []
        for _ in range(repeats):
            time.sleep(wait)
            values.append(_until_step(run, prefix, beyond=0))
        rows.append(Row(figure=name, contestant="rangeflow, tiny", values=tuple(values), unit="s"))
    return rows


def _may_make_namespaces() -> bool:
    if shutil.which(_NAMESPACE[0]) is None:
        return False
    return subprocess.run([*_NAMESPACE, "true"], check=False).returncode == 0


def _until_step(run: Path, prefix: Sequence[str], *, beyond: int) -> float:
    """Train, and kill at the first step after `beyond`: the seconds that it took until there."""
    supervised = [sys.executable, "-m", "launch.supervise", "--metadata=none", "--"]
    torchrun = ["--standalone", "--nproc_per_node=1", "--", "launch/train.py", "--run", str(run)]
    often = ["--log_interval_steps=1", "--save_interval_steps=20", "--max_steps=100000"]
    begun = time.monotonic()
    with subprocess.Popen(
        [*prefix, *supervised, *torchrun, *often, "--eval_interval_steps=0"],
        cwd=_ROOT,
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        said = []
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            step = _STEP.search(line)
            if step is not None and int(step[1]) > beyond and _saved(run):
                seconds = time.monotonic() - begun
                process.kill()
                return seconds
    raise RuntimeError(f"the program ended with {process.returncode}: {''.join(said[-20:])}")


def _saved(run: Path) -> bool:
    """Whether there is a checkpoint to restart from."""
    return any((run / "checkpoints").glob("*/*/manifest.json"))


def _one(trace: Trace, mode: Mode, policy: Policy) -> float:
    nodes = max(trace.counts)
    stretches = segments(trace.counts, trace.gap_seconds, mode, nodes)
    return simulate(stretches, policy, nodes=nodes if mode == "elastic" else 1).goodput


if __name__ == "__main__":
    sys.exit(main())
