"""The command that proves sources: `python -m data_service.verify SOURCE...`.

Covers: every object is what the index names; documents end where it says; each document is on the
side that the stamp's rule gives it, told again from its tokens; no document and no piece of one is
held out here and trained on there, over all the sources together.
Does not cover: texts that are alike but for more than case, Unicode composition and white space.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
import tyro
from rich.console import Console

from data_service.progress import PreparationProgress
from data_service.shard_format import dtype_named, npy_array
from data_service.source import Source, open_source
from data_service.source_index import ShardEntry
from data_service.validation_split import normalise, pieces, readings, side_of
from storage.canonical import sha256_hex
from storage.commands import run_command
from storage.errors import ConfigurationError, DataError, IntegrityError, RangeFlowError
from storage.store import Store, open_store

_DESCRIPTION = """Proves that sources are whole, and that no held-out text of any is trained on.

Reads everything: all objects are hashed, all documents decoded. Exit code 0 only if all holds.

Example:
    python -m data_service.verify data/books data/chat
"""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyArguments:
    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE...")]
    """Folders or URLs of sources that are to be mixed; one is enough."""
    json: bool = False
    """Print the result as JSON."""


class Proof(NamedTuple):
    """What was looked at: all of one source, or one of its shards."""

    url: str
    fingerprint: str
    objects: int
    tokens: int
    documents: int


class _Seen:
    """Which documents and pieces of them are held out: 16 bytes of sha256 each."""

    def __init__(self) -> None:
        self.held_out: dict[bytes, str] = {}

    def check(self, text: str, is_whole: bool, split: str, source: Source, where: str) -> None:
        """Refuse a text on the wrong side, or one that is on the other side somewhere."""
        stamp = source.index.stamp
        if is_whole:
            ways = [[normalise(text)]]
        elif stamp.is_by_position:
            ways = [[normalised for _, normalised in pieces(text)]]
        else:
            ways = list(readings(text))
        if stamp.is_by_position:
            chosen = ways[0]
        else:
            right = (way for way in ways if all(side_of(p, stamp) == split for p in way))
            found = next(right, None)
            if found is None:
                raise DataError(
                    f"{where} is in {split}, and the hash of its text says otherwise "
                    f"({_beginning(text)}); prepare the source again"
                )
            chosen = found
        for normalised in {normalise(text), *chosen} - {""}:
            digest = hashlib.sha256(normalised.encode()).digest()[:16]
            if split == "validation":
                self.held_out.setdefault(digest, where)
            elif digest in self.held_out:
                raise DataError(
                    f"{where} is trained on and held out in {self.held_out[digest]} "
                    f"({_beginning(text)}); prepare both anew from their texts, or leave one out"
                )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; what it returns is the exit code."""
    return run_command(
        VerifyArguments,
        _execute,
        argv,
        prog="python -m data_service.verify",
        description=_DESCRIPTION,
    )


def verified(sources: Sequence[Source], progress: PreparationProgress | None = None) -> list[Proof]:
    """Proves the sources; IntegrityError or DataError names the first thing that does not hold."""
    first = sources[0]
    for source in sources[1:]:
        if source.index.stamp != first.index.stamp:
            raise DataError(
                f"{first.url} and {source.url} were split by different rules "
                f"({first.index.stamp.to_json()}, {source.index.stamp.to_json()}), so they must "
                "not be mixed; prepare both in the same way"
            )
    seen = _Seen()
    proofs = {id(s): Proof(s.url, s.fingerprint, 0, 0, 0) for s in sources}
    for split in ("validation", "train"):
        for source in sources:
            for proof in _verified_split(source, split, seen):
                old = proofs[id(source)]
                sums = (a + b for a, b in zip(old[2:], proof[2:], strict=True))
                proofs[id(source)] = Proof(*old[:2], *sums)
                if progress is not None:
                    progress.advance(proof.tokens, proof.tokens, True)
    return list(proofs.values())


def _verified_split(source: Source, split: str, seen: _Seen) -> Iterator[Proof]:
    """What was looked at, shard by shard. A document may go on in the unit's next shard."""
    store = open_store(source.url)
    left: Ids = np.zeros(0, dtype=np.int64)
    unit = ""
    for entry in source.shards(split):
        where = f"{source.url}: shard {entry.name}"
        if entry.name.rpartition("-")[0] != unit and left.size:
            raise DataError(f"{where}: the document before it has no end; prepare the source again")
        unit = entry.name.rpartition("-")[0]
        tokens, ends = _verified_shard(store, entry, source, where)
        start = 0
        for number, end in enumerate(ends.tolist()):
            ids = np.concatenate((left, tokens[start : end - 1]))
            left, start = ids[:0], end
            chat = source.tokenizer.chat_ids
            is_chat = chat is not None and ids.size > 0 and int(ids[0]) == chat[0]
            text = source.tokenizer.decode(ids)
            seen.check(text, is_chat, split, source, f"{where}, document {number}")
        left = np.concatenate((left, tokens[start:]))
        objects = 3 if entry.mask_bytes else 2
        yield Proof(source.url, source.fingerprint, objects, entry.tokens, entry.documents)
    if left.size:
        raise DataError(f"{source.url}: the last document of {split} has no end; prepare it again")


def _verified_shard(store: Store, entry: ShardEntry, source: Source, where: str) -> tuple[Ids, Ids]:
    """The tokens and the document ends of a shard, checked against the index."""
    tokens = _verified_object(store, entry.tokens_key, entry.bytes, entry.sha256, where)
    ends = _verified_object(store, entry.ends_key, entry.ends_bytes, entry.ends_sha256, where)
    mask_bits = entry.tokens
    if entry.mask_bytes:
        key = entry.mask_key
        mask_bits = (
            8 * _verified_object(store, key, entry.mask_bytes, entry.mask_sha256, where).size
        )
    end = source.tokenizer.end_of_text
    at = ends.astype(np.int64)
    holds = {
        "the dtype": tokens.dtype == dtype_named(source.index.dtype),
        "the number of tokens": tokens.shape == (entry.tokens,),
        "the number of documents": at.shape == (entry.documents,),
        "an id": not tokens.size or int(tokens.max()) < source.vocab_size,
        "the documents' ends": np.array_equal(np.flatnonzero(tokens == end) + 1, at),
        "the length of the mask": 0 <= mask_bits - entry.tokens < 8,
    }
    for what, is_right in holds.items():
        if not is_right:
            raise DataError(f"{where}: {what} is not what the index says; prepare the source again")
    return tokens.astype(np.int64), at


def _verified_object(
    store: Store, key: str, size_bytes: int, sha256: str, where: str
) -> npt.NDArray[np.generic]:
    try:
        data = store.get(key)
    except FileNotFoundError:
        raise DataError(f"{where}: {key} is missing; copy it there again") from None
    found = sha256_hex(data)
    if found != sha256 or len(data) != size_bytes:
        raise IntegrityError(
            f"{where}: {key} has {len(data)} bytes of sha256 {found[:12]}, the index names "
            f"{size_bytes} of {sha256[:12]}: its bytes have changed; copy it there again"
        )
    try:
        return npy_array(data)
    except ValueError as error:
        raise DataError(f"{where}: {key} is no .npy file ({error})") from None


def _execute(arguments: VerifyArguments) -> int:
    if not arguments.sources:
        raise ConfigurationError("name the sources to verify: folders or URLs, one or several")
    try:
        sources = [open_source(url, url) for url in arguments.sources]
        tokens = sum(
            entry.tokens
            for s in sources
            for split in ("train", "validation")
            for entry in s.shards(split)
        )
        console = Console(stderr=True)
        with PreparationProgress(tokens, console=console, title="verifying") as progress:
            proofs = verified(sources, progress)
    except RangeFlowError as error:
        if not arguments.json:
            raise
        print(json.dumps({"holds": False, "violation": str(error), "sources": []}))
        return error.exit_code
    if arguments.json:
        said = {"holds": True, "violation": None, "sources": [p._asdict() for p in proofs]}
        print(json.dumps(said))
        return 0
    for proof in proofs:
        print(
            f"{proof.url}: {proof.objects} objects, {proof.tokens:,} tokens, "
            f"{proof.documents:,} documents are what fingerprint {proof.fingerprint[:12]} names"
        )
    print("no held-out text is trained on")
    return 0


def _beginning(text: str) -> str:
    return f"it begins {' '.join(text.split())[:60]!r}"


if __name__ == "__main__":
    sys.exit(main())
