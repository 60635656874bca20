"""Our model and transformers' GPT-2 with the same weights, for tests of one against the other."""

import dataclasses

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from checkpointing.gpt2_layout import TABLE, Row, gpt2_config, gpt2_tensors
from trainer.model import GPT, ModelConfig

TOLERANCE = {"rtol": 0.0, "atol": 2e-5}
"""Logits of order 1 in float32, the same sums in another order (Conv1D's addmm, another attention
kernel). Measured on a CPU: at most 1.5e-6; with a wrong table entry 0.7 and more."""


def random_model(*, bias: bool) -> GPT:
    """Every parameter is random, so that none can be left out or exchanged unseen."""
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, context=24, bias=bias), 70)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def as_gpt2(model: GPT, table: tuple[Row, ...] = TABLE) -> GPT2LMHeadModel:
    """transformers' model with our weights through a table, without files."""
    fields = dataclasses.asdict(model.config)
    other = GPT2LMHeadModel(GPT2Config(**gpt2_config(fields, vocab_size=70, end=None)))
    tensors = gpt2_tensors(
        model.state_dict(), n_layer=2, bias=model.config.bias, vocab_size=70, table=table
    )
    other.load_state_dict({**tensors, "lm_head.weight": tensors["transformer.wte.weight"]})
    return other.eval()


def logits_of_both(model: GPT, other: GPT2LMHeadModel) -> tuple[Tensor, Tensor]:
    """(3, T, vocabulary) float32 of each, of the same random tokens."""
    tokens = torch.randint(model.vocab_size, (3, model.config.context))
    with torch.no_grad():
        return model(tokens)[..., : model.vocab_size], other(tokens).logits
