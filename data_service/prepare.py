"""The command that makes a source of text: `python -m data_service.prepare INPUT... --out URL`.

Kill it at any instant and run the same command again: it goes on where it was, and the source is
bit for bit the same. Exit code 0 when the source is whole, 78 for a mistake of its user, 75 when
a store or network failed and trying again may help.
"""

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from rich.console import Console

from data_service.embedded import EMBEDDED_PERMILLE, embedded_corpus
from data_service.inputs import Corpus, FileCorpus
from data_service.preparation import SHARD_TOKENS, VALIDATION_PERMILLE, prepare
from data_service.progress import PreparationProgress
from data_service.source_index import SPLITS, SourceIndex
from data_service.tokenizer import CharacterTokenizer, Tokenizer, make_tokenizer
from storage.commands import run_command
from storage.errors import ConfigurationError
from storage.store import open_store

__all__ = ["main", "prepare"]

_DESCRIPTION = """Turns text into a source that training reads: token shards, held-out text apart.

Inputs are text files, .jsonl files and folders of them. Killed and run again, it goes on where it
was.

Example:
    python -m data_service.prepare books/ notes.txt --out data/books --tokenizer gpt2
    torchrun --nproc_per_node=1 launch/train.py --data books=data/books
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareArguments:
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT...")] = ()
    """Text files, .jsonl files, folders of them."""
    out: str
    """Where the source goes: a folder, or a URL such as gs://bucket/data/books."""
    tokenizer: Literal["bytes", "chars", "gpt2"] = "bytes"
    """bytes needs no download; chars keeps the vocabulary of the inputs; gpt2 is GPT-2's BPE."""
    embedded: Literal["python", "reference"] | None = None
    """Instead of inputs: the text that every Python has, its library or its language reference."""
    validation_permille: int | None = None
    """Held-out text, in thousandths; the same for all sources of a run. Default 10, embedded 50."""
    shard_tokens: int = SHARD_TOKENS
    """The most tokens in one shard."""
    text_field: str = "text"
    """The field of a JSON line that holds the text."""
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
    corpus: Corpus
    permille = VALIDATION_PERMILLE
    if arguments.embedded is not None:
        corpus = embedded_corpus(arguments.embedded)
        permille = EMBEDDED_PERMILLE
    else:
        corpus = FileCorpus(arguments.inputs, text_field=arguments.text_field)
    if arguments.validation_permille is not None:
        permille = arguments.validation_permille
    total_bytes = sum(item.size_bytes for item in corpus.inputs)
    with PreparationProgress(total_bytes, console=Console(stderr=True)) as progress:
        return prepare(
            corpus,
            open_store(arguments.out),
            _tokenizer(arguments, corpus),
            shard_tokens=arguments.shard_tokens,
            validation_permille=permille,
            announce=announce,
            advance=progress.advance,
        )


def _tokenizer(arguments: PrepareArguments, corpus: Corpus) -> Tokenizer:
    if arguments.tokenizer != "chars":
        return make_tokenizer(arguments.tokenizer)
    texts = (
        text
        for unit in corpus.units(SHARD_TOKENS)
        for part in unit
        for text in corpus.documents(part)
    )
    return CharacterTokenizer.of_texts(texts)


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
