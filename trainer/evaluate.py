"""Held-out loss: the same windows for ever, summed in one order, however the work is divided."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from data_service.batches import Batches
from storage.errors import DataError
from trainer.losses import (
    by_source,
    learnt_tokens,
    mean_loss,
    sequence_losses,
    targets_of,
    token_losses,
)
from trainer.model import GPT
from trainer.numerics import Precision, autocast

_GIVEN_UP = "given up"


@torch.no_grad()
def evaluate(
    model: GPT,
    forward: Callable[[Tensor], Tensor],
    windows: Tensor,
    sources: Sequence[str],
    learn: Tensor | None = None,
    *,
    micro_batch_size: int,
    precision: Precision,
    device: torch.device,
    rank: int,
    world_size: int,
    gather: Callable[[Any], list[Any]],
    announce: Callable[[str], None] = lambda phase: None,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Loss in nats a token and perplexity, over all windows and by source.

    `windows` is (W, T + 1) int64, `sources` names the source of each, `learn` is (W, T) bool: the
    targets that count, at least one of each source; None means all. Micro-batch j is the work of
    process j mod world_size. Losses of windows are summed in float64 in their order.

    `stopping` is asked before each micro-batch; None on every process when it said yes on one.
    """
    announce("evaluate")
    model.eval()
    own: dict[str, list[float]] = {}
    targets = targets_of(windows, learn)
    starts = range(0, len(windows), micro_batch_size)
    for j, start in enumerate(starts):
        if j % world_size != rank:
            continue
        if stopping():
            own = {_GIVEN_UP: []}
            break
        part = slice(start, start + micro_batch_size)
        with autocast(precision, device):
            logits = forward(windows[part, :-1].to(device))
        own[str(j)] = sequence_losses(token_losses(logits, targets[part].to(device))).tolist()
    found = {j: losses for one in gather(own) for j, losses in one.items()}
    if _GIVEN_UP in found:
        return None
    losses = [loss for j in range(len(starts)) for loss in found[str(j)]]
    learnt = learnt_tokens(targets).tolist()
    result = {"validation_loss": mean_loss(losses, learnt)}
    result["validation_perplexity"] = perplexity(result["validation_loss"])
    for source, (loss, _) in by_source(losses, learnt, sources).items():
        result[f"validation_loss/{source}"] = loss
    return result


def held_out(
    batches: Batches, windows: int, names: Sequence[str]
) -> tuple[Tensor, list[str], Tensor | None]:
    """The validation windows of these sources, (W, T + 1) int64, the source of each, and which of
    their targets count, (W, T) bool or None for all. DataError where none of a source does.
    """
    rows = batches.validation_rows(windows)
    tokens = torch.cat([torch.from_numpy(rows[name]) for name in names])
    sources = [name for name in names for _ in range(len(rows[name]))]
    masks = batches.validation_learn(windows)
    if masks is None:
        return tokens, sources, None
    for name in names:
        if not masks[name].any():
            raise DataError(
                f"the {len(masks[name])} validation windows of source {name!r} hold no token that "
                "is learnt, so that its loss cannot be told; prepare it again with a larger "
                "--validation_permille, or use more --eval_windows"
            )
    return tokens, sources, torch.cat([torch.from_numpy(masks[name]) for name in names])


def perplexity(loss: float) -> float:
    """exp(loss), or infinity where that is too large to say."""
    return math.exp(loss) if loss < 700.0 else math.inf
