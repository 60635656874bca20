"""The canary: no model that sees only what came before trips it; one that sees ahead does."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from data_service.batches import Batches
from data_service.loader import StepRows
from launch.build import build_training
from launch.config import RunConfig
from launch.world import World
from storage.errors import ConfigurationError
from tests.controls import broken
from tests.made_sources import made_source, plan_of
from tests.test_loop import Recorder
from trainer.canary import MOST_NATS, canary_window, check_canary, leak_nats
from trainer.model import GPT, ModelConfig, initial_model
from trainer.schedule import ScheduleConfig
from trainer.step import BatchConfig

CPU = torch.device("cpu")
GOLDEN = [137, 58, 123, 192, 29, 174, 173, 201, 112]
SEES = r"predicts random tokens .* by \d+ nats better than chance .*at most 30 can be luck"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As a run has it; conftest.py puts the number back."""
    torch.set_num_threads(1)


def made(vocab_size: int, context: int) -> GPT:
    model = initial_model(ModelConfig(n_layer=1, n_embd=16, context=context), vocab_size, seed=2)
    with torch.no_grad():
        model.transformer.wte.weight *= 40.0  # so that it is sure of itself
    return model


def checked(
    model: GPT, window: Tensor, forward: Callable[[Tensor], Tensor] | None = None
) -> dict[str, float]:
    return check_canary(model, forward or model, window, precision="fp32", device=CPU)


def test_the_window_is_for_ever() -> None:
    """A frozen vector: another library version must not choose another window."""
    assert canary_window(0, 8, 257).tolist() == [GOLDEN]
    assert canary_window(0, 3, 257).tolist() == [GOLDEN[:4]]
    assert canary_window(1, 8, 257).tolist() != [GOLDEN]


@pytest.mark.parametrize("vocab_size", [66, 257, 50_257])
def test_its_tokens_are_uniform_over_all_ids(vocab_size: int) -> None:
    size = 20 * vocab_size
    [ids] = canary_window(3, size - 1, vocab_size).numpy()
    counts = np.bincount(ids, minlength=vocab_size)
    assert len(counts) == vocab_size
    chi_square = float(((counts - 20) ** 2).sum()) / 20
    # Mean V - 1, deviation sqrt(2 (V - 1)); five of these.
    assert abs(chi_square - (vocab_size - 1)) < 5 * math.sqrt(2 * (vocab_size - 1))


def every_window(vocab_size: int, context: int) -> list[Tensor]:
    first = torch.zeros(1, 1, dtype=torch.int64)
    return [
        torch.cat([first, torch.tensor([targets])], dim=1)
        for targets in itertools.product(range(vocab_size), repeat=context)
    ]


def test_a_causal_model_multiplies_its_stake_by_at_most_1_on_average() -> None:
    """The theorem, over all windows there are, for a model that is sure and mostly wrong."""
    model = made(3, 4)
    nats = [checked(model, window)["validation_canary_nats"] for window in every_window(3, 4)]
    assert len(nats) == 81
    assert max(nats) - min(nats) > 1.0
    assert math.fsum(map(math.exp, nats)) / 81 <= 1.0 + 1e-6  # probabilities in float32


def test_a_model_that_sees_ahead_multiplies_its_stake() -> None:
    """Negative control of the theorem."""
    model, windows = made(3, 4), every_window(3, 4)
    nats = [checked(model, window, lambda _, window=window: sees(window, 3)) for window in windows]
    stakes = [math.exp(found["validation_canary_nats"]) for found in nats]
    assert stakes == pytest.approx([2.0**4] * 81, rel=1e-3)


def sees(window: Tensor, known: int) -> Tensor:
    """Logits that are sure of the next token when its id is below `known`, else of id 0."""
    targets = window[:, 1:]
    seen = torch.where(targets < known, targets, 0)
    return 30.0 * torch.nn.functional.one_hot(seen, 320).float()


def test_one_that_knows_few_tokens_is_caught_though_its_loss_is_high() -> None:
    """It copies a quarter of the ids and gives the others next to nothing."""
    model, window = made(257, 128), canary_window(0, 128, 257)
    losses = 128 * [math.log(257)]
    assert leak_nats(losses, 257) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ConfigurationError, match=SEES):
        checked(model, window, lambda _: sees(window, 64))
    with pytest.raises(ConfigurationError, match="Nothing of this step is saved; correct it"):
        checked(model, window, lambda _: sees(window, 257))


@given(
    losses=st.lists(st.floats(0.0, 1e6) | st.just(math.inf), min_size=1, max_size=99),
    vocab_size=st.integers(2, 60_000),
)
def test_evidence_is_bounded_by_what_a_token_can_tell(losses: list[float], vocab_size: int) -> None:
    nats = leak_nats(losses, vocab_size)
    assert -len(losses) * math.log(2.0) - 1e-6 <= nats
    assert nats <= len(losses) * math.log((vocab_size + 1) / 2) + 1e-6


def test_a_model_that_diverged_is_not_accused() -> None:
    found = checked(made(257, 16), canary_window(0, 16, 257), lambda _: sees_nothing())
    assert math.isnan(found["validation_canary_loss"])
    assert math.isnan(found["validation_canary_nats"])


def sees_nothing() -> Tensor:
    return torch.full((1, 16, 320), math.nan)


def test_it_costs_one_window_and_no_generator_or_gradient_notices() -> None:
    model = made(257, 16).train()
    shapes: list[Any] = []

    def forward(tokens: Tensor) -> Tensor:
        shapes.append(tuple(tokens.shape))
        logits: Tensor = model(tokens)
        assert not logits.requires_grad
        return logits

    before = torch.get_rng_state()
    found = checked(model, canary_window(0, 16, 257), forward)
    assert shapes == [(1, 16)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert found["validation_canary_nats"] < MOST_NATS


CONTEXT = 16


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    source = made_source(tmp_path_factory.mktemp("sources"), "web")
    return Batches(
        plan=plan_of([source]),
        sources={"web": source},
        seed=5,
        context=CONTEXT,
        global_batch_size=8,
    )


def recorder(batches: Batches, rows: Callable[[int], StepRows]) -> Recorder:
    """What a loop over these rows tells."""
    config = RunConfig(
        seed=5,
        model=ModelConfig(n_layer=1, n_head=2, n_embd=32, context=CONTEXT),
        schedule=ScheduleConfig(max_steps=150, learning_rate=1e-2, warmup_steps=20),
        batch=BatchConfig(global_batch_size=8, micro_batch_size=8, virtual_ranks=1),
    )
    training = build_training(config, World(0, 1, CPU, "none"), batches)
    return Recorder(training, batches, rows=rows)


def noise(step: int) -> StepRows:
    """Tokens at random, in which only one who sees ahead can find anything to learn."""
    random = np.random.Generator(np.random.PCG64(step))
    return StepRows(random.integers(0, 257, (8, CONTEXT + 1)), None)


EVERY_25 = {"eval_interval_steps": 25, "save_interval_steps": 25}


def ends_with_a_leak(recorded: Recorder) -> None:
    with pytest.raises(ConfigurationError, match=SEES) as raised:
        recorded.loop(150, **EVERY_25).run(0, 0)
    assert raised.value.exit_code == 78
    evaluated = recorded.steps_of("evaluate")
    assert recorded.steps_of("save") == evaluated[:-1], "a model that cheats would be the best"
    assert recorded.rows[-1]["step"] == evaluated[-1] - 1


def test_attention_that_sees_ahead_ends_the_run(batches: Batches) -> None:
    with broken("causal"):
        ends_with_a_leak(recorder(batches, noise))


def test_training_on_the_canary_window_ends_the_run(batches: Batches) -> None:
    window = canary_window(5, CONTEXT, batches.vocab_size).numpy().repeat(8, axis=0)
    ends_with_a_leak(recorder(batches, lambda step: StepRows(window, None)))


def test_training_on_another_window_of_noise_does_not(batches: Batches) -> None:
    window = canary_window(6, CONTEXT, batches.vocab_size).numpy().repeat(8, axis=0)
    recorded = recorder(batches, lambda step: StepRows(window, None))
    assert recorded.loop(150, **EVERY_25).run(0, 0)
    assert recorded.rows[-1]["loss"] < 0.1, "it is learned by heart"


@pytest.mark.parametrize("kind", ["noise", "data"])
def test_a_healthy_run_is_not_stopped(kind: str, batches: Batches) -> None:
    def data(step: int) -> StepRows:
        return StepRows(batches.batch(step), None)

    recorded = recorder(batches, noise if kind == "noise" else data)
    assert recorded.loop(150, **EVERY_25).run(0, 0)
    found = [row["validation_canary_nats"] for row in recorded.rows[24::25]]
    assert len(found) == 6
    assert max(found) < 3.0, "more is luck of once in 20 runs"
