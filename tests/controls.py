"""Negative controls: each replaces one named function, and a guarantee must then fail."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from unittest.mock import patch

from trainer.schedule import learning_rate

_calls = count()


def _keyless(*key: object) -> object:
    return nullcontext()


def _forgotten_rate(step: int, config: object) -> float:
    return learning_rate(next(_calls), config)  # type: ignore[arg-type]


def _forgotten_moments(training: object, tensors: object, numbers: object) -> None:
    return None


CONTROLS: dict[str, tuple[str, Callable[..., object]]] = {
    "fence": ("checkpointing.incarnation.refuse_if_fenced", lambda records, claim: None),
    "rng_key": ("trainer.step.keyed_randomness", _keyless),
    "cursor": ("trainer.state.resume_position", lambda batches, exact: 0),
    "scaler": ("trainer.state.restore_scaler", lambda scaler, state: None),
    "moments": ("trainer.state.restore_optimizer", _forgotten_moments),
    "learning_rate": ("trainer.step.learning_rate", _forgotten_rate),
}


@contextmanager
def broken(control: str) -> Iterator[None]:
    """With one mechanism left out."""
    global _calls
    _calls = count()
    target, replacement = CONTROLS[control]
    with patch(target, replacement):
        yield
