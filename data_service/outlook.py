"""The numbers of a forecast: what a plan reads of each source, how often, and what that moves.

The counts are those of the batches themselves, so they are exact.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_service.batches import Batches
from data_service.plan import Plan
from data_service.shard_format import dtype_named
from data_service.shares import shares_of_steps
from data_service.source import Source
from storage.store import open_store

MOST_EPOCHS = 4.0
"""Up to four epochs of a source are about as good as new data, and of more than that the worth
falls off quickly: Muennighoff et al., "Scaling Data-Constrained Language Models", NeurIPS 2023."""

TOKENS_PER_PARAMETER = 20.0
"""Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022 (Chinchilla), table 3."""

_ROWS_OF_A_RAMP = 8


def source_outlooks(
    batches: Batches, sources: Mapping[str, Source], max_steps: int, done: int
) -> list[dict[str, Any]]:
    """What each source gives in `max_steps` steps, `done` of them done, and how large it is."""
    counts, seen, windows = _samples(batches, max_steps), _samples(batches, done), batches.windows()
    told = []
    for name, count in counts.items():
        source = sources[name]
        train = source.shards("train")
        shard_bytes = np.sort(train.all_bytes)
        held_out = source.shards("validation").all_bytes
        tokens = int(train.tokens.sum())
        told.append(
            {
                "source": name,
                "url": source.url,
                "samples": count,
                "samples_done": seen[name],
                "tokens": count * batches.context,
                "epochs": count / windows[name],
                "windows": windows[name],
                "source_tokens": tokens,
                "unread_tokens": tokens - windows[name] * batches.context,
                "shards": len(train),
                "bytes": int(shard_bytes.sum()),
                "largest_shard_bytes": max(int(shard_bytes[-1]), int(held_out.max(initial=0))),
                "under_way_bytes": int(shard_bytes[-batches.lanes :].sum()),
                "token_bytes": dtype_named(source.index.dtype).itemsize,
                "remote": open_store(source.url).local_path(train[0].tokens_key) is None,
            }
        )
    return told


def _samples(batches: Batches, step: int) -> Counter[str]:
    """The samples of each source in the steps before `step`; what edits skip is not among them."""
    samples = Counter(batches.counts(step))
    for at in (s.from_step for s in batches.plan.segments if s.skip_steps and s.from_step < step):
        samples.subtract(batches.counts(at + 1))
        samples.update(batches.counts(at))
        samples.update(batches.sources_of(at))
    return samples


def warnings_of(
    sources: Sequence[Mapping[str, Any]], tokens: int, parameters: float | None
) -> list[str]:
    warnings = [
        f"source {told['source']}: each sample comes {told['epochs']:.1f} times. More than about "
        f"{MOST_EPOCHS:.0f} epochs are memorised rather than learned (Muennighoff et al. 2023): "
        "give it less weight, or more text"
        for told in sources
        if told["epochs"] > MOST_EPOCHS
    ]
    warnings += [
        f"source {told['source']}: no sample of it is read; its weight is 0 or the run too short"
        for told in sources
        if not told["samples"]
    ]
    if parameters is not None and tokens < TOKENS_PER_PARAMETER * parameters:
        warnings.append(
            f"{tokens / parameters:.1f} tokens per parameter are fewer than the "
            f"{TOKENS_PER_PARAMETER:.0f} of Chinchilla (Hoffmann et al. 2022): a smaller model or "
            "more steps would use the same compute better"
        )
    return warnings


def volume_of(sources: Sequence[Mapping[str, Any]], plan: Plan) -> dict[str, int]:
    """Bytes of training shards, and what is downloaded, with room for all and for the least.

    The least are the shards that all lanes of a segment's sources read at a time, and one more.
    """
    remote = [told for told in sources if told["remote"]]
    under_way = {told["source"]: told["under_way_bytes"] for told in remote}
    most = max(sum(under_way.get(s.name, 0) for s in segment.sources) for segment in plan.segments)
    return {
        "bytes": sum(told["bytes"] for told in sources),
        "remote_bytes": sum(told["bytes"] for told in remote),
        "download_bytes": sum(round(told["bytes"] * min(1.0, told["epochs"])) for told in remote),
        "least_cache_download_bytes": sum(round(told["bytes"] * told["epochs"]) for told in remote),
        "least_cache_bytes": most
        + max((told["largest_shard_bytes"] for told in remote), default=0),
    }


def rate_of(
    sources: Sequence[Mapping[str, Any]],
    tokens_per_second: float | None,
    tokens: int,
    context: int,
) -> dict[str, float] | None:
    """Bytes per second that training reads, and that come from afar once, at a speed."""
    if tokens_per_second is None:
        return None
    read = remote = 0.0
    for told in sources:
        each = tokens_per_second * told["tokens"] / tokens * told["token_bytes"]
        read += each * (context + 1) / context
        remote += (
            each
            * told["bytes"]
            / (told["token_bytes"] * told["windows"] * context)
            * (told["remote"])
        )
    return {
        "tokens_per_second": tokens_per_second,
        "read_bytes_per_second": round(read, 1),
        "remote_bytes_per_second": round(remote, 1),
        "hours": tokens / tokens_per_second / 3600,
    }


def mixture_rows(plan: Plan, max_steps: int) -> list[dict[str, Any]]:
    """Shares in parts per million at each step where they change; eight rows of a long ramp."""
    rows: list[dict[str, Any]] = []
    ends = [*(segment.from_step for segment in plan.segments[1:]), max_steps]
    for segment, end in zip(plan.segments, ends, strict=True):
        first, last = segment.from_step, min(end, max_steps) - 1
        if last < first:
            break
        weights = [source.weights for source in segment.sources]
        names = [source.name for source in segment.sources]
        points = {step for line in weights for step, _ in line if step > first}
        until = min(last, max(points, default=first))
        spaced = {first + (until - first) * n // _ROWS_OF_A_RAMP for n in range(_ROWS_OF_A_RAMP)}
        for step in sorted({until, *spaced, *(point for point in points if point <= last)}):
            shares = shares_of_steps(weights, step, step + 1)[0].tolist()
            row = dict(zip(names, shares, strict=True))
            if not rows or rows[-1]["shares"] != row:
                rows.append({"step": step, "shares": row})
    return rows
