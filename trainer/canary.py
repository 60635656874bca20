"""A window of random tokens that nobody can predict: who predicts it sees what is to be predicted.

The n tokens x_t of the window are uniform over the V ids and used for nothing else. Let p_t be what
the model says of token t, and q_t = (p_t + 1/V) / 2. If p_t depends on earlier tokens alone, then
E[V q_t(x_t) | earlier tokens] = sum over x of q_t(x) <= 1; so the product of all V q_t(x_t) has an
expectation of at most 1, and by Markov's inequality exceeds e^c with a probability of at most e^-c,
for any model whatever. Its logarithm is the evidence of a leak, in nats.

The half of 1/V is there because a model that looks ahead may copy only tokens that it knows from
its training data; each other one, however improbable to it, then costs at most ln 2.

Covers: attention that is not causal, targets not shifted, the window in the training data.
Does not cover: windows of fewer than 30 / ln(V / 2) tokens; validation text in the training data.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from storage.canonical import canonical_json
from storage.errors import ConfigurationError
from trainer.losses import token_losses
from trainer.model import GPT
from trainer.numerics import Precision, autocast

MOST_NATS = 30.0
"""A model that sees nothing ahead is beyond this once in 10^13 windows."""


def canary_window(seed: int, context: int, vocab_size: int) -> Tensor:
    """(1, T + 1) int64, uniform over all ids of the vocabulary, fixed for ever by the seed."""
    key = canonical_json(["canary", seed])
    digest = hashlib.shake_256(key).digest(8 * (context + 1))
    ids = np.frombuffer(digest, dtype="<u8") % vocab_size  # the bias of 64 bits is below 10^-13
    return torch.from_numpy(ids.astype(np.int64))[None]


@torch.no_grad()
def check_canary(
    model: GPT,
    forward: Callable[[Tensor], Tensor],
    window: Tensor,
    *,
    precision: Precision,
    device: torch.device,
) -> dict[str, float]:
    """The window's loss and the evidence of a leak; ConfigurationError where there is one.

    Every process finds the same, so that all stop together.
    """
    model.eval()
    tokens = window.to(device)
    with autocast(precision, device):
        logits = forward(tokens[:, :-1])
    losses = token_losses(logits, tokens[:, 1:])[0].tolist()
    nats = leak_nats(losses, model.vocab_size)
    if nats > MOST_NATS:
        raise ConfigurationError(
            f"the model predicts random tokens that it is never trained on by {nats:.0f} nats "
            f"better than chance (at most {MOST_NATS:g} can be luck), so it sees the tokens that "
            "it must predict: its attention is not causal, targets are not shifted by one, or the "
            "canary window is in the training data. Nothing of this step is saved; correct it, and "
            "start anew with --run runs/other"
        )
    return {
        "validation_canary_loss": math.fsum(losses) / len(losses),
        "validation_canary_nats": nats,
    }


def leak_nats(losses: Sequence[float], vocab_size: int) -> float:
    """ln of the product of V q_t(x_t), where p_t(x_t) is exp(-loss)."""
    return math.fsum(math.log((1.0 + vocab_size * math.exp(-loss)) / 2.0) for loss in losses)
