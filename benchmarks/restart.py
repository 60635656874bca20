"""What it takes until training goes on: after a kill, a lost host, a new host, a lost replica.

The preset `tiny`, a save every 20 steps; a *new step* is one beyond the highest before. Parts:

- one-host: SIGKILL of the rank, ten steps after a save. Beside the supervisor: torchrun alone with
  the same program, and torchrun with the peer `torch.save` (benchmarks/restart_torch_save.py), both
  by `--max-restarts`. Where the time goes is told by when processes began and lines were printed;
- hosts, meeting-host: a host is added to two, and then one of three loses power, the one that was
  added or the one where the others met. Hosts are network namespaces of this machine (needs root),
  so three share its cores. From the newcomer's start, or the loss, to the first new step;
- hosts-peer: the same loss for `torch.save` below torchrun with --nnodes=1:3, up to a limit;
- replicas: SIGKILL of one of two processes, against torchft (--torchft_python, the interpreter that
  has it), which goes on without: to the first new step, until two train again, and what becomes of
  the samples of so many steps.

Every repeat runs every contestant once, in rotating order.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file, with `benchmarks/` in front of the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measuring import (
    Claim,
    Row,
    arguments,
    at_most,
    machine,
    markdown,
    report,
    scratch_folder,
)
from benchmarks.restart_hosts import hosts_rows, peer_rows
from benchmarks.restart_one_host import one_host_rows
from benchmarks.restart_replicas import DROPPED, TWICE, replicas_rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0 when it ran, whether or not the claims hold."""
    parser = arguments(
        argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="on the disk to measure")
    parser.add_argument("--torchft_python", type=Path, metavar="FILE", default=sys.executable)
    parser.add_argument(
        "--limit_seconds", type=float, default=100, help="of hosts-peer, default: %(default)s"
    )
    parser.add_argument("--steps", type=int, default=200, help="of replicas, default: %(default)s")
    parts: dict[str, Callable[[Path, argparse.Namespace], list[Row]]] = {
        "one-host": lambda folder, args: one_host_rows(folder, args.repeats),
        "hosts": lambda folder, args: hosts_rows(folder, args.repeats, meeting=False),
        "meeting-host": lambda folder, args: hosts_rows(folder, args.repeats, meeting=True),
        "hosts-peer": lambda folder, args: peer_rows(folder, args.limit_seconds),
        "replicas": lambda folder, args: replicas_rows(
            folder, args.repeats, args.steps, args.torchft_python
        ),
    }
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    rows: list[Row] = []
    about = machine()
    with scratch_folder(args.folder) as folder:
        for part in args.parts:
            (folder / part).mkdir()
            rows += parts[part](folder / part, args)
    report("Until training goes on", rows, claims(rows), about, args.json)
    if args.markdown:
        args.markdown.write_text(markdown(rows))
    return 0


def claims(rows: Sequence[Row]) -> list[Claim]:
    """That no sample is dropped, or trained on twice."""
    return [
        at_most(f"{row.figure}, {row.contestant}", max(row.values), 0, "samples")
        for row in rows
        if row.figure in (DROPPED, TWICE)
    ]


if __name__ == "__main__":
    sys.exit(main())
