"""Losses of tokens: against the formula, and averaged over what counts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.losses import (
    IGNORED,
    by_source,
    learnt_tokens,
    mean_loss,
    sequence_losses,
    targets_of,
    token_losses,
)


def logits_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 4


def tokens_of(*shape: int) -> torch.Tensor:
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(1))


def test_token_losses_are_the_cross_entropy_of_each_token() -> None:
    logits, targets = logits_of(3, 5, 64), tokens_of(3, 5)
    losses = token_losses(logits.bfloat16(), targets)
    reference = -torch.log_softmax(logits.bfloat16().double(), dim=2)
    assert losses.dtype == torch.float32
    # float32 beside float64, values of order 10.
    expected = reference.gather(2, targets[..., None])[..., 0]
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-5)


def test_a_target_that_is_ignored_has_no_loss_and_no_gradient() -> None:
    logits, targets = logits_of(2, 3, 64).requires_grad_(), tokens_of(2, 3)
    targets[0, 1] = IGNORED
    losses = token_losses(logits, targets)
    losses.sum().backward()
    assert logits.grad is not None
    zero = torch.tensor([[False, True, False], [False] * 3])
    assert torch.equal(losses == 0.0, zero)
    assert torch.equal((logits.grad == 0.0).all(dim=2), zero)


def test_targets_are_the_next_tokens_where_they_are_learnt() -> None:
    rows = torch.tensor([[5, 6, 7, 8]])
    learn = torch.tensor([[True, False, True]])
    assert targets_of(rows, None).tolist() == [[6, 7, 8]]
    assert targets_of(rows, learn).tolist() == [[6, IGNORED, 8]]
    assert learnt_tokens(targets_of(rows, None)).tolist() == [3]
    assert learnt_tokens(targets_of(rows, learn)).tolist() == [2]


def test_a_sequence_says_its_sum_in_float64() -> None:
    losses = torch.tensor([[1.0, 2.0**-40, 0.0], [0.5, 0.25, 3.0]], requires_grad=True)
    found = sequence_losses(losses)
    assert found.tolist() == [1.0 + 2.0**-40, 3.75]
    assert not found.requires_grad


def test_the_mean_is_that_of_tokens_not_of_sequences() -> None:
    assert mean_loss([6.0, 1.0], [3, 1]) == 7.0 / 4
    assert mean_loss([0.0, 0.0], [0, 0]) == 0.0
    assert math.isnan(mean_loss([1.0, math.nan], [1, 1]))
    assert mean_loss([1.0, math.inf], [1, 1]) == math.inf


SEQUENCES = st.lists(
    st.tuples(st.floats(0.0, 1e4, width=32), st.integers(0, 64), st.sampled_from(["a", "b", "c"]))
)


@given(sequences=SEQUENCES)
def test_sources_have_their_own_tokens_and_together_all(
    sequences: list[tuple[float, int, str]],
) -> None:
    losses, learnt, sources = map(list, zip(*sequences, strict=True)) if sequences else ([], [], [])
    found = by_source(losses, learnt, sources)
    assert list(found) == sorted(set(sources))
    for name, (loss, tokens) in found.items():
        own = [(a, n) for a, n, source in sequences if source == name]
        assert tokens == sum(n for _, n in own)
        # Two float64 roundings.
        assert loss * tokens == pytest.approx(sum(a for a, _ in own) if tokens else 0.0, rel=1e-12)


@given(sequences=SEQUENCES, random=st.randoms())
def test_the_order_of_the_sequences_does_not_matter(
    sequences: list[tuple[float, int, str]], random: object
) -> None:
    """fsum rounds once, so that even the bits are equal."""
    mixed = list(sequences)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    one, other = (
        by_source([a for a, _, _ in of], [n for _, n, _ in of], [s for _, _, s in of])
        for of in (sequences, mixed)
    )
    assert one == other
