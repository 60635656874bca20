"""Training state as a checkpoint holds it, and back: one function for each part.

Every part is named in exactly one place for saving and one for restoring; a missing or an
unexpected item is an error, never a default.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from checkpointing.generators import generators, restore_generators
from checkpointing.load import Loaded
from checkpointing.save import TrainingState
from data_service.batches import Batches
from data_service.recorded import committed_cursor
from storage.errors import IntegrityError
from trainer.model import GPT
from trainer.optimizer import load_optimizer_state, optimizer_state
from trainer.step import TrainStep


def capture(training: TrainStep, step: int, *, batches: Batches, seed: int) -> TrainingState:
    """The state after `step` finished steps. Its tensors are not copies."""
    names: dict[Tensor, str] = {p: name for name, p in training.model.named_parameters()}
    tensors, numbers = optimizer_state(training.optimizer, names)
    model = training.model.state_dict()
    cursor = batches.cursor(step)
    return TrainingState(
        tensors={f"model.{name}": tensor for name, tensor in model.items()}
        | {f"optimizer.{name}": tensor for name, tensor in tensors.items()},
        exact={
            "step": step,
            "cursor": cursor,
            "scaler": training.scaler.state_dict(),
            "seed": seed,
            "optimizer": numbers,
        },
        extra={
            "generators": generators(),
            "vocab_size": batches.vocab_size,
            "tokenizer": batches.tokenizer.spec(),
        },
        cursor=committed_cursor(cursor),
    )


def restore_state(training: TrainStep, loaded: Loaded, *, batches: Batches, seed: int) -> int:
    """Put everything back; returns the number of finished steps. Generators come last."""
    exact = loaded.exact
    expected = {"step", "cursor", "scaler", "seed", "optimizer"}
    if exact.keys() != expected:
        raise IntegrityError(f"the checkpoint holds {sorted(exact)}, expected {sorted(expected)}")
    if exact["seed"] != seed:
        raise IntegrityError(f"the checkpoint is of seed {exact['seed']}, the run of seed {seed}")
    parts = {name.partition(".")[0] for name in loaded.tensors}
    if not parts <= {"model", "optimizer"}:
        raise IntegrityError(f"the checkpoint holds tensors of {sorted(parts)}, expected others")
    restore_model(training.model, _part(loaded.tensors, "model."))
    restore_scaler(training.scaler, exact["scaler"])
    moments = _part(loaded.tensors, "optimizer.")
    if exact["step"] and not moments and not training.scaler.is_enabled():  # it may skip all steps
        raise IntegrityError("the checkpoint has no optimizer state, and is not of step 0")
    restore_optimizer(training, moments, exact["optimizer"])
    try:
        restore_generators(loaded.extra["generators"])
    except KeyError as error:
        raise IntegrityError(f"the checkpoint lacks the state of generators: {error}") from error
    return int(exact["step"])


def with_unsaid(state: TrainingState, row: Mapping[str, Any]) -> TrainingState:
    """The state with the row of its step, which has yet to be completed and recorded."""
    return replace(state, extra={**state.extra, "unsaid": json.dumps(dict(row))})  # it may have NaN


def unsaid(loaded: Loaded) -> dict[str, Any] | None:
    """The row that `with_unsaid` added, None where all was said."""
    row = loaded.extra.get("unsaid")
    return None if row is None else dict(json.loads(row))


def resume_position(batches: Batches, exact: Mapping[str, Any]) -> int:
    """The step whose batch comes next, from the cursor, which is recomputed and compared."""
    position = batches.check_cursor(exact["cursor"])
    if position != exact["step"]:
        raise IntegrityError(f"the cursor is of step {position}, the checkpoint of {exact['step']}")
    return position


def restore_model(model: GPT, tensors: Mapping[str, Tensor]) -> None:
    """Load the weights, every one and no other."""
    own = model.state_dict()
    if own.keys() != tensors.keys():
        names = ", ".join(sorted(own.keys() ^ tensors.keys())[:5])
        raise IntegrityError(f"the checkpoint and the model do not have the same weights: {names}")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape or tensor.dtype != tensors[name].dtype:
            raise IntegrityError(
                f"{name} is {tensors[name].dtype} {list(tensors[name].shape)} in the checkpoint, "
                f"expected {tensor.dtype} {list(tensor.shape)}"
            )
        tensor.copy_(tensors[name])


def restore_optimizer(
    training: TrainStep, tensors: Mapping[str, Tensor], numbers: Mapping[str, int | float]
) -> None:
    """Load the moments and the counters of the optimizer."""
    parameters = dict(training.model.named_parameters())
    load_optimizer_state(training.optimizer, parameters, tensors, numbers)


def restore_scaler(scaler: torch.amp.GradScaler, state: Mapping[str, Any]) -> None:
    """Load the loss scale and how long it has been good."""
    if bool(state) != scaler.is_enabled():
        raise IntegrityError("the checkpoint and the run do not agree on whether a scaler is used")
    scaler.load_state_dict(dict(state))


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
