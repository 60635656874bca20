"""AdamW against its formula, and its state, which goes out and comes back bit for bit."""

import math
import re
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from storage.errors import ConfigurationError, IntegrityError
from trainer.losses import token_losses
from trainer.model import GPT, ModelConfig, initial_model
from trainer.optimizer import (
    OptimizerConfig,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    set_learning_rate,
)

CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=64, context=16)
"""Wide enough that its matrices pass the 4,096 elements from which bitsandbytes uses 8 bits."""
OPTIMIZERS = [OptimizerConfig(), OptimizerConfig(optimizer="adamw8bit")]
EACH_OPTIMIZER = pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda c: c.optimizer)

State = tuple[dict[str, Tensor], dict[str, int | float]]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As a run has it; conftest.py puts the number back."""
    torch.set_num_threads(1)


def model() -> GPT:
    return initial_model(CONFIG, 65, seed=4)


def train(gpt: GPT, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(65, (2, 17), generator=generator)
        set_learning_rate(optimizer, 1e-2 / (step + 1))
        optimizer.zero_grad()
        token_losses(gpt(tokens[:, :-1]), tokens[:, 1:]).mean().backward()
        optimizer.step()


def state_of(gpt: GPT, optimizer: torch.optim.Optimizer) -> State:
    return optimizer_state(optimizer, {p: name for name, p in gpt.named_parameters()})


def through_bytes(state: State) -> State:
    """As a file gives it back; 8-bit states share their tables, which safetensors refuses."""
    tensors, numbers = state
    data = safetensors.torch.save({name: tensor.clone() for name, tensor in tensors.items()})
    return safetensors.torch.load(data), dict(numbers)


def load(gpt: GPT, optimizer: torch.optim.Optimizer, state: State) -> None:
    load_optimizer_state(optimizer, dict(gpt.named_parameters()), *state)


def test_only_matrices_decay() -> None:
    gpt = model()
    optimizer = make_optimizer(gpt, OptimizerConfig(weight_decay=0.25))
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)
    assert decay == {p: 0.25 if p.dim() >= 2 else 0.0 for p in gpt.parameters()}


@EACH_OPTIMIZER
def test_without_gradient_matrices_shrink_by_the_decay_and_vectors_stay(
    config: OptimizerConfig,
) -> None:
    gpt = model()
    before = [p.detach().clone() for p in gpt.parameters()]
    optimizer = make_optimizer(gpt, config)
    set_learning_rate(optimizer, 0.5)
    for parameter in gpt.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, old in zip(gpt.parameters(), before, strict=True):
        factor = 1.0 - 0.5 * config.weight_decay if parameter.dim() >= 2 else 1.0
        # One multiplication in float32, whose factor may be rounded first.
        torch.testing.assert_close(parameter.detach(), old * factor, rtol=2e-7, atol=0.0)


def test_frozen_parameters_are_left_out() -> None:
    gpt = model()
    gpt.transformer.wpe.weight.requires_grad_(False)
    groups = make_optimizer(gpt, OptimizerConfig()).param_groups
    assert gpt.transformer.wpe.weight not in {p for group in groups for p in group["params"]}


def test_every_group_gets_the_learning_rate() -> None:
    optimizer = make_optimizer(model(), OptimizerConfig())
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_adamw_follows_its_formula() -> None:
    """Loshchilov & Hutter 2019, algorithm 2, in float64."""
    config = OptimizerConfig()
    layer = nn.Linear(5, 3, bias=False)
    optimizer = make_optimizer(layer, config)
    weight = layer.weight.detach().double()
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    generator = torch.Generator().manual_seed(0)
    for t in range(1, 8):
        rate = 0.1 / t
        gradient = torch.randn(3, 5, generator=generator)
        set_learning_rate(optimizer, rate)
        layer.weight.grad = gradient.clone()
        optimizer.step()
        m = config.beta1 * m + (1 - config.beta1) * gradient
        v = config.beta2 * v + (1 - config.beta2) * gradient**2
        corrected = (v / (1 - config.beta2**t)).sqrt() + config.epsilon
        weight = weight * (1 - rate * config.weight_decay)
        weight = weight - rate * m / (1 - config.beta1**t) / corrected
    # float32 beside float64 over seven updates of order 0.1.
    torch.testing.assert_close(layer.weight.detach().double(), weight, rtol=1e-5, atol=1e-6)


@EACH_OPTIMIZER
def test_after_loading_training_goes_on_with_the_same_bits(config: OptimizerConfig) -> None:
    unbroken = model()
    optimizer = make_optimizer(unbroken, config)
    train(unbroken, optimizer, range(4))
    weights = {name: t.clone() for name, t in unbroken.state_dict().items()}
    state = through_bytes(state_of(unbroken, optimizer))
    train(unbroken, optimizer, range(4, 8))

    resumed = model()
    resumed.load_state_dict(weights)
    other = make_optimizer(resumed, config)
    load(resumed, other, state)
    train(resumed, other, range(4, 8))

    for one, two in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    tensors, numbers = state_of(unbroken, optimizer)
    same_tensors, same_numbers = state_of(resumed, other)
    assert numbers == same_numbers
    assert tensors.keys() == same_tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == same_tensors[name].dtype
        assert torch.equal(tensor, same_tensors[name]), name


@EACH_OPTIMIZER
def test_without_the_state_training_goes_on_with_other_bits(config: OptimizerConfig) -> None:
    unbroken = model()
    optimizer = make_optimizer(unbroken, config)
    train(unbroken, optimizer, range(2))
    weights = {name: t.clone() for name, t in unbroken.state_dict().items()}
    train(unbroken, optimizer, range(2, 4))
    resumed = model()
    resumed.load_state_dict(weights)
    train(resumed, make_optimizer(resumed, config), range(2, 4))
    one, two = unbroken.transformer.wte.weight, resumed.transformer.wte.weight
    assert not torch.equal(one, two)


def test_the_8_bit_optimizer_keeps_moments_of_matrices_in_8_bits() -> None:
    gpt = model()
    optimizer = make_optimizer(gpt, OPTIMIZERS[1])
    train(gpt, optimizer, range(1))
    tensors, _ = state_of(gpt, optimizer)
    matrix = "transformer.h.0.attn.c_attn.weight"
    assert tensors[f"{matrix}.state1"].dtype == torch.uint8
    assert tensors[f"{matrix}.state2"].dtype == torch.uint8
    assert tensors["transformer.ln_f.weight.state1"].dtype == torch.float32


@EACH_OPTIMIZER
def test_loading_replaces_what_was_there_with_copies(config: OptimizerConfig) -> None:
    gpt = model()
    optimizer = make_optimizer(gpt, config)
    train(gpt, optimizer, range(1))
    state = through_bytes(state_of(gpt, optimizer))
    train(gpt, optimizer, range(1, 3))
    load(gpt, optimizer, state)
    kept = {name: tensor.clone() for name, tensor in state[0].items()}
    train(gpt, optimizer, range(1, 3))
    assert all(torch.equal(state[0][name], tensor) for name, tensor in kept.items())


@EACH_OPTIMIZER
def test_before_the_first_step_there_is_no_state_and_none_is_needed(
    config: OptimizerConfig,
) -> None:
    gpt = model()
    optimizer = make_optimizer(gpt, config)
    assert state_of(gpt, optimizer) == ({}, {})
    train(gpt, optimizer, range(1))
    load(gpt, optimizer, ({}, {}))
    assert state_of(gpt, optimizer) == ({}, {})


@EACH_OPTIMIZER
def test_a_parameter_without_state_is_refused(config: OptimizerConfig) -> None:
    gpt = model()
    optimizer = make_optimizer(gpt, config)
    train(gpt, optimizer, range(1))
    tensors, numbers = state_of(gpt, optimizer)
    left_out = "transformer.ln_f.bias."
    rest = (
        {name: t for name, t in tensors.items() if not name.startswith(left_out)},
        {name: n for name, n in numbers.items() if not name.startswith(left_out)},
    )
    with pytest.raises(IntegrityError, match=r"not have the same state: transformer\.ln_f\.bias\."):
        load(gpt, optimizer, rest)


def test_state_of_an_unknown_parameter_is_refused() -> None:
    gpt = model()
    optimizer = make_optimizer(gpt, OptimizerConfig())
    train(gpt, optimizer, range(1))
    tensors, numbers = state_of(gpt, optimizer)
    tensors["transformer.other.exp_avg"] = torch.zeros(1)
    message = "not have the same state: transformer.other.exp_avg"
    with pytest.raises(IntegrityError, match=message):
        load(gpt, optimizer, (tensors, numbers))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta1": 1.0}, "beta1 and beta2 must be in [0, 1); got 1.0, 0.95"),
        ({"beta2": -0.5}, "beta1 and beta2 must be in [0, 1); got 0.9, -0.5"),
        ({"beta2": math.nan}, "beta1 and beta2 must be in [0, 1); got 0.9, nan"),
        ({"clip_norm": -1.0}, "clip_norm must be positive, or 0 for no clipping; got -1.0"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        OptimizerConfig(**changes)
