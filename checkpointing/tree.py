"""Takes nested state apart into named tensors and JSON, and puts it together again.

State is what PyTorch's `state_dict()` gives: dicts, lists and tuples of tensors, numbers, texts,
booleans and None. Nothing else is taken, so that nothing has to be pickled.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from storage.errors import ConfigurationError, IntegrityError

_DICT, _TUPLE, _TENSOR, _FLOAT = "$dict", "$tuple", "$tensor", "$float"


def take_apart(state: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The state as JSON; its tensors go into `tensors`, named by their place below `name`.

    Raises ConfigurationError, naming the place, for a value that is none of the above.
    """
    if isinstance(state, torch.Tensor):
        while name in tensors:  # `a.b` is also the place of b in a
            name += "'"
        tensors[name] = state
        return {_TENSOR: name}
    if isinstance(state, Mapping):
        items = [[k, take_apart(v, f"{name}.{k}", tensors)] for k, v in state.items()]
        if all(isinstance(key, str | int) for key, _ in items):
            return {_DICT: items}
    if isinstance(state, list | tuple):
        values = [take_apart(v, f"{name}.{i}", tensors) for i, v in enumerate(state)]
        return {_TUPLE: values} if isinstance(state, tuple) else values
    if isinstance(state, float) and not math.isfinite(state):
        return {_FLOAT: str(state)}
    if state is None or isinstance(state, bool | int | float | str):
        return state
    raise ConfigurationError(
        f"{name} is a {type(state).__name__}, which a checkpoint cannot hold; expected tensors, "
        "numbers, texts, booleans, None, and dicts, lists or tuples of them"
    )


def put_together(stored: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `take_apart` took apart. Raises IntegrityError when it was not made by it."""
    if isinstance(stored, list):
        return [put_together(value, tensors) for value in stored]
    if not isinstance(stored, dict):
        return stored
    try:
        [(kind, value)] = stored.items()
        if kind == _TENSOR:
            return tensors[value]
        if kind == _FLOAT:
            return float(value)
        if kind == _TUPLE:
            return tuple(put_together(one, tensors) for one in value)
        if kind == _DICT:
            return {key: put_together(one, tensors) for key, one in value}
    except (ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"the stored state does not fit its tensors: {error!r}") from error
    raise IntegrityError(f"the stored state has {kind!r}, which is no part of a state")
