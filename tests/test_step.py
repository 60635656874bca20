"""One step: its gradient is that of the whole batch, clipped, scaled and applied."""

import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from storage.errors import ConfigurationError
from tests.test_reduction import Worlds
from trainer.losses import token_losses
from trainer.model import GPT, ModelConfig, initial_model
from trainer.numerics import Precision, make_scaler
from trainer.optimizer import OptimizerConfig, make_optimizer
from trainer.reduction import GradientReducer
from trainer.schedule import ScheduleConfig, learning_rate
from trainer.step import (
    Abandoned,
    BatchConfig,
    Flags,
    StepResult,
    StepSettings,
    TrainStep,
    reduced_length,
)

CPU = torch.device("cpu")
SCHEDULE = ScheduleConfig(max_steps=20, learning_rate=1e-2, warmup_steps=2)
VOCABULARY = 65
CONTEXT = 8

SAME_SUM = {"rtol": 1e-4, "atol": 1e-6}
"""Gradients of order 0.01 in float32, at most a hundred terms added in another order."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As a run has it; conftest.py puts the number back."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    made = Worlds(3)
    yield made
    made.close()


def rows_of(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (size, CONTEXT + 1), generator=generator)


def made(
    batch: BatchConfig,
    *,
    precision: Precision = "fp32",
    scaler: torch.amp.GradScaler | None = None,
    clip_norm: float = 0.0,
    dropout: float = 0.0,
    exact: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> TrainStep:
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, context=CONTEXT, dropout=dropout)
    model = initial_model(config, VOCABULARY, seed=2)
    reducer = GradientReducer(
        reduced_length(model, batch),
        virtual_ranks=batch.virtual_ranks,
        rank=rank,
        size=world_size,
        device=CPU,
        exact=exact,
    )
    settings = StepSettings(
        batch=batch,
        schedule=SCHEDULE,
        precision=precision,
        clip_norm=clip_norm,
        seed=3,
        rank=rank,
        world_size=world_size,
    )
    optimizer = make_optimizer(model, OptimizerConfig())
    scaler = make_scaler(precision, CPU) if scaler is None else scaler
    return TrainStep(model, model, optimizer, scaler, reducer, settings)


def run(
    training: TrainStep,
    step: int,
    rows: Tensor,
    learn: Tensor | None = None,
    *,
    flags: Callable[[], Flags] = Flags,
    announce: Callable[[str], None] = lambda phase: None,
) -> StepResult:
    result = training.run(step, rows, learn, flags=flags, announce=announce)
    assert isinstance(result, StepResult)
    return result


def gradients_at(
    phase: str, training: TrainStep, rows: Tensor, learn: Tensor | None = None
) -> tuple[StepResult, list[Tensor]]:
    """The first step, and the gradients as they are when it enters a phase."""
    found: list[Tensor] = []

    def listener(name: str) -> None:
        if name == phase:
            found.extend(p.grad.clone() for p in training.model.parameters() if p.grad is not None)

    return run(training, 0, rows, learn, announce=listener), found


def reference(rows: Tensor) -> tuple[float, GPT]:
    """Loss and gradients of the whole batch at once, by autograd alone."""
    model = made(BatchConfig()).model.train()
    loss = token_losses(model(rows[:, :-1]), rows[:, 1:]).mean()
    loss.backward()
    return loss.item(), model


def weights(training: TrainStep) -> list[Tensor]:
    return [p.detach().clone() for p in training.model.parameters()]


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@st.composite
def batches(draw: st.DrawFn) -> BatchConfig:
    virtual_ranks = draw(st.integers(1, 6))
    return BatchConfig(
        global_batch_size=draw(st.integers(virtual_ranks, 14)),
        micro_batch_size=draw(st.integers(1, 15)),
        virtual_ranks=virtual_ranks,
    )


@settings(max_examples=25, deadline=None)
@given(batch=batches(), exact=st.booleans())
def test_the_gradient_is_that_of_the_whole_batch(batch: BatchConfig, exact: bool) -> None:
    rows = rows_of(batch.global_batch_size)
    result, found = gradients_at("update:before", made(batch, exact=exact), rows)
    loss, model = reference(rows)
    # A mean of at most 112 losses of about 4, in float32.
    assert result.loss == pytest.approx(loss, rel=1e-6)
    for (name, parameter), gradient in zip(model.named_parameters(), found, strict=True):
        torch.testing.assert_close(
            gradient, parameter.grad, **SAME_SUM, msg=lambda text, name=name: f"{name}: {text}"
        )
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert result.gradient_norm == pytest.approx(float(norm), rel=1e-5)  # as SAME_SUM


def learn_of(size: int, seed: int) -> Tensor:
    """A mask as of answers in chats: some sequences wholly learnt, some not at all."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(-2, CONTEXT + 3, (size, 1), generator=generator)
    return torch.arange(CONTEXT)[None] >= first


def masked_reference(rows: Tensor, learn: Tensor) -> tuple[float, GPT]:
    """Loss and gradients of the whole batch at once, as PyTorch alone gives them."""
    model = made(BatchConfig()).model.train()
    targets = torch.where(learn, rows[:, 1:], -100)
    loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    return loss.item(), model


@settings(max_examples=25, deadline=None)
@given(batch=batches(), exact=st.booleans(), seed=st.integers(0, 1000))
def test_the_gradient_is_that_of_the_mean_over_learnt_tokens(
    batch: BatchConfig, exact: bool, seed: int
) -> None:
    rows, learn = rows_of(batch.global_batch_size), learn_of(batch.global_batch_size, seed)
    learn[0, 0] = True
    result, found = gradients_at("update:before", made(batch, exact=exact), rows, learn)
    loss, model = masked_reference(rows, learn)
    assert result.loss == pytest.approx(loss, rel=1e-6)  # as without a mask
    assert result.learnt == tuple(learn.sum(dim=1).tolist())
    for (name, parameter), gradient in zip(model.named_parameters(), found, strict=True):
        # Means over fewer tokens are larger, up to order 1, and so are their roundings.
        torch.testing.assert_close(
            gradient,
            parameter.grad,
            rtol=1e-4,
            atol=1e-6 * learn.numel() / int(learn.sum()),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_without_the_mask_the_gradient_is_another() -> None:
    """Negative control: the reference tells a step that forgets the mask, or the larger mean."""
    batch = BatchConfig(global_batch_size=8)
    rows, learn = rows_of(8), learn_of(8, seed=1)
    _, model = masked_reference(rows, learn)
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    with patch("trainer.step.targets_of", lambda rows, learn: rows[:, 1:]):
        _, unmasked = gradients_at("update:before", made(batch), rows, learn)
    with patch("trainer.step.learnt_tokens", lambda targets: torch.full((1,), CONTEXT)):
        _, smaller = gradients_at("update:before", made(batch), rows, learn)
    for wrong in (unmasked, smaller):
        assert not any(torch.allclose(a, b, rtol=0.1) for a, b in zip(wrong, expected, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_mask_that_hides_nothing_changes_no_bits(precision: Precision) -> None:
    batch = BatchConfig(global_batch_size=8, micro_batch_size=2, virtual_ranks=3)
    masked, plain = made(batch, precision=precision), made(batch, precision=precision)
    for step in range(3):
        rows = rows_of(8, seed=step)
        everything = torch.ones(8, CONTEXT, dtype=torch.bool)
        assert run(masked, step, rows, everything) == run(plain, step, rows)
    assert same_bits(weights(masked), weights(plain))


def test_what_is_not_learnt_is_not_looked_at() -> None:
    """The last token of a row is a target only: any other in its place gives the same bits."""
    batch = BatchConfig(global_batch_size=8, micro_batch_size=3, virtual_ranks=2)
    one, other = made(batch), made(batch)
    rows, learn = rows_of(8), learn_of(8, seed=1)
    learn[:, -1] = False
    changed = rows.clone()
    changed[:, -1] = (rows[:, -1] + 1) % VOCABULARY
    assert run(one, 0, rows, learn) == run(other, 0, changed, learn)
    assert same_bits(weights(one), weights(other))


def test_a_batch_without_learnt_tokens_has_no_gradient_and_no_nan() -> None:
    batch = BatchConfig(global_batch_size=8, micro_batch_size=2, virtual_ranks=3)
    training = made(batch, clip_norm=1.0)
    run(training, 5, rows_of(8))
    nothing = torch.zeros(8, CONTEXT, dtype=torch.bool)
    result, found = gradients_at("update:before", training, rows_of(8), nothing)
    assert not any(gradient.any() for gradient in found)
    assert (result.loss, result.gradient_norm, sum(result.learnt)) == (0.0, 0.0, 0)
    assert all(torch.isfinite(weight).all() for weight in weights(training))


def test_clipping_is_of_the_gradient_of_learnt_tokens() -> None:
    batch = BatchConfig(global_batch_size=8, micro_batch_size=8, virtual_ranks=1)
    rows, learn = rows_of(8), learn_of(8, seed=1)
    result, found = gradients_at("update:after", made(batch, clip_norm=0.05), rows, learn)
    _, model = masked_reference(rows, learn)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    assert result.gradient_norm == pytest.approx(float(norm), rel=1e-5)  # as SAME_SUM
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, **SAME_SUM)


@pytest.mark.parametrize("exact", [True, False])
def test_a_step_says_the_loss_of_every_sequence(exact: bool) -> None:
    batch = BatchConfig(global_batch_size=7, micro_batch_size=2, virtual_ranks=3)
    rows, learn = rows_of(7), learn_of(7, seed=2)
    model = made(batch).model
    result = run(made(batch, exact=exact), 0, rows, learn)
    with torch.no_grad():
        losses = token_losses(model(rows[:, :-1]), rows[:, 1:]).double() * learn
    # float32 beside float32 in micro-batches of other sizes.
    assert result.losses == pytest.approx(losses.sum(dim=1).tolist(), rel=1e-5)
    assert result.learnt == tuple(learn.sum(dim=1).tolist())
    assert result.loss == pytest.approx(float(losses.sum()) / int(learn.sum()), rel=1e-5)


def steps_in_world(
    worlds: Worlds, size: int, *, exact: bool
) -> list[tuple[list[StepResult], list[Tensor]]]:
    """What three masked steps say on every rank of a world, and the weights after them."""
    batch = BatchConfig(global_batch_size=11, micro_batch_size=2, virtual_ranks=5)
    trainings = [  # here: threads share the generator that draws the weights
        made(batch, clip_norm=0.5, exact=exact, rank=rank, world_size=size) for rank in range(size)
    ]

    def work(rank: int) -> tuple[list[StepResult], list[Tensor]]:
        torch.set_num_threads(1)
        training = trainings[rank]
        mine = batch.rows_of(rank, size)
        part = slice(mine.start, mine.stop)
        results = [
            run(training, step, rows_of(11, seed=step)[part], learn_of(11, seed=step)[part])
            for step in range(3)
        ]
        return results, weights(training)

    return worlds.run(size, work)


def test_masked_steps_have_the_same_bits_in_any_world(worlds: Worlds) -> None:
    [(results, after)] = steps_in_world(worlds, 1, exact=True)
    assert all(0 < sum(result.learnt) < 11 * CONTEXT for result in results)
    for size in (2, 3):
        for found, weights_found in steps_in_world(worlds, size, exact=True):
            assert found == results
            assert same_bits(weights_found, after)


def test_losses_of_sequences_are_exact_even_where_sums_are_not(worlds: Worlds) -> None:
    """`fast` adds in another order, but zeros change nothing: equal before the first update."""
    firsts = [
        (results[0].losses, results[0].learnt, results[0].loss)
        for size in (1, 2, 3)
        for exact in (True, False)
        for results, _ in steps_in_world(worlds, size, exact=exact)
    ]
    assert len(firsts) == 12
    assert len(set(firsts)) == 1


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 8, 100])
def test_any_micro_batch_gives_the_same_loss(micro_batch_size: int) -> None:
    whole = made(BatchConfig(global_batch_size=14, micro_batch_size=14, virtual_ranks=2))
    split = made(
        BatchConfig(global_batch_size=14, micro_batch_size=micro_batch_size, virtual_ranks=2)
    )
    for step in range(4):
        rows = rows_of(14, seed=step)
        # Adam divides by the root of the second moment, so that differences grow with the steps.
        assert run(split, step, rows).loss == pytest.approx(run(whole, step, rows).loss, rel=1e-4)


@settings(deadline=None)
@given(batch=batches(), data=st.data())
def test_shares_and_rows_cover_the_batch_once(batch: BatchConfig, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, batch.virtual_ranks))
    everything = list(range(batch.global_batch_size))
    shares = [batch.share(v) for v in range(batch.virtual_ranks)]
    assert [row for share in shares for row in share] == everything
    assert min(map(len, shares)) >= 1
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    rows = [batch.rows_of(rank, size) for rank in range(size)]
    assert [row for of_rank in rows for row in of_rank] == everything


def test_clipping_is_that_of_torch() -> None:
    batch = BatchConfig(global_batch_size=8, micro_batch_size=8, virtual_ranks=1)
    rows = rows_of(8)
    result, found = gradients_at("update:after", made(batch, clip_norm=0.05), rows)
    _, model = reference(rows)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    assert result.gradient_norm == pytest.approx(float(norm), rel=1e-5)  # as SAME_SUM
    assert result.gradient_norm > 0.05
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, **SAME_SUM)


@pytest.mark.parametrize("clip_norm", [0.0, 1000.0])
def test_a_gradient_below_the_limit_keeps_its_bits(clip_norm: float) -> None:
    batch = BatchConfig(global_batch_size=8)
    training = made(batch, clip_norm=clip_norm)
    _, before = gradients_at("update:before", training, rows_of(8))
    _, after = gradients_at("update:after", made(batch, clip_norm=clip_norm), rows_of(8))
    assert same_bits(before, after)


def test_the_rate_is_that_of_the_schedule_and_decides_the_update() -> None:
    batch = BatchConfig(global_batch_size=8)
    moved = []
    for step in (0, 2, 11, 20):
        training = made(batch)
        before = weights(training)
        result = run(training, step, rows_of(8))
        assert result.learning_rate == learning_rate(step, SCHEDULE)
        moved.append(not same_bits(before, weights(training)))
    assert moved == [True, True, True, False]  # the rate is 0 from step 20 on


def test_two_runs_of_the_same_steps_have_the_same_bits() -> None:
    batch = BatchConfig(global_batch_size=8, micro_batch_size=2, virtual_ranks=3)
    ends = []
    for outside in (1, 2):
        torch.manual_seed(outside)
        training = made(batch, dropout=0.2, clip_norm=1.0)
        results = [run(training, step, rows_of(8, seed=step)) for step in range(3)]
        ends.append((results, weights(training)))
    assert ends[0][0] == ends[1][0]
    assert same_bits(ends[0][1], ends[1][1])


def test_dropout_differs_between_steps() -> None:
    batch = BatchConfig(global_batch_size=8)
    losses = {run(made(batch, dropout=0.5), step, rows_of(8)).loss for step in range(4)}
    assert len(losses) == 4


def test_dropout_differs_between_virtual_ranks_and_micro_batches() -> None:
    """Eight equal rows, each a micro-batch of its own, see eight different models."""
    batch = BatchConfig(global_batch_size=8, micro_batch_size=1, virtual_ranks=4)
    training = made(batch, dropout=0.5)
    seen: list[Tensor] = []

    def forward(tokens: Tensor) -> Tensor:
        logits: Tensor = training.model(tokens)
        seen.append(logits.detach())
        return logits

    training.forward = forward
    run(training, 0, rows_of(1).expand(8, -1))
    assert len(seen) == 8
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_scaling_the_loss_does_not_change_float32() -> None:
    """A power of two is undone exactly, so that the scaler can be judged by bits."""
    batch = BatchConfig(global_batch_size=8, micro_batch_size=2, virtual_ranks=3)
    plain = made(batch, clip_norm=0.5)
    scaled = made(
        batch, clip_norm=0.5, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=True)
    )
    for step in range(4):
        rows, learn = rows_of(8, seed=step), learn_of(8, seed=step) if step % 2 else None
        assert run(plain, step, rows, learn) == run(scaled, step, rows, learn)
    assert same_bits(weights(plain), weights(scaled))


def test_an_overflow_of_fp16_skips_the_update_and_halves_the_scale() -> None:
    batch = BatchConfig(global_batch_size=8, micro_batch_size=2, virtual_ranks=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, enabled=True)
    training = made(batch, precision="fp16", scaler=scaler, clip_norm=1.0)
    before = weights(training)
    overflows = 0
    while not math.isfinite((result := run(training, 5, rows_of(8))).gradient_norm):
        overflows += 1
        assert math.isfinite(result.loss)
        assert scaler.get_scale() == 2.0 ** (30 - overflows)
        assert same_bits(weights(training), before)
        moments = [t for state in training.optimizer.state.values() for t in state.values()]
        assert not any(tensor.any() for tensor in moments)
    assert 1 <= overflows < 30
    assert scaler.get_scale() == 2.0 ** (30 - overflows)
    assert not same_bits(weights(training), before)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_float32(precision: Precision) -> None:
    batch = BatchConfig(global_batch_size=8)
    full, half = made(batch), made(batch, precision=precision)
    for step in range(4):
        rows = rows_of(8, seed=step)
        # bf16 has 8 bits of mantissa: relative errors of 0.4 % in logits, less in a mean of losses.
        assert run(half, step, rows).loss == pytest.approx(run(full, step, rows).loss, rel=5e-3)


@pytest.mark.parametrize(
    "answers", [[False] * 4, [True] * 4, [False, False, False, True], [True, False, False, False]]
)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["stop", "saving", "saving_locally", "save_due", "edit"])
def test_a_flag_that_any_virtual_rank_raises_is_returned_alone(
    name: str, answers: list[bool], exact: bool
) -> None:
    batch = BatchConfig(global_batch_size=8, virtual_ranks=4)
    told = iter(answers)
    training = made(batch, exact=exact)
    result = run(training, 0, rows_of(8), flags=lambda: Flags(**{name: next(told)}))
    assert result.flags == Flags(**{name: any(answers)})


def test_the_state_changes_only_after_before_update() -> None:
    training = made(BatchConfig(global_batch_size=8, virtual_ranks=4))
    before = weights(training)
    asked: list[bool] = []
    training.run(
        0,
        rows_of(8),
        flags=Flags,
        announce=lambda phase: None,
        before_update=lambda: asked.append(same_bits(weights(training), before)),
    )
    assert asked == [True]
    assert not same_bits(weights(training), before)


def test_a_request_to_stop_does_not_change_the_update() -> None:
    batch = BatchConfig(global_batch_size=8, virtual_ranks=4)
    stopped, free = made(batch), made(batch)
    run(stopped, 0, rows_of(8), flags=lambda: Flags(stop=True))
    run(free, 0, rows_of(8))
    assert same_bits(weights(stopped), weights(free))


def test_a_step_announces_its_phases_in_order_and_leaves_no_gradients() -> None:
    batch = BatchConfig(global_batch_size=8, micro_batch_size=2, virtual_ranks=3)
    training = made(batch)
    training.model.eval()
    heard: list[str] = []
    run(training, 0, rows_of(8), announce=heard.append)
    # Shares of 2, 3 and 3 sequences in micro-batches of at most 2.
    assert heard == ["micro_batch"] * 5 + ["reduce", "update:before", "update:after"]
    assert all(p.grad is None for p in training.model.parameters())
    assert training.model.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 0}, "every size of a batch must be at least 1; got .*micro_batch_"),
        ({"virtual_ranks": 0}, "every size of a batch must be at least 1; got .*virtual_ranks=0"),
        ({"global_batch_size": 0}, "every size of a batch must be at least 1; got BatchConfig"),
        (
            {"global_batch_size": 3, "virtual_ranks": 4},
            "global_batch_size must be at least virtual_ranks.*got 3 and 4",
        ),
    ],
)
def test_impossible_batches_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        BatchConfig(**changes)


def state_bits(training: TrainStep) -> list[Tensor]:
    """Everything that a step may change."""
    items = [v for state in training.optimizer.state.values() for v in state.values()]
    moments = [v.clone() for v in items if isinstance(v, Tensor)]
    scaler = [torch.tensor(float(v)) for v in training.scaler.state_dict().values()]
    return [*weights(training), *moments, *scaler, torch.get_rng_state()]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_given_up_between_micro_batches_changes_nothing(precision: Precision) -> None:
    batch = BatchConfig(global_batch_size=8, micro_batch_size=2, virtual_ranks=3)
    unbroken = made(batch, precision=precision, dropout=0.2)
    training = made(batch, precision=precision, dropout=0.2)
    for step in range(3):
        run(unbroken, step, rows_of(8, seed=step))
    run(training, 0, rows_of(8, seed=0))
    before = state_bits(training)
    asked: list[tuple[int, int]] = []
    for last in range(5):

        def abandon(done: int, of: int, last: int = last) -> bool:
            asked.append((done, of))
            return done == last

        found = abandoned(training, 1, rows_of(8, seed=1), abandon)
        assert found.flags == Flags(abandon=True)
        assert asked == [(done, 5) for done in range(last + 1)]
        assert same_bits(state_bits(training), before)
        assert all(p.grad is None for p in training.model.parameters())
        asked.clear()
    assert abandoned(training, 1, None, lambda done, of: False).flags.abandon
    for step in (1, 2):
        run(training, step, rows_of(8, seed=step))
    assert same_bits(state_bits(training), state_bits(unbroken))


def abandoned(
    training: TrainStep, step: int, rows: Tensor | None, abandon: Callable[[int, int], bool]
) -> Abandoned:
    found = training.run(step, rows, flags=Flags, announce=lambda phase: None, abandon=abandon)
    assert isinstance(found, Abandoned)
    return found


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("size", [2, 3])
def test_a_process_that_gives_a_step_up_does_so_for_all(
    size: int, exact: bool, worlds: Worlds
) -> None:
    """Whoever it is; and what another tells beside it is heard. Then the step is made anew."""
    batch = BatchConfig(global_batch_size=11, micro_batch_size=1, virtual_ranks=5)
    made_anew = made(batch, exact=exact)
    if exact:
        run(made_anew, 0, rows_of(11))
    for who in range(size):
        trainings = [made(batch, exact=exact, rank=rank, world_size=size) for rank in range(size)]

        def work(
            rank: int, who: int = who, trainings: list[TrainStep] = trainings
        ) -> tuple[StepResult | Abandoned, list[Tensor], list[Tensor]]:
            torch.set_num_threads(1)
            training, mine = trainings[rank], batch.rows_of(rank, size)
            rows = rows_of(11)[mine.start : mine.stop]
            result = training.run(
                0,
                None if (rank, who) == (0, 0) else rows,
                flags=lambda: Flags(no_time=rank != who),
                announce=lambda phase: None,
                abandon=lambda done, of: rank == who and done == 1,
            )
            after = weights(training)
            run(training, 0, rows)
            return result, after, weights(training)

        for result, after, anew in worlds.run(size, work):
            assert result == Abandoned(flags=Flags(abandon=True, no_time=True))
            assert same_bits(after, weights(made(batch)))
            assert same_bits(anew, weights(made_anew)) or not exact
