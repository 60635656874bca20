"""The model is GPT-2: its sizes, its initialisation, and that it sees nothing of the future."""

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from launch.presets import PRESETS
from storage.errors import ConfigurationError
from trainer.losses import token_losses
from trainer.model import (
    GPT,
    AttentionBackend,
    ModelConfig,
    initial_model,
    padded_vocabulary,
    parameter_count,
)

SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=32, context=16)
VOCABULARY = 65


def tokens_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def elements(config: ModelConfig, vocab_size: int) -> int:
    """Parameters of the real module, counted without memory for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config, vocab_size).parameters())


@pytest.mark.parametrize(
    ("preset", "parameters"), [("gpt2-124m", 124_439_808), ("gpt2-345m", 354_823_168)]
)
def test_gpt2_presets_have_the_published_number_of_parameters(preset: str, parameters: int) -> None:
    # 124,439,808 and 354,823,168: transformers' GPT2LMHeadModel of `gpt2` and `gpt2-medium`.
    assert parameter_count(ModelConfig(**PRESETS[preset]["model"]), 50_257) == parameters


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("vocab_size", [257, 50_257])
@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_count_is_the_module_without_padding(
    preset: str, vocab_size: int, bias: bool
) -> None:
    config = ModelConfig(**{**PRESETS[preset].get("model", {}), "bias": bias})
    padding = (padded_vocabulary(vocab_size) - vocab_size) * config.n_embd
    assert elements(config, vocab_size) == parameter_count(config, vocab_size) + padding


@settings(max_examples=30, deadline=None)
@given(
    n_layer=st.integers(1, 3),
    n_head=st.integers(1, 4),
    head_width=st.integers(1, 5),
    context=st.integers(1, 20),
    vocab_size=st.integers(1, 200),
    bias=st.booleans(),
)
def test_parameter_count_holds_for_any_sizes(
    n_layer: int, n_head: int, head_width: int, context: int, vocab_size: int, bias: bool
) -> None:
    width = n_head * head_width
    config = ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=width, context=context, bias=bias)
    padding = (padded_vocabulary(vocab_size) - vocab_size) * width
    assert elements(config, vocab_size) == parameter_count(config, vocab_size) + padding


@settings(deadline=None)
@given(vocab_size=st.integers(1, 10**6))
def test_vocabulary_is_padded_to_the_next_multiple_of_64(vocab_size: int) -> None:
    padded = padded_vocabulary(vocab_size)
    assert padded % 64 == 0
    assert vocab_size <= padded < vocab_size + 64


@pytest.mark.parametrize("attention", ["auto", "math"])
def test_later_tokens_do_not_change_earlier_logits(attention: AttentionBackend) -> None:
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, context=16, attention=attention)
    model = initial_model(config, VOCABULARY, seed=1).eval()
    tokens = tokens_of(2, 16)
    logits = model(tokens)
    for t in range(1, 16):
        other = torch.cat([tokens[:, :t], (tokens[:, t:] + 1) % VOCABULARY], dim=1)
        changed = model(other)
        assert torch.equal(changed[:, :t], logits[:, :t])
        assert not torch.equal(changed[:, t], logits[:, t])


@pytest.mark.parametrize("attention", ["math", "flash"])
def test_every_attention_backend_computes_the_same(attention: AttentionBackend) -> None:
    """Logits and gradients of each backend that a CPU has, against the one that torch chooses."""
    tokens = tokens_of(3, 17)
    found = []
    for backend in ("auto", attention):
        config = ModelConfig(n_layer=2, n_head=2, n_embd=32, context=16, attention=backend)
        model = initial_model(config, VOCABULARY, seed=1)
        logits = model(tokens[:, :-1])
        token_losses(logits, tokens[:, 1:]).mean().backward()
        found.append([logits.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        # The same float32 sums of at most 128 terms of order 1 in another order.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_initial_loss_is_that_of_a_uniform_guess() -> None:
    model = initial_model(ModelConfig(), 257, seed=0)
    tokens = torch.randint(257, (8, 129), generator=torch.Generator().manual_seed(0))
    loss = token_losses(model(tokens[:, :-1]), tokens[:, 1:]).mean().item()
    # Logits have a variance of about n_embd * 0.02**2 = 0.05, which adds half of it to ln(V); the
    # guess is over the padded vocabulary.
    assert loss == pytest.approx(math.log(padded_vocabulary(257)), abs=0.1)


@pytest.mark.parametrize("n_layer", [2, 6])
def test_initial_weights_are_those_of_gpt2(n_layer: int) -> None:
    """Radford et al. 2019: normal with 0.02, residual projections less by 1/sqrt(2 n_layer)."""
    model = initial_model(ModelConfig(n_layer=n_layer, n_embd=64, context=64), 257, seed=3)
    for name, parameter in model.state_dict().items():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "ln_" in name:
            assert (parameter == 1.0).all(), name
        else:
            residual = name.endswith("c_proj.weight")
            expected = 0.02 / math.sqrt(2 * n_layer) if residual else 0.02
            # Five standard errors of a standard deviation from n samples, and of a mean.
            error = 5 / math.sqrt(2 * parameter.numel())
            assert float(parameter.std()) == pytest.approx(expected, rel=error), name
            assert abs(float(parameter.mean())) < expected * error * math.sqrt(2), name


def test_the_same_seed_gives_the_same_bits_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = initial_model(SMALL, VOCABULARY, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    second = initial_model(SMALL, VOCABULARY, seed=5).state_dict()
    other = initial_model(SMALL, VOCABULARY, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


def test_dropout_acts_in_training_and_not_in_evaluation() -> None:
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, context=16, dropout=0.5)
    with_dropout = initial_model(config, VOCABULARY, seed=5)
    without = initial_model(SMALL, VOCABULARY, seed=5)
    tokens = tokens_of(2, 16)
    assert torch.equal(with_dropout.eval()(tokens), without.train()(tokens))
    assert not torch.equal(with_dropout.train()(tokens), with_dropout(tokens))


def test_the_head_is_the_embedding() -> None:
    """Tied weights: logits of a token move with the row of its embedding, and no other's do."""
    model = initial_model(SMALL, VOCABULARY, seed=5)
    assert not [name for name, _ in model.named_parameters() if "head" in name]
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    before = model(tokens)
    with torch.no_grad():
        model.transformer.wte.weight[7] *= 2.0
    after = model(tokens)
    others = torch.arange(before.shape[-1]) != 7
    # Doubling is exact in floating point, so this holds to the bit.
    assert torch.equal(after[..., 7], 2.0 * before[..., 7])
    assert torch.equal(after[..., others], before[..., others])


def test_one_batch_is_learned_by_heart() -> None:
    torch.set_num_threads(1)  # small tensors: more threads only wait for each other
    model = initial_model(SMALL, VOCABULARY, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    tokens = tokens_of(4, 17)
    loss = math.inf
    for _ in range(200):
        value = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        loss = value.item()
        if loss < 0.01:
            break
    assert loss < 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 3, "n_embd": 128}, "multiple of model.n_head.*got n_embd 128, n_head 3"),
        ({"n_layer": 0}, "every size of a model must be at least 1; got .*n_layer=0"),
        ({"n_head": 0}, "every size of a model must be at least 1; got .*n_head=0"),
        ({"n_embd": -64}, "every size of a model must be at least 1; got .*n_embd=-64"),
        ({"context": 0}, "every size of a model must be at least 1; got .*context=0"),
        ({"dropout": 1.0}, re.escape("model.dropout must be in [0, 1); got 1.0")),
        ({"dropout": -0.1}, re.escape("model.dropout must be in [0, 1); got -0.1")),
        ({"dropout": math.nan}, re.escape("model.dropout must be in [0, 1); got nan")),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ModelConfig(**changes)
