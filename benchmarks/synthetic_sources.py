"""Sources of any size that take no disk: an index of up to millions of shards, and one shard.

All shards are the same file of zeros, one document each, so the index tells the truth of each, and
what reads them verifies them as ever. A source small enough to be listed has a hard link for every
shard, and so have the shards of the steps that `write_run` is asked for.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from checkpointing.incarnation import claim_run
from data_service.batches import Batches
from data_service.plan import Plan, PlanSource, Segment
from data_service.recorded import KIND, RecordedPlan
from data_service.shard_format import ENDS_DTYPE, npy_bytes
from data_service.shard_table import Column, ShardTable, name_key
from data_service.source import LISTED_SHARDS, Source, open_source
from data_service.source_index import SourceIndex, write_index
from data_service.tokenizer import make_tokenizer
from data_service.validation_split import ValidationStamp
from storage.contract import check_key
from storage.local_store import LocalStore
from storage.log import Log

_SHARD_KEY = "shard.npy"
_ENDS_KEY = "shard.ends.npy"


class OneShardStore(LocalStore):
    """A folder in which every shard that is not there is the one that is."""

    def local_path(self, key: str) -> Path:
        path = self.root / check_key(key)
        alias = key.endswith(".npy") and not path.exists()
        return self.root / _SHARD_KEY if alias else path


def write_sources(
    folder: Path, *, sources: int, shards: int, shard_tokens: int, tokenizer_name: str = "gpt2"
) -> None:
    """Write `sources` sources with `shards` shards in all, one in a hundred of them held out."""
    data = npy_bytes(np.zeros(shard_tokens, dtype="<u2"))
    ends = npy_bytes(np.array([shard_tokens], dtype=ENDS_DTYPE))
    tokenizer = make_tokenizer(tokenizer_name)
    for number in range(sources):
        place = folder / f"source-{number:02d}"
        place.mkdir(parents=True)
        (place / _SHARD_KEY).write_bytes(data)
        (place / _ENDS_KEY).write_bytes(ends)
        count = shards // sources + (number < shards % sources)
        held_out = max(1, count // 100)
        tables = {
            split: _table(split, rows, shard_tokens, data, ends)
            for split, rows in (("train", count - held_out), ("validation", held_out))
        }
        if count <= LISTED_SHARDS:
            for table in tables.values():
                for entry in table:
                    _link(place, entry.name)
        index = SourceIndex(
            tokenizer=tokenizer.spec(),
            tokenizer_fingerprint=tokenizer.fingerprint,
            dtype="uint16",
            train=tables["train"],
            validation=tables["validation"],
            stamp=ValidationStamp(permille=10),
        )
        write_index(LocalStore(place), index)


def open_sources(folder: Path) -> dict[str, Source]:
    """The sources that `write_sources` wrote, by name."""
    places = sorted(place for place in folder.iterdir() if place.is_dir())
    return {
        place.name: open_source(place.name, str(place), store=OneShardStore(place))
        for place in places
    }


def plan_of_all(sources: dict[str, Source]) -> Plan:
    """All sources, with weights from 1 to 2: their epochs end at about the same time."""
    return Plan(
        segments=(
            Segment(
                from_step=0,
                sources=tuple(
                    PlanSource(
                        name=source.name,
                        url=source.url,
                        fingerprint=source.fingerprint,
                        weights=((0, 100_000 + 100_000 * number // len(sources)),),
                    )
                    for number, source in enumerate(sources.values())
                ),
            ),
        )
    )


def write_run(place: Path, batches: Batches, steps: Sequence[int]) -> None:
    """Write the log of a run that has this plan, and the files of the shards that `steps` read."""
    store = LocalStore(place)
    recorded = RecordedPlan(
        plan=batches.plan,
        from_step=0,
        seed=batches.seed,
        context=batches.context,
        global_batch_size=batches.global_batch_size,
        lanes=batches.lanes,
    )
    claim_run(store, Log(store), body={}, take_over=True).append(KIND, lambda _: recorded.to_body())
    for name, _, shard, _ in {sample for step in steps for sample in batches.sample_ids(step)}:
        _link(Path(batches.sources[name].url), shard)


def _link(place: Path, shard: str) -> None:
    for whole, key in ((_SHARD_KEY, f"{shard}.npy"), (_ENDS_KEY, f"{shard}.ends.npy")):
        with suppress(FileExistsError):
            os.link(place / whole, place / key)


def _table(split: str, rows: int, tokens: int, data: bytes, ends: bytes) -> ShardTable:
    names = [f"{split}-{number:07d}" for number in range(rows)]
    digests, ends_digests = (
        np.full(rows, np.void(hashlib.sha256(one).digest()), dtype="V32") for one in (data, ends)
    )
    columns: dict[str, Column] = {
        "name": np.array([name.encode() for name in names]),
        "name_key": np.array([name_key(name) for name in names], dtype="<u8"),
        "tokens": np.full(rows, tokens, dtype="<i8"),
        "bytes": np.full(rows, len(data), dtype="<i8"),
        "documents": np.ones(rows, dtype="<i8"),
        "ends_bytes": np.full(rows, len(ends), dtype="<i8"),
        "mask_bytes": np.zeros(rows, dtype="<i8"),
        "sha256": digests,
        "ends_sha256": ends_digests,
        "mask_sha256": np.zeros(rows, dtype="V32"),
    }
    return ShardTable(columns, where="the index")
