"""Nested state comes back as it was, and what cannot be stored is named."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.tree import put_together, take_apart
from storage.errors import ConfigurationError, IntegrityError

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)
)
KEYS = st.one_of(st.text(max_size=5), st.integers(-5, 5))
STATES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=12,
)


def there_and_back(state: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    stored = json.loads(json.dumps(take_apart(state, "part", tensors), allow_nan=False))
    return put_together(stored, tensors)


@given(STATES)
def test_state_without_tensors_comes_back(state: Any) -> None:
    back = there_and_back(state)
    assert back == state and type(back) is type(state)


def test_a_number_that_is_none_comes_back() -> None:
    assert math.isnan(there_and_back({"best": float("nan")})["best"])


def test_an_optimizer_comes_back() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    back = there_and_back(state)
    assert back["param_groups"] == state["param_groups"]
    assert back["state"].keys() == {0, 1}
    assert torch.equal(back["state"][0]["exp_avg"], state["state"][0]["exp_avg"])


def test_tensors_are_named_by_their_place() -> None:
    tensors: dict[str, torch.Tensor] = {}
    take_apart({"state": [{"m": torch.ones(1)}]}, "optimizer", tensors)
    assert list(tensors) == ["optimizer.state.0.m"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [object()]}, r"part\.a\.0 is a object, which a checkpoint cannot hold"),
        ({"a": {(1, 2): 3}}, r"part\.a is a dict"),
        ({1.5: 3}, r"part is a dict"),
        (b"bytes", r"part is a bytes"),
    ],
)
def test_what_would_need_pickle_is_refused(state: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        take_apart(state, "part", {})


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"$tensor": "gone"}, "does not fit its tensors: KeyError"),
        ({"$dict": [["a"]]}, "does not fit"),
        ({"$float": "big"}, "does not fit"),
        ({"a": 1}, "which is no part of a state"),
        ({}, "does not fit"),
    ],
)
def test_what_was_not_taken_apart_is_refused(stored: Any, message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        put_together(stored, {})


def test_places_whose_names_coincide_are_kept_apart() -> None:
    state = {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}, 0: torch.ones(2), "0": torch.ones(3)}
    back = there_and_back(state)
    assert back["a.b"] == 1 and back["a"]["b"] == 0
    assert (len(back[0]), len(back["0"])) == (2, 3)
