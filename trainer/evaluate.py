"""Held-out loss: the same windows for ever, summed in one order, however the work is divided."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.model import GPT, token_losses
from trainer.numerics import Precision, autocast


@torch.no_grad()
def evaluate(
    model: GPT,
    forward: Callable[[Tensor], Tensor],
    windows: Tensor,
    sources: Sequence[str],
    *,
    micro_batch_size: int,
    precision: Precision,
    device: torch.device,
    rank: int,
    world_size: int,
    gather: Callable[[Any], list[Any]],
    announce: Callable[[str], None] = lambda phase: None,
) -> dict[str, float]:
    """Loss in nats a token and perplexity, over all windows and by source.

    `windows` is (W, T + 1) int64, `sources` names the source of each. Micro-batch j is the work of
    process j mod world_size. Losses of sequences are summed in float64 in the windows' order.
    """
    announce("evaluate")
    model.eval()
    own: dict[str, list[float]] = {}
    starts = range(0, len(windows), micro_batch_size)
    for j, start in enumerate(starts):
        if j % world_size != rank:
            continue
        part = windows[start : start + micro_batch_size].to(device)
        with autocast(precision, device):
            logits = forward(part[:, :-1])
        own[str(j)] = token_losses(logits, part[:, 1:]).double().mean(dim=1).tolist()
    found = {j: losses for one in gather(own) for j, losses in one.items()}
    losses = [loss for j in range(len(starts)) for loss in found[str(j)]]
    result = {"validation_loss": math.fsum(losses) / len(losses)}
    result["validation_perplexity"] = perplexity(result["validation_loss"])
    for source in sorted(set(sources)):
        of_source = [loss for loss, name in zip(losses, sources, strict=True) if name == source]
        result[f"validation_loss/{source}"] = math.fsum(of_source) / len(of_source)
    return result


def perplexity(loss: float) -> float:
    """exp(loss), or infinity where that is too large to say."""
    return math.exp(loss) if loss < 700.0 else math.inf
