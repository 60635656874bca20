"""What the size of the data costs: a start and a batch on 100 to 1,000,000 shards of 12 sources.

Shards of 10 M tokens, so that the largest size is 10^13 tokens. Every figure is of a fresh process:

- open: all sources, their tables verified; of a source with up to 1,000 shards, each is looked at;
- seek: the batches, at 10^8 samples;
- first places: where each sequence of that step lies;
- resume: the cursor of that step, and its check;
- peak memory by then, libraries and mapped tables included;
- CPU time of a batch of 64 x 1,024 tokens, at positions and in epochs far apart, when its shards
  are verified;
- explain: the whole command `data_service.explain`, from its start to its exit, with the text of
  all 64 sequences of that step; GPT-2's vocabulary comes from TIKTOKEN_CACHE_DIR or the network.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file, with `benchmarks/` in front of the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.data_scale_process import (
    EPOCHS,
    MEMORY,
    PHASES,
    SAMPLES,
    explain_seconds,
    measured,
    step_figure,
    write_data,
)
from benchmarks.measuring import Claim, Row, arguments, at_most, machine, report

SOURCES = 12
SIZES = (100, 1_000, 10_000, 100_000, 1_000_000)
SHARD_TOKENS = 10_000_000

START = "start: all of these"
EXPLAIN = "explain a step"
BATCHES = [
    *(step_figure("samples", samples) for samples in SAMPLES),
    *(step_figure("epoch", epoch) for epoch in EPOCHS),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0 when it ran, whether or not the claims hold."""
    parser = arguments(
        argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="shards in all")
    parser.add_argument("--shard_tokens", type=int, default=SHARD_TOKENS)
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2 or bytes")
    args = parser.parse_args(argv)
    if args.repeats < 1 or min(args.sizes) < 2 * SOURCES:
        parser.error(f"--repeats must be at least 1 and --sizes at least {2 * SOURCES}")
    about = {
        **machine(),
        "sources": SOURCES,
        "shard_tokens": args.shard_tokens,
        "tokenizer": args.tokenizer,
    }
    with tempfile.TemporaryDirectory(prefix="data_scale.") as folder:
        places = {size: Path(folder) / str(size) for size in args.sizes}
        for size, place in places.items():
            print(f"writing the index of {size:,} shards", file=sys.stderr)
            write_data(
                place,
                sources=SOURCES,
                shards=size,
                shard_tokens=args.shard_tokens,
                tokenizer_name=args.tokenizer,
            )
        found: dict[int, list[dict[str, float]]] = {size: [] for size in args.sizes}
        for number in range(args.repeats):
            for size, place in places.items():
                print(f"round {number + 1} of {args.repeats}: {size:,} shards", file=sys.stderr)
                found[size].append({**measured(place), EXPLAIN: explain_seconds(place)})
    rows = rows_of(found)
    report("The size of the data", rows, claims(rows, args.sizes), about, args.json)
    return 0


def rows_of(found: dict[int, list[dict[str, float]]]) -> list[Row]:
    """Figure by figure, every size, against the smallest."""
    least = contestant(min(found))

    def row(figure: str, size: int, values: Sequence[float], unit: str) -> Row:
        name = contestant(size)
        against = "" if name == least else least
        return Row(figure=figure, contestant=name, values=tuple(values), unit=unit, against=against)

    rows: list[Row] = []
    for figure in PHASES:
        rows += [row(figure, s, [one[figure] for one in found[s]], "s") for s in found]
    rows += [row(START, s, [sum(one[f] for f in PHASES) for one in found[s]], "s") for s in found]
    rows += [row(EXPLAIN, s, [one[EXPLAIN] for one in found[s]], "s") for s in found]
    rows += [row(MEMORY, s, [one[MEMORY] / 1e6 for one in found[s]], "MB") for s in found]
    for figure in BATCHES:
        rows += [row(figure, s, [one[figure] * 1e3 for one in found[s]], "ms") for s in found]
    return rows


def claims(rows: Sequence[Row], sizes: Sequence[int]) -> list[Claim]:
    """What is promised of the largest size, and of a batch anywhere.

    Two batches are compared by their fastest repeats: what slows a repeat is the machine.
    """
    most = contestant(max(sizes))
    largest = {row.figure: row.median for row in rows if row.contestant == most}
    batches = [min(row.values) for row in rows if row.figure in BATCHES]
    return [
        at_most(f"start on {most}", largest[START], 1.0, "s"),
        at_most(f"{EXPLAIN} on {most}", largest[EXPLAIN], 1.0, "s"),
        at_most(f"peak memory of a start on {most}", largest[MEMORY], 500.0, "MB"),
        at_most("a batch anywhere / the cheapest", max(batches) / min(batches), 1.5),
    ]


def contestant(size: int) -> str:
    """How the table names a size."""
    return f"{size:,} shards"


if __name__ == "__main__":
    sys.exit(main())
