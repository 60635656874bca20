"""Small sources for the tests of the data service, written to a folder."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_service.plan import Plan, PlanSource, Segment
from data_service.shard_format import dtype_for, npy_bytes
from data_service.source import Source, open_source
from data_service.source_index import ShardEntry, SourceIndex, read_index, write_index
from data_service.tokenizer import Tokenizer, make_tokenizer
from data_service.validation_split import ValidationStamp
from storage.canonical import sha256_hex
from storage.store import open_store


def write_source(
    folder: Path | str,
    *,
    train: Sequence[int] = (400, 300),
    validation: Sequence[int] = (200,),
    tokenizer: Tokenizer | None = None,
    permille: int = 10,
    start: int = 0,
    masked: bool = False,
) -> str:
    """A source with shards of the given numbers of tokens; ids count up from `start` mod 251.

    With `masked`, shards have a loss mask: the model learns the ids that 3 divides.
    """
    tokenizer = make_tokenizer("bytes") if tokenizer is None else tokenizer
    store = open_store(str(folder))
    dtype = dtype_for(tokenizer.vocab_size)
    entries: dict[str, list[ShardEntry]] = {"train": [], "validation": []}
    for split, sizes in (("train", train), ("validation", validation)):
        for number, size in enumerate(sizes):
            tokens = ((np.arange(size) + start + 17 * number) % 251).astype(dtype)
            data, ends = npy_bytes(tokens), npy_bytes(np.array([size], dtype="<i8"))
            mask = b""
            if masked:
                mask = npy_bytes(np.packbits(tokens % 3 == 0, bitorder="little"))
            entry = ShardEntry(
                name=f"{split}-{number:05d}",
                tokens=size,
                bytes=len(data),
                sha256=sha256_hex(data),
                documents=1,
                ends_bytes=len(ends),
                ends_sha256=sha256_hex(ends),
                mask_bytes=len(mask),
                mask_sha256=sha256_hex(mask) if mask else "",
            )
            if mask:
                store.put(entry.mask_key, mask)
            store.put(entry.tokens_key, data)
            store.put(entry.ends_key, ends)
            entries[split].append(entry)
    index = SourceIndex(
        tokenizer=tokenizer.spec(),
        tokenizer_fingerprint=tokenizer.fingerprint,
        dtype=dtype.name,
        train=tuple(entries["train"]),
        validation=tuple(entries["validation"]),
        stamp=ValidationStamp(permille=permille),
    )
    write_index(store, index)
    return str(folder)


def unwritten_source(name: str, *, train: Sequence[int], validation: int = 1000) -> Source:
    """A source of shards that nobody wrote: for what asks where samples are, and not what."""
    tokenizer = make_tokenizer("bytes")

    def entry(shard: str, tokens: int) -> ShardEntry:
        digest = sha256_hex(f"{name} {shard}".encode())
        return ShardEntry(
            name=shard,
            tokens=tokens,
            bytes=2 * tokens + 128,
            sha256=digest,
            documents=1,
            ends_bytes=136,
            ends_sha256=digest,
        )

    index = SourceIndex(
        tokenizer=tokenizer.spec(),
        tokenizer_fingerprint=tokenizer.fingerprint,
        dtype="uint16",
        train=[entry(f"train-{number:05d}", size) for number, size in enumerate(train)],
        validation=[entry("validation-00000", validation)],
        stamp=ValidationStamp(permille=10),
    )
    url = f"memory://unwritten/{name}"
    stores = (open_store(url),)
    return Source(name=name, url=url, stores=stores, index=index, tokenizer=tokenizer)


def change_first_shard(url: str, **changes: object) -> None:
    """Let the index say something else of the first training shard."""
    store = open_store(url)
    index = read_index(store, where=url)
    first, *others = index.train
    write_index(store, replace(index, train=[replace(first, **changes), *others]))  # type: ignore[arg-type]


def made_source(folder: Path, name: str, **options: object) -> Source:
    return open_source(name, write_source(folder / name, **options))  # type: ignore[arg-type]


def segment_of(
    sources: Sequence[Source],
    weights: Sequence[Sequence[tuple[int, int]]] | None = None,
    from_step: int = 0,
) -> Segment:
    """A segment of these sources, with equal weights if none are given."""
    chosen = weights or [[(0, 500_000)]] * len(sources)
    return Segment(
        from_step=from_step,
        sources=tuple(
            PlanSource(
                name=source.name,
                url=source.url,
                fingerprint=source.fingerprint,
                weights=tuple(points),
            )
            for source, points in zip(sources, chosen, strict=True)
        ),
    )


def plan_of(
    sources: Sequence[Source], weights: Sequence[Sequence[tuple[int, int]]] | None = None
) -> Plan:
    return Plan(segments=(segment_of(sources, weights),))
