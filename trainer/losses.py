"""What a model's prediction of tokens costs: which tokens count, and how losses are averaged.

Sequences say the sum over their learnt tokens and how many these are, so that any average over
sequences is that of the tokens, summed in float64 in the order of the sequences.
"""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""The target of a position that the model is not trained to predict; PyTorch's own default."""


def targets_of(rows: Tensor, learn: Tensor | None) -> Tensor:
    """The token after each position, IGNORED where `learn` is False: (n, T + 1) -> (n, T)."""
    targets = rows[:, 1:]
    return targets if learn is None else targets.masked_fill(~learn, IGNORED)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each token, in float32: (B, T, V), (B, T) -> (B, T).

    It is 0, without a gradient, where the target is IGNORED.
    """
    flat = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
    )
    return flat.view_as(targets)


def sequence_losses(losses: Tensor) -> Tensor:
    """The sum of each sequence's losses, in float64: (B, T) -> (B,)."""
    return losses.detach().double().sum(dim=1)


def learnt_tokens(targets: Tensor) -> Tensor:
    """How many targets of each sequence count: (B, T) -> (B,) int64."""
    return (targets != IGNORED).sum(dim=1)


def mean_loss(losses: Sequence[float], learnt: Sequence[int]) -> float:
    """Nats a learnt token, from the sums of sequences; 0 where nothing is learnt."""
    tokens = sum(learnt)
    return math.fsum(losses) / tokens if tokens else 0.0


def by_source(
    losses: Sequence[float], learnt: Sequence[int], sources: Sequence[str]
) -> dict[str, tuple[float, int]]:
    """(mean loss, learnt tokens) of each source, sorted by name; `sources` names the sequences'."""
    found = {}
    for name in sorted(set(sources)):
        own = [place for place, source in enumerate(sources) if source == name]
        counts = [learnt[place] for place in own]
        found[name] = mean_loss([losses[place] for place in own], counts), sum(counts)
    return found
