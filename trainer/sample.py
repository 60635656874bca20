"""Text from the model: tokens drawn one at a time, by key, so that a replay draws the same."""

from collections.abc import Callable

import torch
from torch import Tensor

from storage.errors import StopRequestedError
from trainer.model import GPT
from trainer.numerics import Precision, autocast, key_seed


@torch.no_grad()
def sample(
    model: GPT,
    prompt: list[int],
    *,
    tokens: int,
    temperature: float,
    end_of_text: int,
    key: tuple[str | int, ...],
    precision: Precision,
    device: torch.device,
    stopping: Callable[[], bool] = lambda: False,
) -> list[int]:
    """At most `tokens` new token ids after the prompt; ends at end of text, which is left out.

    Temperature 0 takes the most likely token. Only the last `context` tokens are seen.
    `stopping` is asked before each token; raises StopRequestedError once it says yes.
    """
    model.eval()
    generator = torch.Generator().manual_seed(key_seed("sample", *key))
    ids = list(prompt) or [end_of_text]
    new: list[int] = []
    for _ in range(tokens):
        if stopping():
            raise StopRequestedError("asked to stop while a sample was drawn")
        seen = torch.tensor([ids[-model.config.context :]], device=device)
        with autocast(precision, device):
            logits = model(seen)[0, -1, : model.vocab_size].float().cpu()
        token = _draw(logits, temperature, generator)
        if token == end_of_text:
            break
        ids.append(token)
        new.append(token)
    return new


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0.0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / temperature, dim=0)
    return int(torch.multinomial(probabilities, 1, generator=generator))
