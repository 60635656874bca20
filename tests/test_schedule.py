"""The learning rate at any step is the one of torch's schedulers, without their state."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from storage.errors import ConfigurationError
from trainer.schedule import ScheduleConfig, learning_rate

GPT2 = ScheduleConfig(max_steps=5100, learning_rate=6e-4, min_learning_rate=6e-5, warmup_steps=200)


@st.composite
def schedules(draw: st.DrawFn) -> ScheduleConfig:
    peak = draw(st.floats(1e-6, 1.0))
    return ScheduleConfig(
        max_steps=draw(st.integers(1, 300)),
        learning_rate=peak,
        min_learning_rate=peak * draw(st.floats(0.0, 1.0)),
        warmup_steps=draw(st.integers(0, 300)),
    )


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 3e-6),  # 6e-4 / 200: the first step already learns
        (99, 3e-4),
        (199, 6e-4),
        (200, 6e-4),
        (200 + 4900 // 4, 6e-5 + 5.4e-4 * 0.8535533905932737),  # (1 + cos(pi / 4)) / 2
        (200 + 4900 // 2, 3.3e-4),
        (200 + 4900 * 3 // 4, 6e-5 + 5.4e-4 * 0.14644660940672627),
        (5100, 6e-5),
        (5101, 6e-5),
        (10**9, 6e-5),
    ],
)
def test_rate_at_chosen_steps(step: int, rate: float) -> None:
    # Values worked out by hand; a few roundings of float64.
    assert learning_rate(step, GPT2) == pytest.approx(rate, rel=1e-12)


def test_rates_are_those_of_the_schedulers_of_torch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=GPT2.learning_rate)
    warmup = LinearLR(
        optimizer, start_factor=1 / GPT2.warmup_steps, total_iters=GPT2.warmup_steps - 1
    )
    cosine = CosineAnnealingLR(
        optimizer, GPT2.max_steps - GPT2.warmup_steps, eta_min=GPT2.min_learning_rate
    )
    reference = SequentialLR(optimizer, [warmup, cosine], milestones=[GPT2.warmup_steps])
    for step in range(GPT2.max_steps):
        # torch multiplies the rate of the step before, which adds up roundings of 5,100 steps.
        assert learning_rate(step, GPT2) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        reference.step()


@settings(deadline=None)
@given(config=schedules())
def test_rate_rises_then_falls_and_never_leaves_its_bounds(config: ScheduleConfig) -> None:
    rates = [learning_rate(step, config) for step in range(config.max_steps + 1)]
    top = min(config.warmup_steps, len(rates))
    assert all(a < b for a, b in itertools.pairwise(rates[:top]))
    assert all(a >= b for a, b in itertools.pairwise(rates[top:]))
    # The peak may round in its last bit: peak * n / n and min + (peak - min) are not always peak.
    assert max(rates) <= config.learning_rate * (1 + 1e-15)
    assert min(rates) > 0.0 or config.min_learning_rate == 0.0
    assert all(rate >= config.min_learning_rate for rate in rates[config.warmup_steps :])


@settings(deadline=None)
@given(config=schedules(), beyond=st.integers(0, 10**12))
def test_the_least_rate_is_kept_after_the_end(config: ScheduleConfig, beyond: int) -> None:
    end = max(config.max_steps, config.warmup_steps + 1)
    assert learning_rate(end + beyond, config) == config.min_learning_rate


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    config = ScheduleConfig(max_steps=10, learning_rate=0.5, warmup_steps=0)
    assert learning_rate(0, config) == 0.5


def test_a_run_shorter_than_its_warm_up_only_warms_up() -> None:
    config = ScheduleConfig(max_steps=4, learning_rate=1.0, warmup_steps=8)
    assert [learning_rate(step, config) for step in range(4)] == [0.125, 0.25, 0.375, 0.5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "max_steps must be at least 1; got 0"),
        ({"warmup_steps": -1}, "warmup_steps cannot be negative; got -1"),
        (
            {"learning_rate": 1e-4, "min_learning_rate": 1e-3},
            r"min_learning_rate must lie between 0 and learning_rate; got 0\.001 and 0\.0001",
        ),
        ({"min_learning_rate": -1.0}, r"must lie between 0 and learning_rate; got -1\.0"),
        ({"learning_rate": float("nan")}, "must lie between 0 and learning_rate; got 0.0 and nan"),
    ],
)
def test_impossible_schedules_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ScheduleConfig(**changes)
