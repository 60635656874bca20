"""What any step trains on: `python -m data_service.explain RUN --step N`.

Past or future: the plan in the log decides every batch, so nothing is replayed. Of each sequence:
the file, where in it, the documents and the text.

Does not cover: bytes that have changed. Text is read by range, since comparing a shard's sha256
would read it whole; training does compare.
"""

import gc
import itertools
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import tyro

from data_service.batches import SampleId
from data_service.run_data import batches_of, moved_sources, open_sources, plans_of, read_log
from data_service.shard_format import HEADER_BYTES, dtype_named, npy_header
from data_service.source import Source
from storage.commands import run_command
from storage.display import print_table
from storage.ending import end_process
from storage.errors import ConfigurationError, DataError
from storage.store import Store, open_store

_MOST_STEPS = 10**12  # positions in a source stay far below 2^63
_READS = 8
_TEXT_WIDTH = 60
_SHOWN_TOKENS = 4 * _TEXT_WIDTH

_DESCRIPTION = """Shows what a step trains on: files, windows, documents and text of every sequence.

Any step, also one that has not been trained, or lies beyond the end of the run.

Example:
    python -m data_service.explain runs/default --step 1200
    python -m data_service.explain gs://bucket/runs/a --step 90000 --sequence 3 --json
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainArguments:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Path or URL of the run."""
    step: int
    """Steps are counted from 0."""
    sequence: int | None = None
    """One sequence of the global batch; all of them when not given."""
    no_text: bool = False
    """Leave the text of each sequence out."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=URL of a source that lies elsewhere now."""
    json: bool = False
    """Print everything as JSON, with the whole text."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; what it returns is the exit code."""

    def execute(arguments: ExplainArguments) -> int:
        found = explain(
            arguments.run,
            arguments.step,
            sequence=arguments.sequence,
            text_tokens=(None if arguments.json else _SHOWN_TOKENS) if not arguments.no_text else 0,
            data=arguments.data,
        )
        if arguments.json:
            print(json.dumps(found))
        else:
            _show(found, text=not arguments.no_text)
        return 0

    return run_command(
        ExplainArguments,
        execute,
        argv,
        prog="python -m data_service.explain",
        description=_DESCRIPTION,
    )


def explain(
    run: str,
    step: int,
    *,
    sequence: int | None = None,
    text_tokens: int | None = None,
    data: Sequence[str] = (),
) -> dict[str, Any]:
    """All that the command tells, as JSON. Offsets of tokens and bytes are those in the file.

    The text is that of a sequence's first `text_tokens` tokens: all for None, left out for 0.
    """
    if not 0 <= step <= _MOST_STEPS:
        raise ConfigurationError(f"--step must be from 0 to {_MOST_STEPS}, got {step}")
    recorded = plans_of(read_log(run))[-1]
    if sequence is not None and not 0 <= sequence < recorded.global_batch_size:
        raise ConfigurationError(
            f"--sequence must be from 0 to {recorded.global_batch_size - 1}, since the global "
            f"batch has {recorded.global_batch_size}; got {sequence}"
        )
    moved = moved_sources(data, list(recorded.plan.sources))
    sources = open_sources(run, recorded, moved, look=False)
    batches = batches_of(recorded, sources)
    ids = dict(enumerate(batches.sample_ids(step)))
    shards = _shards(ids if sequence is None else {sequence: ids[sequence]}, sources)
    with ThreadPoolExecutor(_READS, thread_name_prefix="explain") as pool:
        told = pool.map(lambda shard: _sequences(shard, batches.context, text_tokens), shards)
        sequences = sorted(itertools.chain(*told), key=lambda one: int(one["sequence"]))
    segments = recorded.plan.segments
    number = max(n for n, segment in enumerate(segments) if segment.from_step <= step)
    later = [segment.from_step for segment in segments[number + 1 :]]
    return {
        "run": run,
        "step": step,
        "plan": recorded.plan.prefix(step + 1).hash,
        "segment": {
            "number": number,
            "of": len(segments),
            "from_step": segments[number].from_step,
            "to_step": later[0] if later else None,
            "skip_steps": segments[number].skip_steps,
            "sources": [source.name for source in segments[number].sources],
        },
        "sequences": sequences,
        "bookmarks": batches.bookmarks(step),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shard:
    """A shard that a step reads, and the sequences that it reads of it, by number."""

    source: Source
    name: str
    store: Store
    sequences: dict[int, SampleId]


def _shards(ids: Mapping[int, SampleId], sources: Mapping[str, Source]) -> list[_Shard]:
    stores = {
        name: open_store(sources[name].url) for name in {sample[0] for sample in ids.values()}
    }
    found: dict[tuple[str, str], _Shard] = {}
    for number, sample in ids.items():
        name, _, shard, _ = sample
        if (name, shard) not in found:
            found[name, shard] = _Shard(
                source=sources[name], name=shard, store=stores[name], sequences={}
            )
        found[name, shard].sequences[number] = sample
    return list(found.values())


def _sequences(shard: _Shard, context: int, text_tokens: int | None) -> list[dict[str, Any]]:
    """The sequences of one shard: T + 1 tokens each, of which the last T are predicted."""
    source, tokens = shard.source, context + 1
    item_bytes = dtype_named(source.index.dtype).itemsize
    read_bytes = item_bytes * (tokens if text_tokens is None else min(text_tokens, tokens))
    offset = _offset(shard) if read_bytes else HEADER_BYTES
    ends = source.ends(shard.name)
    told = []
    for number, (name, epoch, _, window) in shard.sequences.items():
        start = window * context
        first, last = np.searchsorted(ends, [start, start + tokens - 1], side="right").tolist()
        first_byte = offset + start * item_bytes
        told.append(
            {
                "sequence": number,
                "source": name,
                "epoch": epoch,
                "url": f"{source.url.rstrip('/')}/{shard.name}.npy",
                "window": window,
                "first_token": start,
                "tokens": tokens,
                "first_byte": first_byte,
                "bytes": tokens * item_bytes,
                "documents": [first, last],
                **({"text": _text(shard, first_byte, read_bytes)} if read_bytes else {}),
            }
        )
    return told


def _offset(shard: _Shard) -> int:
    """Where the tokens begin in the shard's file."""
    try:
        head = shard.store.get(f"{shard.name}.npy", 0, 2 * HEADER_BYTES)
        dtype, _, offset = npy_header(head)
    except FileNotFoundError:
        raise DataError(
            f"{_where(shard)} is missing; copy it there again, or ask with --no-text"
        ) from None
    except ValueError as error:
        raise DataError(f"{_where(shard)} is no .npy file ({error})") from None
    if dtype != dtype_named(shard.source.index.dtype):
        raise DataError(
            f"{_where(shard)} has dtype {dtype}, the index says {shard.source.index.dtype}"
        )
    return offset


def _text(shard: _Shard, first_byte: int, size_bytes: int) -> str:
    data = shard.store.get(f"{shard.name}.npy", first_byte, first_byte + size_bytes)
    if len(data) != size_bytes:
        raise DataError(
            f"{_where(shard)} is truncated: it ends before byte {first_byte + size_bytes}"
        )
    return shard.source.tokenizer.decode(np.frombuffer(data, dtype_named(shard.source.index.dtype)))


def _where(shard: _Shard) -> str:
    return f"source {shard.source.name!r} at {shard.source.url}: {shard.name}.npy"


def _show(found: Mapping[str, Any], *, text: bool) -> None:
    segment = found["segment"]
    until = "" if segment["to_step"] is None else f" to {segment['to_step'] - 1}"
    print(
        f"step {found['step']} of {found['run']}: segment {segment['number'] + 1} of "
        f"{segment['of']}, from step {segment['from_step']}{until} "
        f"({', '.join(segment['sources'])})"
    )
    columns = ["sequence", "source", "epoch", "file", "window", "tokens", "bytes", "documents"]
    rows = [
        [
            told["sequence"],
            told["source"],
            told["epoch"],
            told["url"],
            told["window"],
            _range(told["first_token"], told["tokens"]),
            _range(told["first_byte"], told["bytes"]),
            "-".join(map(str, sorted(set(told["documents"])))),
            *([_cut(told["text"])] if text else []),
        ]
        for told in found["sequences"]
    ]
    print_table([*columns, "text"] if text else columns, rows)
    for name, mark in found["bookmarks"].items():
        print(
            f"before this step {name} has given {mark['count']:,} samples: epoch {mark['epoch']}, "
            f"{mark['count'] % mark['windows']:,} of {mark['windows']:,} windows"
        )


def _range(first: int, count: int) -> str:
    return f"{first}-{first + count - 1}"


def _cut(text: str) -> str:
    """One line of at most 60 characters."""
    line = " ".join(text.split())
    return line if len(line) <= _TEXT_WIDTH else f"{line[: _TEXT_WIDTH - 3]}..."


if __name__ == "__main__":
    gc.disable()  # the program is over before there is anything to collect
    end_process(main())
