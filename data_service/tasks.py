"""What a process does for a preparation: the tasks of each stage, batch by batch, each once.

Stages, in order: `hashes` and `duplicates` where duplicates are left out; `unit`, which reads,
encodes and writes shards, or spills where documents are shuffled; `bucket`, which then writes the
shards. Units and buckets are numbered; what a task gives depends on its number only, never on who
does it or when. A task's batches are in the ledger as soon as their objects are in the store, and
a batch that is there is not done again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_service.chat import rendered_text
from data_service.duplicates import (
    document_hash,
    duplicates_in,
    find_duplicates,
    note_bytes,
)
from data_service.inputs import Corpus, Document, FileCorpus, Part
from data_service.ledger import Ledger
from data_service.recipe import Recipe, kept_document
from data_service.shard_format import dtype_for
from data_service.shard_writer import (
    Announce,
    Encoded,
    are_there,
    encoded,
    objects_are_there,
    sortable,
    write_shards,
)
from data_service.source_index import SPLITS, ShardEntry, entry_from_json
from data_service.spill import Spilled, bucket_of, read_bucket, shuffle_key, spill_bytes
from data_service.tokenizer import Tokenizer, tokenizer_from_spec
from data_service.validation_split import ValidationStamp, normalise, side_of, split_document
from storage.errors import StoreUnavailableError
from storage.store import Store, open_store

Record = dict[str, Any]
"""What the ledger says of a batch: `documents` read, `dropped` of them, `last` or not, and the
entries of its shards by split or the `objects` that it spilled, with their sizes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A preparation, as every process that works on it must know it."""

    corpus: Corpus
    store: Store
    work: Store
    tokenizer: Tokenizer
    stamp: ValidationStamp
    recipe: Recipe
    binding: str
    unit_bytes: int

    def to_json(self) -> dict[str, object]:
        return {
            "corpus": self.corpus.spec(),
            "store": self.store.url,
            "work": self.work.url,
            "tokenizer": self.tokenizer.spec(),
            "stamp": self.stamp.to_json(),
            "recipe": self.recipe.to_json(),
            "binding": self.binding,
            "unit_bytes": self.unit_bytes,
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Job":
        return Job(
            corpus=FileCorpus.from_spec(value["corpus"]),
            store=open_store(value["store"]),
            work=open_store(value["work"]),
            tokenizer=tokenizer_from_spec(value["tokenizer"]),
            stamp=ValidationStamp.from_json(value["stamp"], where="job"),
            recipe=Recipe(**value["recipe"]),
            binding=value["binding"],
            unit_bytes=value["unit_bytes"],
        )


class Task(NamedTuple):
    """One piece of a stage. `known` is what the stages before gave, as far as the task needs it."""

    stage: str
    number: int
    parts: Sequence[Part] = ()
    known: Mapping[str, Any] = {}


class Done(NamedTuple):
    """A batch that is in the ledger; `is_new` when this start has done it."""

    batch: int
    record: Record
    is_new: bool


class _Item(NamedTuple):
    ordinal: int
    split: str
    document: Document | None  # None: dropped


class Tasks:
    """Does tasks. One per process; not for several threads."""

    def __init__(self, job: Job, announce: Announce) -> None:
        self._corpus = job.corpus
        self._store = job.store
        self._work = job.work
        self._tokenizer = job.tokenizer
        self._stamp = job.stamp
        self._recipe = job.recipe
        self._ledger = Ledger(job.store, job.binding)
        self._folder = spill_folder(job.binding)
        self._unit_bytes = job.unit_bytes
        self._announce = announce

    def perform(self, task: Task) -> Iterator[Done]:
        """The batches of a task, in order, each when it is in the ledger."""
        if task.stage == "hashes":
            return self._read_in_batches(task, self._note)
        if task.stage == "unit":
            if self._recipe.shuffle:
                return self._read_in_batches(task, self._spill)
            return self._read_in_batches(task, self._write)
        if task.stage == "duplicates":
            return self._in_one_batch(task, lambda: self._find_duplicates(task))
        return self._in_one_batch(task, lambda: self._write_bucket(task))

    def _read_in_batches(
        self, task: Task, make: Callable[[Task, int, Mapping[str, int], Iterable[_Item]], Record]
    ) -> Iterator[Done]:
        """Batches of about a unit's bytes: only an input that cannot be cut gives several."""
        reading: _Reading | None = None
        documents_before, shards_before = 0, dict.fromkeys(SPLITS, 0)
        for batch in range(10**9):
            name = f"{task.stage}-{task.number:05d}-{batch:03d}"
            record = self._ledger.done(name)
            is_new = record is None or not self._has_objects(record)
            if record is None or is_new:
                if reading is None:
                    reading = _Reading(self._items(task))
                reading.skip_to(documents_before)
                items = reading.take(self._unit_bytes)
                record = make(task, batch, shards_before, items)
                for _ in items:
                    pass
                record |= {
                    "documents": reading.at - documents_before,
                    "dropped": reading.dropped,
                    "last": reading.is_over,
                }
                self._finish(task.stage, name, record)
            yield Done(batch, record, is_new)
            if record["last"]:
                return
            documents_before += record["documents"]
            for split in SPLITS:
                shards_before[split] += len(record.get(split, ()))

    def _in_one_batch(self, task: Task, make: Callable[[], Record]) -> Iterator[Done]:
        name = f"{task.stage}-{task.number:05d}-000"
        record = self._ledger.done(name)
        is_new = record is None or not self._has_objects(record)
        if record is None or is_new:
            record = {**make(), "last": True}
            self._finish(task.stage, name, record)
        yield Done(0, record, is_new)

    def _finish(self, stage: str, name: str, record: Record) -> None:
        self._announce(f"prepare:{stage}")
        self._ledger.finish(name, record)
        self._announce(f"prepare:{stage}-done")

    def _has_objects(self, record: Record) -> bool:
        entries = [entry for split in SPLITS for entry in entries_of(record, split)]
        return are_there(self._store, entries) and objects_are_there(
            self._work, record.get("objects", {}).items()
        )

    def _note(
        self, task: Task, batch: int, before: Mapping[str, int], items: Iterable[_Item]
    ) -> Record:
        hashes = [
            (*document_hash(item.document), item.ordinal)
            for item in items
            if item.document is not None
        ]
        key = f"{self._folder}hashes-{task.number:05d}-{batch:03d}"
        return self._put_object(key, note_bytes(hashes, task.known["shares"]))

    def _find_duplicates(self, task: Task) -> Record:
        notes = [(unit, key) for unit, key in task.known["notes"]]
        with _written_before(self._work):
            found = find_duplicates(self._work, notes, task.number, task.known["units"])
        return self._put_object(f"{self._folder}duplicates-{task.number:05d}", found)

    def _write(
        self, task: Task, batch: int, before: Mapping[str, int], items: Iterable[_Item]
    ) -> Record:
        documents: dict[str, list[Encoded]] = {split: [] for split in SPLITS}
        for item in items:
            for split, document in self._divided(item):
                documents[split].append(encoded(document, self._tokenizer))
        return {
            split: self._shards(split, task.number, before[split], documents[split])
            for split in SPLITS
        }

    def _spill(
        self, task: Task, batch: int, before: Mapping[str, int], items: Iterable[_Item]
    ) -> Record:
        buckets: Mapping[str, int] = task.known["buckets"]
        spilled: list[Spilled] = []
        tokens = 0
        for item in items:
            for part, (split, document) in enumerate(self._divided(item)):
                key = shuffle_key(self._recipe.shuffle_seed, task.number, item.ordinal, part)
                first = buckets["train"] if split == "validation" else 0
                one = encoded(document, self._tokenizer)
                spilled.append(Spilled(first + bucket_of(key, buckets[split]), key, one))
                tokens += one.ids.size
        name = f"{self._folder}unit-{task.number:05d}-{batch:03d}"
        data = spill_bytes(spilled, sum(buckets.values()))
        return {**self._put_object(name, data), "tokens": tokens}

    def _write_bucket(self, task: Task) -> Record:
        train = task.known["buckets"]["train"]
        split = "train" if task.number < train else "validation"
        dtype = dtype_for(self._tokenizer.vocab_size)
        with _written_before(self._work):
            documents = read_bucket(self._work, task.known["spills"], task.number, dtype)
        number = task.number - (train if split == "validation" else 0)
        return {split: self._shards(split, number, 0, documents)}

    def _shards(
        self, split: str, number: int, first: int, documents: Sequence[Encoded]
    ) -> list[dict[str, object]]:
        entries = write_shards(
            self._store,
            f"{split}-{sortable(number, 5)}",
            first,
            documents,
            shard_tokens=self._recipe.shard_tokens,
            announce=self._announce,
        )
        return [entry.to_json() for entry in entries]

    def _put_object(self, key: str, data: bytes) -> Record:
        self._work.put(key, data)
        return {"objects": {key: len(data)}}

    def _divided(self, item: _Item) -> list[tuple[str, Document]]:
        """A document's parts by split."""
        document = item.document
        if document is None:
            return []
        if item.split:
            return [(item.split, document)] if document else []
        if isinstance(document, str):
            return [(split, part) for split, part in split_document(document, self._stamp)]
        return [(side_of(normalise(rendered_text(document)), self._stamp), document)]

    def _items(self, task: Task) -> Iterator[_Item]:
        """The documents of a task's parts, cleaned; those that are left out are dropped."""
        late: frozenset[int] = frozenset()
        if task.stage == "unit" and self._recipe.deduplicate:
            with _written_before(self._work):
                late = duplicates_in(self._work, task.known["duplicates"], task.number)
        documents = ((part, d) for part in task.parts for d in self._corpus.documents(part))
        for ordinal, (part, document) in enumerate(documents):
            kept = None if ordinal in late else kept_document(document, self._recipe)
            yield _Item(ordinal, part.split, kept)


class _Reading:
    """Items read one ahead, so that the last of a batch knows whether it is the last of all."""

    def __init__(self, items: Iterator[_Item]) -> None:
        self._items = items
        self._next = next(items, None)
        self.at = 0
        self.dropped = 0

    @property
    def is_over(self) -> bool:
        return self._next is None

    def skip_to(self, documents: int) -> None:
        while self.at < documents and self._next is not None:
            self._advance()

    def take(self, size: int) -> Iterator[_Item]:
        """Items until they hold `size` characters."""
        self.dropped = 0
        taken = 0
        while self._next is not None and taken < size:
            item = self._next
            self._advance()
            self.dropped += item.document is None
            taken += _characters(item.document)
            yield item

    def _advance(self) -> None:
        self._next = next(self._items, None)
        self.at += 1


def entries_of(record: Mapping[str, Any], split: str) -> list[ShardEntry]:
    """The shards that a record names."""
    return [entry_from_json(value, where="ledger") for value in record.get(split, ())]


def spill_folder(binding: str) -> str:
    """Where a preparation keeps what it needs on the way, in its work place."""
    return f"spill/{binding[:16]}/"


@contextmanager
def _written_before(work: Store) -> Iterator[None]:
    """For reading what an earlier stage wrote."""
    try:
        yield
    except FileNotFoundError:
        raise StoreUnavailableError(
            f"{work.url}: what was written there on the way is gone, as when another preparation "
            "of the same place ends; run the same command again"
        ) from None


def _characters(document: Document | None) -> int:
    if document is None:
        return 0
    return len(document) if isinstance(document, str) else sum(len(t.content) for t in document)
