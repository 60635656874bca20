"""The command that makes a source of text: `python -m data_service.prepare INPUT... --out URL`.

Kill it at any instant and run the same command again: it goes on where it was, and the source is
bit for bit the same. Exit code 0 when the source is whole, 78 for a mistake of its user, 75 when
a store or network failed and trying again may help.
"""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from data_service.bpe_training import trained_bpe
from data_service.embedded import EMBEDDED_PERMILLE, embedded_corpus
from data_service.inputs import Corpus, FileCorpus, Format
from data_service.preparation import (
    VALIDATION_PERMILLE,
    passes_of,
    prepare,
    texts_of,
)
from data_service.progress import PreparationProgress
from data_service.recipe import SHARD_TOKENS, Recipe
from data_service.source import open_source
from data_service.source_index import SPLITS, SourceIndex
from data_service.tokenizer import CharacterTokenizer, Tokenizer, make_tokenizer
from data_service.validation_split import ValidationStamp
from data_service.workers import available_cores
from storage.commands import run_command
from storage.errors import ConfigurationError
from storage.store import open_store

__all__ = ["main", "prepare"]

_DESCRIPTION = """Turns text into a source that training reads: token shards, held-out text apart.

Inputs are text files, .jsonl files (.gz and .zst too), parquet, data sets saved by Hugging Face's
save_to_disk, and folders of them. Killed and run again, it goes on where it was.

Example:
    python -m data_service.prepare books/ notes.txt --out data/books --tokenizer gpt2
    torchrun --nproc_per_node=1 launch/train.py --data books=data/books
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareArguments:
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT...")] = ()
    """Files of text or records, folders of them, data sets on disk."""
    out: str
    """Where the source goes: a folder, or a URL such as gs://bucket/data/books."""
    tokenizer: str = "bytes"
    """bytes needs no download; chars keeps the characters of the inputs; gpt2 is GPT-2's BPE;
    bytes-chat and gpt2-chat have the marks of conversations too; bpe:SIZE is trained on the inputs
    and has them."""
    tokenizer_of: str | None = None
    """A source whose tokenizer is taken instead: the sources of a mixture must share one."""
    embedded: Literal["python", "reference"] | None = None
    """Instead of inputs: the text that every Python has, its library or its language reference."""
    format: Format = "auto"
    """What records hold: text, or chat in Alpaca's or ShareGPT's shape. auto sees it by fields."""
    text_field: str = "text"
    """The field of a record that holds the text."""
    validation_permille: int | None = None
    """Held-out text, in thousandths; the same for all sources of a run. Default 10, embedded 50."""
    validation_tail: int | None = None
    """Hold out the end of the inputs instead, so many thousandths of them: "90/10 in order"."""
    no_shuffle: bool = False
    """Keep the order of the inputs instead of spreading the documents over all shards; --embedded
    keeps it anyway."""
    shuffle_seed: int = 0
    """Another number gives another order."""
    deduplicate: bool = False
    """Leave out documents that occurred before, but for case and white space."""
    clean: bool = False
    """One form for letters and line ends, one blank line at most, no Project Gutenberg notes."""
    min_words: int = 0
    """Leave out documents of fewer words."""
    max_words: int | None = None
    """Leave out documents of more words."""
    shard_tokens: int = SHARD_TOKENS
    """The most tokens in one shard."""
    workers: int | None = None
    """Processes that do the work; all cores by default. The result is the same."""
    work_dir: str | None = None
    """Where a shuffle and the search for duplicates write on the way; by default into --out."""
    json: bool = False
    """Print the result as JSON."""


def main(
    argv: Sequence[str] | None = None, *, announce: Callable[[str], None] = lambda phase: None
) -> int:
    """Run the command; what it returns is the exit code."""

    def execute(arguments: PrepareArguments) -> int:
        with _logging_to_stderr():
            index = _prepare(arguments, announce)
        print(_summary(arguments, index))
        return 0

    return run_command(
        PrepareArguments,
        execute,
        argv,
        prog="python -m data_service.prepare",
        description=_DESCRIPTION,
    )


def _prepare(arguments: PrepareArguments, announce: Callable[[str], None]) -> SourceIndex:
    if bool(arguments.inputs) == (arguments.embedded is not None):
        raise ConfigurationError(
            "name what to prepare: text files, .jsonl files or folders; or --embedded python, or "
            "--embedded reference, without inputs"
        )
    if arguments.validation_tail is not None and (
        arguments.embedded is not None or arguments.validation_permille is not None
    ):
        raise ConfigurationError(
            "--validation_tail says where the held-out text is by itself: leave out "
            "--validation_permille and --embedded"
        )
    if arguments.validation_tail is not None:
        ValidationStamp.by_position(arguments.validation_tail)
    _refuse_inputs_around(arguments.out, arguments.inputs)
    corpus: Corpus
    permille = VALIDATION_PERMILLE
    if arguments.embedded is not None:
        corpus = embedded_corpus(arguments.embedded)
        permille = EMBEDDED_PERMILLE
    else:
        corpus = FileCorpus(
            arguments.inputs,
            text_field=arguments.text_field,
            format=arguments.format,
            tail_permille=arguments.validation_tail or 0,
        )
    if arguments.validation_permille is not None:
        permille = arguments.validation_permille
    recipe = Recipe(
        shard_tokens=arguments.shard_tokens,
        clean=arguments.clean,
        min_words=arguments.min_words,
        max_words=arguments.max_words,
        deduplicate=arguments.deduplicate,
        shuffle=not arguments.no_shuffle and arguments.embedded is None,
        shuffle_seed=arguments.shuffle_seed,
    )
    workers = available_cores() if arguments.workers is None else arguments.workers
    units = corpus.units(SHARD_TOKENS)
    total_bytes = sum(part.size_bytes for parts in units for part in parts) * passes_of(recipe)
    with PreparationProgress(total_bytes, console=Console(stderr=True)) as progress:
        return prepare(
            corpus,
            open_store(arguments.out),
            _tokenizer(arguments, corpus, recipe),
            validation_permille=permille,
            recipe=recipe,
            workers=workers,
            work=None if arguments.work_dir is None else open_store(arguments.work_dir),
            announce=announce,
            advance=progress.advance,
        )


def _refuse_inputs_around(out: str, inputs: Sequence[str]) -> None:
    """A ledger is .json files, which a folder's reader takes for records."""
    index = open_store(out).local_path("index.json")
    if index is None:
        return
    for path in inputs:
        place, folder = Path(os.path.realpath(index.parent)), os.path.realpath(path)
        if place.is_relative_to(folder) and not any(
            part.startswith(".") for part in place.relative_to(folder).parts
        ):
            raise ConfigurationError(
                f"--out {out} lies in the input {path}: the next start would read what this one "
                "writes; give it a place outside"
            )


def _tokenizer(arguments: PrepareArguments, corpus: Corpus, recipe: Recipe) -> Tokenizer:
    if arguments.tokenizer_of is not None:
        return open_source("tokenizer", arguments.tokenizer_of).tokenizer
    name, _, size = arguments.tokenizer.partition(":")
    if name == "bpe":
        if not size.isdecimal():
            raise ConfigurationError(
                f"bpe needs the size of its vocabulary, such as bpe:5000; got "
                f"{arguments.tokenizer!r}"
            )
        return trained_bpe(texts_of(corpus, recipe), int(size))
    if arguments.tokenizer == "chars":
        return CharacterTokenizer.of_texts(texts_of(corpus, recipe))
    return make_tokenizer(arguments.tokenizer)


@contextlib.contextmanager
def _logging_to_stderr() -> Iterator[None]:
    logger = logging.getLogger("data_service")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _summary(arguments: PrepareArguments, index: SourceIndex) -> str:
    tokens = {split: sum(entry.tokens for entry in index.shards(split)) for split in SPLITS}
    if arguments.json:
        return json.dumps(
            {
                "out": arguments.out,
                "fingerprint": index.fingerprint,
                "tokenizer": index.tokenizer["kind"],
                "shards": {split: len(index.shards(split)) for split in SPLITS},
                "tokens": tokens,
            }
        )
    return (
        f"{arguments.out}: {tokens['train']:,} training and {tokens['validation']:,} held-out "
        f"tokens in {len(index.train)} + {len(index.validation)} shards, "
        f"fingerprint {index.fingerprint[:12]}; train with --data NAME={arguments.out}"
    )


if __name__ == "__main__":
    sys.exit(main())
