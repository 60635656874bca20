"""GPT-2 as a PyTorch module, with GPT-2's own names.

Pre-norm, tied embeddings, learned positions, GELU (tanh form), GPT-2's initialisation (Radford et
al. 2019, section 2.3: residual projections scaled by 1/sqrt(2 n_layer)).

Shapes: B sequences, T positions, C = n_embd channels, H heads, D = C / H, V the padded vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from storage.errors import ConfigurationError

VOCABULARY_MULTIPLE = 64
"""The vocabulary is padded to a multiple of this, because tensor cores like it."""

AttentionBackend = Literal["auto", "math", "flash", "efficient"]

_BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes of a GPT. `context` is the most positions it sees."""

    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 128
    context: int = 128
    dropout: float = 0.0
    bias: bool = True
    attention: AttentionBackend = "auto"

    def __post_init__(self) -> None:
        if min(self.n_layer, self.n_head, self.n_embd, self.context) < 1:
            raise ConfigurationError(f"every size of a model must be at least 1; got {self}")
        if self.n_embd % self.n_head:
            raise ConfigurationError(
                f"model.n_embd must be a multiple of model.n_head, because each head takes an "
                f"equal share of the width; got n_embd {self.n_embd}, n_head {self.n_head}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigurationError(f"model.dropout must be in [0, 1); got {self.dropout}")


def padded_vocabulary(vocab_size: int) -> int:
    """The least multiple of 64 that is at least `vocab_size`."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def parameter_count(config: ModelConfig, vocab_size: int) -> int:
    """Parameters without padding of the vocabulary: 124,439,808 for GPT-2 124M with 50,257."""
    width, per_bias = config.n_embd, int(config.bias)
    attention = 4 * width * width + per_bias * 4 * width
    feed_forward = 8 * width * width + per_bias * 5 * width
    norm = width * (1 + per_bias)
    embeddings = (vocab_size + config.context) * width
    return embeddings + config.n_layer * (attention + feed_forward + 2 * norm) + norm


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        B, T, C = x.shape
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """The feed-forward half of a block, four times as wide inside."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        y = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    """Attention, then feed-forward, each on a normalised copy, added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        x = x + self.attn(self.ln_1(x))
        stream: Tensor = x + self.mlp(self.ln_2(x))
        return stream


class Transformer(nn.Module):
    """Embeddings, blocks and the last normalisation: everything but the head."""

    def __init__(self, config: ModelConfig, padded: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(padded, config.n_embd)
        self.wpe = nn.Embedding(config.context, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, C); T is at most the context."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        x = F.dropout(x, self.dropout, self.training)
        for block in self.h:
            x = block(x)
        normalised: Tensor = self.ln_f(x)
        return normalised


class GPT(nn.Module):
    """A GPT-2 language model over a vocabulary of `vocab_size` tokens.

    Initialised from the global CPU generator: seed it first (`initial_model`).
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.transformer = Transformer(config, padded_vocabulary(vocab_size))
        for name, parameter in self.named_parameters():
            _initialise(name, parameter, config.n_layer)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits over the padded vocabulary: (B, T) int64 -> (B, T, V)."""
        weight = self.transformer.wte.weight
        if self.config.attention == "auto":
            return F.linear(self.transformer(tokens), weight)
        with sdpa_kernel(_BACKENDS[self.config.attention]):
            return F.linear(self.transformer(tokens), weight)


def initial_model(config: ModelConfig, vocab_size: int, seed: int) -> GPT:
    """The model a run begins with: the same bits for the same arguments, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT(config, vocab_size)


def _initialise(name: str, parameter: Tensor, n_layer: int) -> None:
    if name.endswith("bias"):
        nn.init.zeros_(parameter)
    elif parameter.dim() == 1:
        nn.init.ones_(parameter)
    else:
        residual = name.endswith("c_proj.weight")
        nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer) if residual else 0.02)
