"""Our weights under the names and in the shapes that transformers' GPT-2 reads, by a table.

transformers keeps GPT-2's projections as `Conv1D`, (in, out), where ours are `Linear`, (out, in)
(transformers, `pytorch_utils.Conv1D`). It always has biases, and knows no padded vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from storage.errors import ConfigurationError

EMBEDDING = "transformer.wte.weight"
LAYER = "transformer.h.{layer}."


class Row(NamedTuple):
    """One tensor, of each layer where the names say so."""

    ours: str
    gpt2: str
    transposed: bool = False


TABLE = (
    Row(EMBEDDING, "transformer.wte.weight"),
    Row("transformer.wpe.weight", "transformer.wpe.weight"),
    Row(LAYER + "ln_1.weight", LAYER + "ln_1.weight"),
    Row(LAYER + "ln_1.bias", LAYER + "ln_1.bias"),
    Row(LAYER + "attn.c_attn.weight", LAYER + "attn.c_attn.weight", True),
    Row(LAYER + "attn.c_attn.bias", LAYER + "attn.c_attn.bias"),
    Row(LAYER + "attn.c_proj.weight", LAYER + "attn.c_proj.weight", True),
    Row(LAYER + "attn.c_proj.bias", LAYER + "attn.c_proj.bias"),
    Row(LAYER + "ln_2.weight", LAYER + "ln_2.weight"),
    Row(LAYER + "ln_2.bias", LAYER + "ln_2.bias"),
    Row(LAYER + "mlp.c_fc.weight", LAYER + "mlp.c_fc.weight", True),
    Row(LAYER + "mlp.c_fc.bias", LAYER + "mlp.c_fc.bias"),
    Row(LAYER + "mlp.c_proj.weight", LAYER + "mlp.c_proj.weight", True),
    Row(LAYER + "mlp.c_proj.bias", LAYER + "mlp.c_proj.bias"),
    Row("transformer.ln_f.weight", "transformer.ln_f.weight"),
    Row("transformer.ln_f.bias", "transformer.ln_f.bias"),
)
"""Every tensor of a GPT-2. The head is the token embedding (tied), so it has no row."""


def gpt2_tensors(
    weights: Mapping[str, Tensor],
    *,
    n_layer: int,
    bias: bool,
    vocab_size: int,
    table: Sequence[Row] = TABLE,
) -> dict[str, Tensor]:
    """GPT-2's tensors, contiguous and each with memory of its own.

    Without `bias` they get zeros for biases. Raises ConfigurationError for weights that are not
    exactly those of such a model.
    """
    found: dict[str, Tensor] = {}
    taken: set[str] = set()
    for row in table:
        for layer in range(n_layer if "{layer}" in row.ours else 1):
            ours = row.ours.format(layer=layer)
            if ours.endswith(".bias") and not bias:
                outputs = _weight(weights, ours.removesuffix("bias") + "weight").shape[0]
                tensor = torch.zeros(outputs, dtype=torch.float32)
            else:
                tensor = _weight(weights, ours)
                taken.add(ours)
            if ours == EMBEDDING:
                tensor = _without_padding(tensor, vocab_size)
            tensor = tensor.T if row.transposed else tensor
            found[row.gpt2.format(layer=layer)] = tensor.clone(
                memory_format=torch.contiguous_format
            )
    if unexpected := sorted(weights.keys() - taken):
        raise ConfigurationError(
            f"GPT-2 has no place for {', '.join(unexpected[:5])}; export with --format safetensors"
        )
    return found


def gpt2_config(model: Mapping[str, Any], *, vocab_size: int, end: int | None) -> dict[str, Any]:
    """The config.json of transformers' GPT2LMHeadModel; `end` closes and opens a text, if known."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_layer": model["n_layer"],
        "n_head": model["n_head"],
        "n_embd": model["n_embd"],
        "n_positions": model["context"],
        "n_inner": None,
        "vocab_size": vocab_size,
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": model["dropout"],
        "attn_pdrop": model["dropout"],
        "resid_pdrop": model["dropout"],
        "bos_token_id": end,
        "eos_token_id": end,
    }


def _weight(weights: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        raise ConfigurationError(
            f"a GPT-2 has {name}, and this checkpoint does not; export with --format safetensors"
        )
    return weights[name]


def _without_padding(embedding: Tensor, vocab_size: int) -> Tensor:
    if not 0 < vocab_size <= len(embedding):
        raise ConfigurationError(
            f"the vocabulary has {vocab_size} tokens, and {EMBEDDING} has {len(embedding)} rows: "
            "expected at least as many"
        )
    return embedding[:vocab_size]
