"""The learning rate as a pure function of the step."""

import math
from dataclasses import dataclass

from storage.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """How long the run is, and its learning rate: linear warm-up, then cosine decay."""

    max_steps: int = 2400
    learning_rate: float = 4e-3
    min_learning_rate: float = 0.0
    warmup_steps: int = 48

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ConfigurationError(f"max_steps must be at least 1; got {self.max_steps}")
        if not 0.0 <= self.min_learning_rate <= self.learning_rate < math.inf:
            raise ConfigurationError(
                "schedule.min_learning_rate must lie between 0 and learning_rate; got "
                f"{self.min_learning_rate} and {self.learning_rate}"
            )
        if self.warmup_steps < 0:
            raise ConfigurationError(f"warmup_steps cannot be negative; got {self.warmup_steps}")


def learning_rate(step: int, config: ScheduleConfig) -> float:
    """The rate of the step that follows `step` finished ones (linear, then cosine)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    span = max(1, config.max_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_learning_rate + cosine * (config.learning_rate - config.min_learning_rate)
