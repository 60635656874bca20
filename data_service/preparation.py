"""Turning documents into a source: tokens in shards, held-out text apart, the index last.

The work is cut into tasks (`tasks.py`), done here or by worker processes, and a ledger says which
are done: kill any process at any instant and run it again, with however many workers, and the
objects are bit for bit those of an uninterrupted run.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

from data_service.duplicates import shares_for
from data_service.inputs import Corpus, Part
from data_service.ledger import bound_ledger
from data_service.recipe import SHARD_TOKENS, Recipe, kept_document
from data_service.shard_format import dtype_for
from data_service.shard_writer import Announce, are_there
from data_service.source_index import (
    SPLITS,
    ShardEntry,
    SourceIndex,
    read_index,
    write_index,
)
from data_service.tasks import (
    Done,
    Job,
    Record,
    Task,
    Tasks,
    entries_of,
    spill_folder,
)
from data_service.tokenizer import CharacterTokenizer, Tokenizer
from data_service.validation_split import ValidationStamp
from data_service.workers import Workers
from storage.errors import ConfigurationError, DataError, IntegrityError
from storage.store import Store

logger = logging.getLogger(__name__)

VALIDATION_PERMILLE = 10

# Below what English gives (4.2 to 4.6 for GPT-2), so that a unit mostly fits one shard.
_BYTES_PER_TOKEN = {"gpt2": 4.0, "gpt2-chat": 4.0, "bpe": 3.0}
_WINDOWS_TO_WARN = 10 * 1024

Advance = Callable[[int, int, bool], None]
"""Called for each batch with the bytes of text that it was, the tokens that it gave, and whether
this start did it."""
Perform = Callable[[Sequence[Task]], Iterator[tuple[Task, Done]]]


def prepare(
    corpus: Corpus,
    store: Store,
    tokenizer: Tokenizer,
    *,
    shard_tokens: int = SHARD_TOKENS,
    validation_permille: int = VALIDATION_PERMILLE,
    recipe: Recipe | None = None,
    workers: int = 1,
    work: Store | None = None,
    announce: Announce = lambda phase: None,
    advance: Advance = lambda size_bytes, tokens, is_new: None,
) -> SourceIndex:
    """Make the store a source of the corpus; a finished one is left as it is.

    A `recipe` says more than `shard_tokens` and goes before it. With several `workers` the work is
    done in as many processes, unless the corpus or a store is in this one's memory. What a shuffle
    and the search for duplicates write on the way goes to `work`, and is gone in the end.

    `announce` hears "prepare:ledger"; "prepare:shard" before a shard's objects; for the stages
    hashes, duplicates, unit and bucket "prepare:<stage>" after a batch's objects and
    "prepare:<stage>-done" after its record; "prepare:index" before and "prepare:done" after the
    index; "prepare:swept" when all is cleared away. Raises DataError for text it cannot take,
    BindingError when the store holds another preparation.
    """
    recipe = Recipe(shard_tokens=shard_tokens) if recipe is None else recipe
    work = store if work is None else work
    if workers < 1:
        raise ConfigurationError(f"workers must be at least 1, got {workers}")
    stamp = (
        ValidationStamp.by_position(corpus.tail_permille)
        if corpus.tail_permille
        else ValidationStamp(permille=validation_permille)
    )
    if not store.list("ledger/") and store.list(""):
        raise ConfigurationError(
            f"{store.url} is not empty and holds no preparation to go on with; "
            "prepare into another --out"
        )
    ledger = bound_ledger(store, _binding(corpus, tokenizer, stamp, recipe))
    announce("prepare:ledger")
    index = _finished_index(store)
    if index is None or not all(are_there(store, index.shards(split)) for split in SPLITS):
        job = Job(
            corpus=corpus,
            store=store,
            work=work,
            tokenizer=tokenizer,
            stamp=stamp,
            recipe=recipe,
            binding=ledger.binding,
            unit_bytes=_unit_bytes(recipe, tokenizer.name),
        )
        units = corpus.units(job.unit_bytes)
        with _performing(job, min(workers, len(units)), announce) as perform:
            index = _Stages(job, units, perform, advance).index()
        corpus.check_unchanged()
        announce("prepare:index")
        write_index(store, index)
        announce("prepare:done")
    left = work.list(spill_folder(ledger.binding))
    for key in left:
        work.delete(key)
    if left:
        announce("prepare:swept")
    return index


def texts_of(corpus: Corpus, recipe: Recipe) -> Iterator[str]:
    """All text of a corpus, as the recipe leaves it: for tokenizers that are made from it.

    Cut as for a tokenizer of characters, which must know all that is left of each part.
    """
    for parts in corpus.units(_unit_bytes(recipe, CharacterTokenizer.name)):
        for part in parts:
            for document in corpus.documents(part):
                kept = kept_document(document, recipe)
                if isinstance(kept, str):
                    yield kept
                elif kept is not None:
                    yield from (turn.content for turn in kept)


def passes_of(recipe: Recipe) -> int:
    """How often a preparation goes over its text: `advance` hears of all its bytes as often."""
    return 1 + recipe.deduplicate + recipe.shuffle


def _unit_bytes(recipe: Recipe, tokenizer: str) -> int:
    return max(1, int(0.9 * recipe.shard_tokens * _BYTES_PER_TOKEN.get(tokenizer, 1.0)))


@contextlib.contextmanager
def _performing(job: Job, workers: int, announce: Announce) -> Iterator[Perform]:
    """Does tasks, in this process or by workers."""
    places = (job.store.url, job.work.url)
    in_memory = job.corpus.spec() is None or any(url.startswith("memory:") for url in places)
    if workers <= 1 or in_memory:
        tasks = Tasks(job, announce)
        yield lambda todo: ((task, done) for task in todo for done in tasks.perform(task))
    else:
        with Workers(workers, job, announce) as crew:
            yield crew.perform


class _Stages:
    """The stages of one preparation, one after the other."""

    def __init__(
        self, job: Job, units: Sequence[Sequence[Part]], perform: Perform, advance: Advance
    ) -> None:
        self._job = job
        self._perform = perform
        self._advance = advance
        self._units = units
        self._sizes = [sum(part.size_bytes for part in parts) for parts in self._units]

    def index(self) -> SourceIndex:
        """All that comes before the index, and the index, which is not written yet."""
        recipe = self._job.recipe
        known: dict[str, object] = {}
        if recipe.deduplicate:
            known["duplicates"] = self._duplicates()
        if recipe.shuffle:
            known["buckets"] = buckets = self._buckets()
            spills = self._objects(self._run("unit", self._units, known))
            tasks: list[Sequence[Part]] = [()] * sum(buckets.values())
            self._sizes = _shared_out(sum(self._sizes), len(tasks))
            records = self._run("bucket", tasks, {"buckets": buckets, "spills": spills})
        else:
            records = self._run("unit", self._units, known)
        return _checked(
            SourceIndex(
                tokenizer=self._job.tokenizer.spec(),
                tokenizer_fingerprint=self._job.tokenizer.fingerprint,
                dtype=dtype_for(self._job.tokenizer.vocab_size).name,
                train=_entries(records, "train"),
                validation=_entries(records, "validation"),
                stamp=self._job.stamp,
            ),
            self._job.store.url,
        )

    def _duplicates(self) -> list[str]:
        """The objects that say which documents to leave out."""
        shares = shares_for(sum(self._sizes))
        records = self._run("hashes", self._units, {"shares": shares})
        notes = [(unit, key) for unit, record in records for key in sorted(record["objects"])]
        known = {"notes": notes, "units": len(self._units)}
        return self._objects(self._run("duplicates", [()] * shares, known))

    def _buckets(self) -> dict[str, int]:
        """How many shards, about, each split will have."""
        whole = sum(self._sizes)
        held_out = whole * self._job.stamp.permille // 1000
        sizes = {"train": whole - held_out, "validation": held_out}
        return {split: max(1, -(-sizes[split] // self._job.unit_bytes)) for split in SPLITS}

    def _objects(self, records: Sequence[tuple[int, Record]]) -> list[str]:
        return [key for _, record in records for key in sorted(record["objects"])]

    def _run(
        self, stage: str, tasks: Sequence[Sequence[Part]], known: Mapping[str, object]
    ) -> list[tuple[int, Record]]:
        """The records of a stage's batches, each with the number of its task, in order."""
        found: list[tuple[int, int, Record]] = []
        left = list(self._sizes) if stage != "duplicates" else [0] * len(tasks)
        todo = [Task(stage, number, parts, known) for number, parts in enumerate(tasks)]
        for task, done in self._perform(todo):
            found.append((task.number, done.batch, done.record))
            size = min(left[task.number], self._job.unit_bytes)
            size = left[task.number] if done.record["last"] else size
            left[task.number] -= size
            tokens = _tokens(done.record) if stage == "unit" else 0
            self._advance(size, tokens, done.is_new)
        found.sort(key=lambda batch: batch[:2])
        dropped = sum(record.get("dropped", 0) for _, _, record in found)
        if dropped and stage == "unit":
            logger.info("left out %d documents: duplicates, or not as the options ask", dropped)
        return [(number, record) for number, _, record in found]


def _tokens(record: Record) -> int:
    shards = [entry for split in SPLITS for entry in record.get(split, ())]
    return int(record.get("tokens", 0)) + sum(int(entry["tokens"]) for entry in shards)


def _shared_out(whole: int, count: int) -> list[int]:
    return [whole * (n + 1) // count - whole * n // count for n in range(count)]


def _entries(records: Sequence[tuple[int, Record]], split: str) -> tuple[ShardEntry, ...]:
    return tuple(entry for _, record in records for entry in entries_of(record, split))


def _binding(
    corpus: Corpus, tokenizer: Tokenizer, stamp: ValidationStamp, recipe: Recipe
) -> dict[str, object]:
    read = corpus.spec() or {}
    how_read: dict[str, object] = {n: read[n] for n in ("text_field", "format") if n in read}
    return {
        "inputs": [item.to_json() for item in corpus.inputs],
        "settings": {
            "tokenizer": tokenizer.name,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "validation_permille": stamp.permille,
            "validation_rule": stamp.rule,
            **how_read,
            **recipe.to_json(),
        },
    }


def _finished_index(store: Store) -> SourceIndex | None:
    try:
        return read_index(store, where=store.url)
    except FileNotFoundError:
        return None
    except (ConfigurationError, IntegrityError) as error:
        logger.warning("%s; it is made again", error)
        return None


def _checked(index: SourceIndex, where: str) -> SourceIndex:
    if not sum(entry.tokens for entry in index.train):
        raise DataError(
            f"{where}: the inputs hold no text to train on; name other inputs, or leave out less"
        )
    held_out = sum(entry.tokens for entry in index.validation)
    if held_out < _WINDOWS_TO_WARN:
        logger.warning(
            "%s: only %d tokens are held out for validation, and training needs ten windows of "
            "the context; a larger --%s (now %d) or more text gives more",
            where,
            held_out,
            index.stamp.option,
            index.stamp.permille,
        )
    return index
