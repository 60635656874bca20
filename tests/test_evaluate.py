"""Held-out loss: against the formula, and the same however many processes share the work."""

import json
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.evaluate import evaluate, perplexity
from trainer.losses import token_losses
from trainer.model import GPT, ModelConfig, initial_model
from trainer.numerics import Precision

VOCABULARY = 65
CONTEXT = 8
SOURCES = ["code"] * 5 + ["web"] * 6


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As a run has it; conftest.py puts the number back."""
    torch.set_num_threads(1)


def made(dropout: float = 0.0) -> GPT:
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, context=CONTEXT, dropout=dropout)
    model = initial_model(config, VOCABULARY, seed=2)
    with torch.no_grad():
        model.transformer.wte.weight *= 20.0  # so that losses differ
    return model


def windows_of(count: int = len(SOURCES), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (count, CONTEXT + 1), generator=generator)


class Gathering:
    """What `gather` is between ranks that are threads; values travel as JSON, as in `World`."""

    def __init__(self, size: int) -> None:
        self._said = [""] * size
        self._barrier = threading.Barrier(size, timeout=60)

    def of(self, rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            self._said[rank] = json.dumps(value)
            self._barrier.wait()
            return [json.loads(text) for text in self._said]

        return gather


def found_in_world(
    size: int,
    model: GPT,
    windows: Tensor,
    sources: list[str],
    learn: Tensor | None = None,
    *,
    micro_batch_size: int = 2,
    precision: Precision = "fp32",
    seen: list[Tensor] | None = None,
    stopping: dict[int, Callable[[], bool]] | None = None,
) -> list[dict[str, float]]:
    """The result on every rank of a world. `seen` gets the tokens of every forward pass.

    `stopping` is by rank.
    """
    gathering = Gathering(size)

    def forward(tokens: Tensor) -> Tensor:
        if seen is not None:
            seen.append(tokens)
        logits: Tensor = model(tokens)
        assert not logits.requires_grad
        return logits

    def work(rank: int) -> dict[str, float]:
        torch.set_num_threads(1)
        return evaluate(
            model,
            forward,
            windows,
            sources,
            learn,
            micro_batch_size=micro_batch_size,
            precision=precision,
            device=torch.device("cpu"),
            rank=rank,
            world_size=size,
            gather=gathering.of(rank),
            stopping=(stopping or {}).get(rank, lambda: False),
        )

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, range(size)))


def reference(model: GPT, windows: Tensor) -> list[float]:
    """The loss of each window by the definition, in float64, one window at a time."""
    losses = []
    with torch.no_grad():
        for window in windows:
            logits = model.double()(window[None, :-1])[0]
            probabilities = torch.softmax(logits, dim=1)
            own = probabilities[torch.arange(CONTEXT), window[1:]]
            losses.append(float(-own.log().mean()))
    return losses


def test_the_loss_is_the_mean_over_windows_and_by_source() -> None:
    windows = windows_of()
    [found] = found_in_world(1, made(), windows, SOURCES)
    losses = reference(made(), windows)
    expected = {
        "validation_loss": sum(losses) / 11,
        "validation_perplexity": math.exp(sum(losses) / 11),
        "validation_loss/code": sum(losses[:5]) / 5,
        "validation_loss/web": sum(losses[5:]) / 6,
    }
    # float32 beside float64; the exponential multiplies the error by the loss, about 7.
    assert found == pytest.approx(expected, rel=1e-5)


def learn_of(count: int = len(SOURCES)) -> Tensor:
    """A mask with other counts in each window, and none in the first."""
    first = CONTEXT - 3 * torch.arange(count) % CONTEXT
    return torch.arange(CONTEXT)[None] >= first[:, None]


def test_the_loss_is_the_mean_over_learnt_tokens() -> None:
    model, windows, learn = made(), windows_of(), learn_of()
    [found] = found_in_world(1, model, windows, SOURCES, learn)
    with torch.no_grad():
        losses = token_losses(model(windows[:, :-1]), windows[:, 1:]).double()
    assert len(set(learn.sum(dim=1).tolist())) == CONTEXT
    expected = {
        "validation_loss": float(losses[learn].mean()),
        "validation_perplexity": math.exp(float(losses[learn].mean())),
        "validation_loss/code": float(losses[:5][learn[:5]].mean()),
        "validation_loss/web": float(losses[5:][learn[5:]].mean()),
    }
    # float32 in batches of other sizes; the exponential multiplies the error by the loss, about 7.
    assert found == pytest.approx(expected, rel=1e-5)
    assert found_in_world(3, model, windows, SOURCES, learn) == [found] * 3


def test_a_mask_that_hides_nothing_changes_no_bits() -> None:
    everything = torch.ones(len(SOURCES), CONTEXT, dtype=torch.bool)
    model, windows = made(), windows_of()
    [masked] = found_in_world(1, model, windows, SOURCES, everything)
    assert found_in_world(1, model, windows, SOURCES) == [masked]


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 6), micro_batch_size=st.integers(1, 12), count=st.integers(1, 12))
def test_every_world_finds_the_same_bits(size: int, micro_batch_size: int, count: int) -> None:
    model, windows = made(), windows_of(count)
    sources = [f"source{number % 3}" for number in range(count)]
    [alone] = found_in_world(1, model, windows, sources, micro_batch_size=micro_batch_size)
    shared = found_in_world(size, model, windows, sources, micro_batch_size=micro_batch_size)
    assert shared == [alone] * size


def test_each_window_is_the_work_of_one_process() -> None:
    seen: list[Tensor] = []
    windows = windows_of()
    found_in_world(3, made(), windows, SOURCES, micro_batch_size=2, seen=seen)
    assert [len(tokens) for tokens in seen].count(1) == 1
    assert sorted(torch.cat(seen).tolist()) == sorted(windows[:, :-1].tolist())


def test_losses_belong_to_their_sources_whatever_the_order() -> None:
    windows, model = windows_of(), made()
    [found] = found_in_world(1, model, windows, SOURCES, micro_batch_size=1)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(3))
    mixed = [SOURCES[i] for i in order.tolist()]
    # Sums of float64 are exact before they are rounded (fsum), hence equal.
    assert found_in_world(1, model, windows[order], mixed, micro_batch_size=1) == [found]


def test_evaluation_is_without_dropout_and_leaves_generators_and_gradients_alone() -> None:
    model = made(dropout=0.5).train()
    before = torch.get_rng_state()
    assert found_in_world(1, model, windows_of(), SOURCES) == found_in_world(
        1, made(), windows_of(), SOURCES
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_float32(precision: Precision) -> None:
    [full] = found_in_world(1, made(), windows_of(), SOURCES)
    [half] = found_in_world(1, made(), windows_of(), SOURCES, precision=precision)
    assert half["validation_loss"] != full["validation_loss"]
    # bf16 has 8 bits of mantissa: relative errors of 0.4 % in logits.
    assert half["validation_loss"] == pytest.approx(full["validation_loss"], rel=5e-3)


def test_it_is_announced_once() -> None:
    heard: list[str] = []
    evaluate(
        made(),
        made(),
        windows_of(),
        SOURCES,
        micro_batch_size=2,
        precision="fp32",
        device=torch.device("cpu"),
        rank=0,
        world_size=1,
        gather=lambda value: [value],
        announce=heard.append,
    )
    assert heard == ["evaluate"]


@settings(deadline=None)
@given(loss=st.floats(0.0, 699.0))
def test_perplexity_is_the_exponential(loss: float) -> None:
    assert perplexity(loss) == math.exp(loss)


@pytest.mark.parametrize("loss", [700.0, 1e6, math.inf])
def test_perplexity_of_a_hopeless_model_is_infinite(loss: float) -> None:
    assert perplexity(loss) == math.inf


@pytest.mark.parametrize("size", [1, 2, 3])
def test_one_process_that_is_to_stop_gives_the_evaluation_up_for_all(size: int) -> None:
    """Between two micro-batches; the others have done theirs by then."""
    seen: list[Tensor] = []
    asked = iter([False, True])
    stopping = {size - 1: lambda: next(asked)}
    found = found_in_world(size, made(), windows_of(), SOURCES, seen=seen, stopping=stopping)
    assert found == [None] * size
    assert len(seen) < 6
