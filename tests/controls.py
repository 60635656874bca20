"""Negative controls: each replaces one named function, and a guarantee must then fail."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import count
from threading import Event
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from checkpointing.history import history
from data_service.batches import Batches
from data_service.loader import StepRows
from launch.editing import LiveData
from launch.reporting import Reporter
from launch.running import Keeper
from storage.log import Log
from trainer.schedule import learning_rate
from trainer.step import Flags

_calls = count()


def _keyless(*key: object) -> object:
    return nullcontext()


def _forgotten_rate(step: int, config: object) -> float:
    return learning_rate(next(_calls), config)  # type: ignore[arg-type]


def _forgotten_moments(training: object, tensors: object, numbers: object) -> None:
    return None


def _seeing_ahead(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float, is_causal: bool) -> Tensor:
    weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return nn.functional.dropout(weights, dropout_p) @ v


def _prompt_flags(keeper: Keeper) -> Flags:
    """Requests are looked for before every look at the flags, and not every five seconds."""
    if keeper._incarnation is not None:
        keeper.beat()
    return _flags(keeper)


def _whole_snapshots(keeper: Keeper, step: int, healthy: bool) -> None:
    """A snapshot to the local tier is waited for."""
    _save_locally(keeper, step, healthy)
    if keeper._local is not None:
        keeper._local.finish()


def _late_rows(data: LiveData, batches: Batches, step: int) -> Any:
    """On all ranks but the first, an edit changes the rows one step too late."""
    loader = _loaded(data, batches, step)
    before = getattr(data, "_loader", None) and data.batches
    if not before or not data._mine.start:
        return loader
    mine = (data._mine.start, data._mine.stop)
    told = iter([StepRows(before.rows(step, *mine), before.learn(step, *mine))])

    def late(at: int) -> Any:
        right = loader.next(at)
        return next(told, right)

    return SimpleNamespace(next=late, close=loader.close, waited_seconds=0.0)


def _failing(data: LiveData, step: int) -> StepRows:
    """On all ranks but the first, the data of the third step are an error of the program."""
    if data._mine.start and step == 2:
        raise ZeroDivisionError("in the data of step 3")
    return _next(data, step)


def _claim_at_once(store: object, log: Log, **clocks: object) -> int:
    """Whoever owns the run is taken for gone."""
    return history(log.refresh()).generation


def _hang(*arguments: object) -> None:
    """A store that answers no more."""
    Event().wait()


_flags, _save_locally, _loaded = Keeper.flags, Keeper.save_locally, LiveData._loaded
_next = LiveData.next

CONTROLS: dict[str, tuple[str, Callable[..., object]]] = {
    "fence": ("checkpointing.incarnation.refuse_if_fenced", lambda records, claim: None),
    "pdeathsig": ("launch.train.die_with_parent", lambda: None),
    "abandoned": ("launch.train.reporter", lambda: Reporter(None, 0)),
    "owner": ("checkpointing.incarnation._wait_until_free", _claim_at_once),
    "rng_key": ("trainer.step.keyed_randomness", _keyless),
    "cursor": ("trainer.state.resume_position", lambda batches, exact: 0),
    "scaler": ("trainer.state.restore_scaler", lambda scaler, state: None),
    "generators": ("trainer.state.restore_generators", lambda state: None),
    "moments": ("trainer.state.restore_optimizer", _forgotten_moments),
    "late_edit": ("launch.editing.LiveData._loaded", _late_rows),
    "prompt": ("launch.running.Keeper.flags", _prompt_flags),  # not broken: for tests of requests
    "whole_snapshots": ("launch.running.Keeper.save_locally", _whole_snapshots),  # nor this one
    "hung_save": ("checkpointing.save.write", _hang),  # not broken: for tests of deadlines
    "failing_rank": ("launch.editing.LiveData.next", _failing),  # nor this: a defect of a rank's
    "causal": ("torch.nn.functional.scaled_dot_product_attention", _seeing_ahead),
    "learning_rate": ("trainer.step.learning_rate", _forgotten_rate),
}


@contextmanager
def broken(control: str) -> Iterator[None]:
    """With one mechanism left out, or several: `one+another`."""
    global _calls
    _calls = count()
    with ExitStack() as stack:
        for name in control.split("+"):
            target, replacement = CONTROLS[name]
            stack.enter_context(patch(target, replacement))
        yield
