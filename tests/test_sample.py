"""Text from the model: by key, within the vocabulary, and no further than asked."""

from typing import Any

import pytest
import torch

from storage.errors import StopRequestedError
from trainer.model import GPT, ModelConfig, initial_model
from trainer.sample import sample

VOCABULARY = 65
CONTEXT = 8
END = 64
PROMPT = [5, 17, 3]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As a run has it; conftest.py puts the number back."""
    torch.set_num_threads(1)


def made(dropout: float = 0.0) -> GPT:
    """A model with opinions, in which all that it sees counts; its seed was chosen for that."""
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, context=CONTEXT, dropout=dropout)
    model = initial_model(config, VOCABULARY, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter *= 20.0 if "c_attn" in name else 10.0
        model.transformer.wte.weight[END] = 0.0  # a logit of 0, which is never the largest here
    return model


def drawn(model: GPT, prompt: list[int], **changes: Any) -> list[int]:
    options: dict[str, Any] = {
        "tokens": 20,
        "temperature": 1.0,
        "end_of_text": END,
        "key": (0, 100, 1),
        "precision": "fp32",
        "device": torch.device("cpu"),
    }
    return sample(model, prompt, **(options | changes))


def greedy(model: GPT, prompt: list[int], tokens: int) -> list[int]:
    """The most likely tokens, one after another, by the definition."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            logits = model.eval()(torch.tensor([ids[-CONTEXT:]]))[0, -1, :VOCABULARY]
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def test_the_same_key_draws_the_same_and_another_key_another() -> None:
    first = drawn(made(), PROMPT)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert drawn(made(), PROMPT) == first
    assert torch.equal(torch.get_rng_state(), before)
    for other in ((1, 100, 1), (0, 101, 1), (0, 100, 2)):
        assert drawn(made(), PROMPT, key=other) != first


def test_temperature_0_takes_the_most_likely_token_whatever_the_key() -> None:
    expected = greedy(made(), PROMPT, 20)
    assert len(set(expected)) > 3
    for key in ((0, 0, 0), (7, 7, 7)):
        assert drawn(made(), PROMPT, temperature=0.0, key=key) == expected


def test_a_low_temperature_is_near_the_most_likely_token() -> None:
    assert drawn(made(), PROMPT, temperature=1e-4) == greedy(made(), PROMPT, 20)


def test_frequencies_are_those_of_the_softmax() -> None:
    model = made().eval()
    counts = torch.zeros(VOCABULARY)
    draws = 600
    for number in range(draws):
        for token in drawn(model, PROMPT, tokens=1, temperature=1.5, key=(number,)) or [END]:
            counts[token] += 1
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT]))[0, -1, :VOCABULARY]
    expected = torch.softmax(logits / 1.5, dim=0)
    deviation = (draws * expected * (1 - expected)).sqrt()
    # Five standard deviations of a binomial, and one count for tokens that are hardly ever drawn.
    assert ((counts - draws * expected).abs() <= 5 * deviation + 1).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_of_text_stops_and_is_left_out(temperature: float) -> None:
    free = drawn(made(), PROMPT, temperature=temperature)
    assert len(free) == 20
    for end in set(free):
        stopped = drawn(made(), PROMPT, temperature=temperature, end_of_text=end)
        assert stopped == free[: free.index(end)]


def test_only_the_last_context_tokens_are_seen() -> None:
    recent = [9, 8, 7, 6, 5, 4, 3, 2]
    assert len(recent) == CONTEXT
    expected = drawn(made(), recent)
    assert drawn(made(), [1, 1, 1, *recent]) == expected
    assert drawn(made(), [60, 61, *recent]) == expected
    assert drawn(made(), [1, *recent[1:]]) != expected


def test_an_empty_prompt_begins_after_an_end_of_text() -> None:
    assert drawn(made(), []) == drawn(made(), [END])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_padded_id_is_never_drawn(temperature: float) -> None:
    """The rows of the padding are made to have the largest logits, of either sign."""
    model = made().eval()
    with torch.no_grad():
        padded = model.transformer.wte.weight[VOCABULARY:]
        last = model.transformer(torch.tensor([PROMPT]))[0, -1]
        padded[0::2], padded[1::2] = 100.0 * last, -100.0 * last
        assert int(model(torch.tensor([PROMPT]))[0, -1].argmax()) >= VOCABULARY
    ids = drawn(model, PROMPT, temperature=temperature, tokens=100, end_of_text=-1)
    assert len(ids) == 100
    assert max(ids) < VOCABULARY


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_no_more_tokens_than_asked_and_the_prompt_stays(tokens: int) -> None:
    prompt = list(PROMPT)
    assert len(drawn(made(), prompt, tokens=tokens)) == tokens
    assert prompt == PROMPT


def test_dropout_is_off() -> None:
    assert drawn(made(dropout=0.5).train(), PROMPT) == drawn(made(), PROMPT)


def test_a_sample_is_given_up_before_the_next_token() -> None:
    asked = iter([False, False, True])
    with pytest.raises(StopRequestedError, match="asked to stop while a sample was drawn"):
        drawn(made(), PROMPT, stopping=lambda: next(asked))
    assert next(asked, None) is None
