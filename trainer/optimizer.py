"""AdamW, fused or in 8 bits, and its state as named tensors."""

from collections.abc import Iterable, Mapping
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
        if self.clip_norm < 0.0:
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
    """Put back what `optimizer_state` gave. Raises IntegrityError for an unknown parameter.

    The items are set as they are: `load_state_dict` would cast some of them.
    """
    optimizer.state.clear()
    for key, value in [*tensors.items(), *numbers.items()]:
        name, _, item = key.rpartition(".")
        if name not in parameters:
            raise IntegrityError(f"the optimizer state is of {name!r}, which the model lacks")
        parameter = parameters[name]
        if isinstance(value, Tensor):
            on_cpu = item == "step" and not _steps_on_device(optimizer)
            value = value.clone() if on_cpu else value.to(parameter.device, copy=True)
        optimizer.state[parameter][item] = value
    require_complete_state(optimizer, parameters.values())


def require_complete_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Raise IntegrityError unless all parameters have state, or none (before the first step)."""
    have = [bool(optimizer.state.get(p)) for p in parameters]
    if any(have) and not all(have):
        raise IntegrityError(f"{have.count(False)} parameters have no optimizer state")


def _steps_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Fused AdamW keeps its step counters beside the parameters."""
    return any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
