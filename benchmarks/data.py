"""Feeding a training step: RangeFlow beside the loaders that people use, on identical tokens.

- throughput: tokens/s to the training process as int64, nothing else running;
- start: from the first line after the imports, and from the start of the process, to the first
  batch, at position 0 and at 10^8 samples of a corpus of twice that;
- mixture: the largest deviation of a source's count from its exact share, over all prefixes;
- resume: how many batches after a restore in a new process equal those of a run never stopped;
- elastic: the same for global batches, as sets, after a change of world size 1 -> 2 -> 4;
- downloads: bytes that an epoch fetches from another place, against the size of the cache.

Every task runs in a process of its own, every repeat runs every contestant once, in rotating
order. A contestant is tried with the number of workers that is recommended for two cores, and, in
`throughput`, with the other settings that may be faster.
"""

import argparse
import importlib.metadata
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file, with `benchmarks/` in front of the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.data_corpus import NAMES
from benchmarks.data_parts import DRIFT, EQUAL, FILLED, GLOBAL, WRONG, Measure
from benchmarks.data_registry import MAKERS, NANOGPT, OURS
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

PARTS = ("throughput", "start", "mixture", "resume", "elastic", "downloads")
PACKAGES = ("mosaicml-streaming", "litdata", "torchdata", "datasets", "grain", "numpy", "pyarrow")
FAR_SAMPLES = 100_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0 when it ran, whether or not the claims hold."""
    parser = arguments(
        argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help="on the disk to measure")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--contestants", nargs="+", choices=list(MAKERS), default=list(MAKERS))
    parser.add_argument("--tokens", type=int, default=100_000_000, help="default: %(default)s")
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 128])
    parser.add_argument("--batch", type=int, default=64, help="sequences a step")
    parser.add_argument("--seconds", type=float, default=4.0, help="of one turn of throughput")
    parser.add_argument("--far", type=int, default=FAR_SAMPLES, help="samples; default 10^8")
    parser.add_argument("--samples", type=int, default=100_000, help="of the mixture")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds of one task")
    parser.add_argument("--memory", type=float, default=16.0, help="GiB of one task")
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.batch % 4:
        parser.error("--repeats must be at least 1, --batch a multiple of 4")
    about = machine() | {"tokens": args.tokens, "batch": args.batch, **_versions()}
    with scratch_folder(args.folder) as folder:
        measure = Measure(folder, args)
        rows = [row for part in PARTS if part in args.parts for row in getattr(measure, part)()]
    about["not measured"] = measure.missing
    report("Loading data", rows, claims(rows), about, args.json)
    return 0


def claims(rows: Sequence[Row]) -> list[Claim]:
    """The targets of issue 4, those whose figures were measured."""
    of = {(row.figure, row.contestant): row.median for row in rows}
    found = []
    for figure in dict.fromkeys(row.figure for row in rows):
        ours = of.get((figure, OURS))
        if ours is None:
            continue
        peers = [
            value
            for (told, name), value in of.items()
            if told == figure and name != OURS and not name.startswith(NANOGPT)
        ]
        if figure.startswith("throughput") and peers:
            name = f"{figure}, of the best peer that shuffles and mixes"
            found.append(at_least(name, ours / max(peers), 1.0))
        elif figure.startswith("first batch at") and figure.endswith("samples"):
            found.append(at_most(figure, ours, 0.5, "s"))
        elif figure == DRIFT:
            found.append(at_most(DRIFT, ours, 1 - 1 / (2 * len(NAMES) - 2), "samples"))
        elif figure == WRONG:
            found.append(at_most(WRONG, ours, 0.0, "samples"))
        elif figure.startswith(FILLED):
            found.append(at_most(f"{figure}, rangeflow", ours, 1.0, "of its limit"))
        elif figure == EQUAL or figure.startswith(GLOBAL):
            found.append(at_least(figure, ours, 1.0, "of all"))
    return found + _as_exact(rows)


def _as_exact(rows: Sequence[Row]) -> list[Claim]:
    """How many peers are as exact as RangeFlow in all that was measured of it."""
    of: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.figure in (DRIFT, WRONG, EQUAL) or row.figure.startswith(GLOBAL):
            good = -row.median if row.figure in (DRIFT, WRONG) else row.median
            of.setdefault(row.contestant, {})[row.figure] = good
    ours = of.pop(OURS, {})
    if len(ours) < 5:
        return []
    equal = [
        name
        for name, found in of.items()
        if all(found.get(figure, -math.inf) >= value for figure, value in ours.items())
    ]
    return [at_most("peers as exact in mixture, resume and elasticity", len(equal), 0, "peers")]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # tasks end too
    sys.exit(main())
