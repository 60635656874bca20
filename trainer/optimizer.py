"""AdamW, fused or in 8 bits, and its state as named tensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from storage.errors import ConfigurationError, IntegrityError


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019); `adamw8bit` keeps its moments in 8 bits (bitsandbytes)."""

    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if not (0.0 <= self.beta1 < 1.0 and 0.0 <= self.beta2 < 1.0):
            raise ConfigurationError(
                f"optimizer.beta1 and beta2 must be in [0, 1); got {self.beta1}, {self.beta2}"
            )
        if not 0.0 <= self.weight_decay < math.inf or not 0.0 < self.epsilon < math.inf:
            raise ConfigurationError(
                "optimizer.weight_decay must be at least 0 and optimizer.epsilon above 0; got "
                f"{self.weight_decay} and {self.epsilon}"
            )
        if not self.clip_norm >= 0.0:
            raise ConfigurationError(
                f"optimizer.clip_norm must be positive, or 0 for no clipping; got {self.clip_norm}"
            )


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer; only tensors of two or more dimensions decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw8bit":
        import bitsandbytes  # slow to import, and needed by few

        adamw8bit: Any = bitsandbytes.optim.AdamW8bit  # type: ignore[attr-defined]
        optimizer: torch.optim.Optimizer = adamw8bit(
            groups, lr=0.0, betas=betas, eps=config.epsilon
        )
        return optimizer
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.epsilon, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> tuple[dict[str, Tensor], dict[str, int | float]]:
    """Tensors and plain numbers of the state, named `<parameter>.<item>`."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, int | float] = {}
    for parameter, items in optimizer.state.items():
        for item, value in items.items():
            target: dict[str, Any] = tensors if isinstance(value, Tensor) else numbers
            target[f"{names[parameter]}.{item}"] = value
    return tensors, numbers


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, int | float],
) -> None:
    """Put back what `optimizer_state` gave: the items that a first step makes, and no others.

    Nothing at all is the state before the first step. Raises IntegrityError for an item that is
    missing, unexpected, or of another shape or dtype. The items are set as they are:
    `load_state_dict` would cast some of them.
    """
    if not tensors and not numbers:
        optimizer.state.clear()
        return
    given: dict[str, Tensor | int | float] = {**tensors, **numbers}
    expected = _first_state(optimizer, parameters)
    if given.keys() != expected.keys():
        names = ", ".join(sorted(given.keys() ^ expected.keys())[:5])
        raise IntegrityError(f"checkpoint and optimizer do not have the same state: {names}")
    for key, fresh in expected.items():
        name, _, item = key.rpartition(".")
        value = given[key]
        if _kind(value) != _kind(fresh):
            raise IntegrityError(f"{key} is {_kind(value)} in the checkpoint, not {_kind(fresh)}")
        if isinstance(value, Tensor) and isinstance(fresh, Tensor):
            value = value.to(fresh.device, copy=True)
        optimizer.state[parameters[name]][item] = value


def _first_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor | int | float]:
    """The items of a state before the first step, by name; the optimizer then has them."""
    optimizer.state.clear()
    names = {parameter: name for name, parameter in parameters.items()}
    for group_number, group in enumerate(optimizer.param_groups):
        for number, parameter in enumerate(group["params"]):
            if isinstance(optimizer, torch.optim.AdamW):
                state = optimizer.state[parameter]
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            else:
                optimizer.init_state(group, parameter, group_number, number)  # type: ignore[attr-defined]
    tensors, numbers = optimizer_state(optimizer, names)
    return {**tensors, **numbers}


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
