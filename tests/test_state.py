"""What a checkpoint holds of training comes back bit for bit, and nothing else is accepted."""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from checkpointing.history import Checkpoint
from checkpointing.load import Loaded
from checkpointing.save import TrainingState
from data_service.batches import Batches
from launch.build import build_training
from launch.config import RunConfig
from launch.world import World
from storage.canonical import canonical_json
from storage.errors import DataError, IntegrityError
from tests.made_sources import made_source, plan_of
from trainer.model import ModelConfig
from trainer.numerics import NumericsConfig
from trainer.optimizer import OptimizerConfig
from trainer.schedule import ScheduleConfig
from trainer.state import (
    capture,
    generators,
    restore_generators,
    restore_state,
    resume_position,
    unsaid,
    with_unsaid,
)
from trainer.step import BatchConfig, Flags, TrainStep

CONTEXT = 8
SEED = 5


@pytest.fixture(autouse=True)
def same_generators() -> Iterator[None]:
    """The generators of the process as they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    source = made_source(tmp_path_factory.mktemp("sources"), "made")
    return Batches(
        plan=plan_of([source]),
        sources={"made": source},
        seed=SEED,
        context=CONTEXT,
        global_batch_size=4,
    )


def made(batches: Batches, **choices: Any) -> TrainStep:
    """A step as `launch` builds it."""
    config = RunConfig(
        seed=SEED,
        model=ModelConfig(n_layer=1, n_head=2, n_embd=32, context=CONTEXT, dropout=0.1),
        optimizer=OptimizerConfig(optimizer=choices.get("optimizer", "adamw")),
        schedule=ScheduleConfig(max_steps=20, warmup_steps=2),
        batch=BatchConfig(global_batch_size=4, micro_batch_size=2, virtual_ranks=2),
        numerics=NumericsConfig(precision=choices.get("precision", "fp32")),
    )
    return build_training(config, World(0, 1, torch.device("cpu"), "none"), batches)


def made_otherwise(batches: Batches, **choices: Any) -> TrainStep:
    """The same, and then all that a checkpoint must bring back is changed."""
    training = made(batches, **choices)
    train(training, batches, range(7, 9))
    return training


def train(training: TrainStep, batches: Batches, steps: range) -> list[float]:
    return [
        training.run(
            step,
            torch.from_numpy(batches.batch(step)),
            flags=Flags,
            announce=lambda phase: None,
        ).loss
        for step in steps
    ]


def captured(training: TrainStep, batches: Batches, step: int) -> TrainingState:
    return capture(training, step, batches=batches, seed=SEED)


def read_back(state: TrainingState) -> Loaded:
    """What `load` gives of a saved state: tensors from safetensors, the rest from JSON."""
    copies = {name: tensor.clone() for name, tensor in state.tensors.items()}
    checkpoint = Checkpoint(
        index=0,
        step=state.exact["step"],
        generation=1,
        digest="",
        manifest_key="",
        manifest_sha256="",
        parent=None,
        healthy=True,
        validation_loss=None,
        written_at=0.0,
    )
    return Loaded(
        checkpoint=checkpoint,
        tensors=safetensors.torch.load(safetensors.torch.save(copies)),
        exact=json.loads(json.dumps(state.exact)),
        extra=json.loads(json.dumps(state.extra)),
    )


def restored(training: TrainStep, loaded: Loaded, batches: Batches, seed: int = SEED) -> int:
    return restore_state(training, loaded, batches=batches, seed=seed)


@pytest.fixture
def loaded(batches: Batches) -> Loaded:
    """A checkpoint of two steps."""
    training = made(batches)
    train(training, batches, range(2))
    return read_back(captured(training, batches, 2))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_captured_and_restored_training_has_the_same_bits(
    optimizer: str, precision: str, batches: Batches
) -> None:
    unbroken = made(batches, optimizer=optimizer, precision=precision)
    train(unbroken, batches, range(3))
    loaded = read_back(captured(unbroken, batches, 3))
    losses = train(unbroken, batches, range(3, 6))
    end = read_back(captured(unbroken, batches, 6))

    resumed = made_otherwise(batches, optimizer=optimizer, precision=precision)
    assert restored(resumed, loaded, batches) == 3
    assert resume_position(batches, loaded.exact) == 3
    again = read_back(captured(resumed, batches, 3))
    assert_same(again, loaded)
    assert train(resumed, batches, range(3, 6)) == losses
    assert_same(read_back(captured(resumed, batches, 6)), end)


def assert_same(one: Loaded, other: Loaded) -> None:
    assert one.exact == other.exact
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.dtype == other.tensors[name].dtype, name
        assert torch.equal(tensor, other.tensors[name]), name


def test_a_checkpoint_before_the_first_step_can_be_restored(batches: Batches) -> None:
    loaded = read_back(captured(made(batches), batches, 0))
    training = made_otherwise(batches)
    assert restored(training, loaded, batches) == 0
    assert train(training, batches, range(2)) == train(made(batches), batches, range(2))


def test_the_loss_scale_comes_back(batches: Batches) -> None:
    training = made(batches, precision="fp16")
    training.scaler.load_state_dict(training.scaler.state_dict() | {"scale": 8.0})
    train(training, batches, range(3))
    state = training.scaler.state_dict()
    assert (state["scale"], state["_growth_tracker"]) == (8.0, 3)
    other = made(batches, precision="fp16")
    restored(other, read_back(captured(training, batches, 3)), batches)
    train(other, batches, range(3, 4))
    assert other.scaler.state_dict() == state | {"_growth_tracker": 4}


DRAWS: dict[str, Callable[[], list[float]]] = {
    "torch": lambda: torch.randn(3).tolist(),
    "numpy": lambda: [np.random.standard_normal(), *np.random.random_sample(3).tolist()],
    "python": lambda: [random.gauss(0.0, 1.0), random.random()],
}


@pytest.mark.parametrize("generator", DRAWS)
@pytest.mark.parametrize("before", [0, 1, 700])
def test_generators_go_on_where_they_were(generator: str, before: int) -> None:
    """Also in the middle of a pair of normal numbers, and after their tables were refilled."""
    draw = DRAWS[generator]
    for _ in range(before):
        draw()
    states = json.loads(json.dumps(generators()))
    expected = [draw() for _ in range(5)]
    for other in DRAWS.values():
        other()
    restore_generators(states)
    assert [draw() for _ in range(5)] == expected
    restore_generators(states)
    assert json.loads(json.dumps(generators())) == states


def test_restoring_puts_the_generators_back_last(batches: Batches, loaded: Loaded) -> None:
    training = made(batches)
    torch.rand(3)
    restored(training, loaded, batches)
    assert json.loads(json.dumps(generators())) == loaded.extra["generators"]


def test_the_state_names_the_cursor_that_its_commit_will_say(batches: Batches) -> None:
    state = captured(made(batches), batches, 3)
    whole = batches.cursor(3)
    assert state.exact["cursor"] == whole
    assert state.cursor == {"plan": whole["plan"], "digest": whole["digest"]}


def test_a_capture_shares_memory_with_the_model(batches: Batches) -> None:
    """As its docstring says: whoever keeps it beside training must copy."""
    training = made(batches)
    name, parameter = next(training.model.named_parameters())
    tensor = captured(training, batches, 0).tensors[f"model.{name}"]
    assert tensor.data_ptr() == parameter.data_ptr()


@pytest.mark.parametrize("item", ["step", "cursor", "scaler", "seed", "optimizer"])
def test_a_missing_item_is_refused(item: str, batches: Batches, loaded: Loaded) -> None:
    del loaded.exact[item]
    names = re.escape(str(sorted(loaded.exact)))
    with pytest.raises(IntegrityError, match=f"the checkpoint holds {names}, expected "):
        restored(made(batches), loaded, batches)


def test_an_unexpected_item_is_refused(batches: Batches, loaded: Loaded) -> None:
    loaded.exact["weather"] = "fine"
    with pytest.raises(IntegrityError, match=r"the checkpoint holds .*'weather'.*, expected "):
        restored(made(batches), loaded, batches)


def test_another_seed_is_refused(batches: Batches, loaded: Loaded) -> None:
    with pytest.raises(IntegrityError, match="the checkpoint is of seed 5, the run of seed 6"):
        restored(made(batches), loaded, batches, seed=6)


WEIGHT = "transformer.h.0.ln_1.weight"


def _leave_out(tensors: dict[str, Tensor]) -> None:
    del tensors[f"model.{WEIGHT}"]


def _put_in(tensors: dict[str, Tensor]) -> None:
    tensors["model.lm_head.weight"] = torch.zeros(1)


def _cut(tensors: dict[str, Tensor]) -> None:
    tensors[f"model.{WEIGHT}"] = tensors[f"model.{WEIGHT}"][:31]


def _round(tensors: dict[str, Tensor]) -> None:
    tensors[f"model.{WEIGHT}"] = tensors[f"model.{WEIGHT}"].bfloat16()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_leave_out, f"do not have the same weights: {WEIGHT}$"),
        (_put_in, "do not have the same weights: lm_head.weight$"),
        (_cut, rf"{WEIGHT} is torch.float32 \[31\] in the checkpoint, expected torch.float32 \[32"),
        (_round, rf"{WEIGHT} is torch.bfloat16 \[32\] in the checkpoint, expected torch.float32"),
    ],
)
def test_other_weights_are_refused(
    change: Callable[[dict[str, Tensor]], None], message: str, batches: Batches, loaded: Loaded
) -> None:
    change(loaded.tensors)
    with pytest.raises(IntegrityError, match=message):
        restored(made(batches), loaded, batches)


def _drop(item: str) -> Callable[[Loaded], None]:
    def change(loaded: Loaded) -> None:
        del loaded.tensors[f"optimizer.{WEIGHT}.{item}"]

    return change


def _set(item: str, value: Tensor) -> Callable[[Loaded], None]:
    return lambda loaded: loaded.tensors.update({f"optimizer.{item}": value})


def _drop_all(loaded: Loaded) -> None:
    for name in [name for name in loaded.tensors if name.startswith("optimizer.")]:
        del loaded.tensors[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("exp_avg"), rf"same state: {WEIGHT}\.exp_avg$"),
        (_drop("exp_avg_sq"), rf"same state: {WEIGHT}\.exp_avg_sq$"),
        (_drop("step"), rf"same state: {WEIGHT}\.step$"),
        (_drop_all, "has no optimizer state, and is not of step 0"),
        (_set(f"{WEIGHT}.other", torch.zeros(1)), rf"same state: {WEIGHT}\.other$"),
        (_set("lm_head.weight.exp_avg", torch.zeros(1)), r"same state: lm_head\.weight\.exp_avg$"),
        (
            _set(f"{WEIGHT}.exp_avg", torch.zeros(1)),
            rf"{WEIGHT}\.exp_avg is torch\.float32 \[1\] in the checkpoint, not torch\.float32",
        ),
        (_set(f"{WEIGHT}.exp_avg", torch.zeros(32).double()), r"is torch\.float64 \[32\]"),
        (
            lambda loaded: loaded.exact["optimizer"].update({f"{WEIGHT}.other": 1}),
            rf"same state: {WEIGHT}\.other$",
        ),
        (lambda loaded: loaded.tensors.update({"other.x": torch.zeros(1)}), "expected others"),
        (lambda loaded: loaded.extra.pop("generators"), "lacks the state of generators"),
        (
            lambda loaded: loaded.extra["generators"].pop("numpy"),
            "lacks the state of generators: 'numpy'",
        ),
    ],
)
def test_state_that_is_missing_unexpected_or_of_another_kind_is_refused(
    change: Callable[[Loaded], None], message: str, batches: Batches, loaded: Loaded
) -> None:
    change(loaded)
    with pytest.raises(IntegrityError, match=message):
        restored(made(batches), loaded, batches)


def test_a_cursor_of_another_step_is_refused(batches: Batches, loaded: Loaded) -> None:
    exact = {**loaded.exact, "step": 7}
    with pytest.raises(IntegrityError, match="the cursor is of step 2, the checkpoint of 7"):
        resume_position(batches, exact)


@pytest.mark.parametrize(("saved", "run"), [("fp16", "fp32"), ("fp32", "fp16")])
def test_a_scaler_on_one_side_only_is_refused(saved: str, run: str, batches: Batches) -> None:
    loaded = read_back(captured(made(batches, precision=saved), batches, 0))
    with pytest.raises(IntegrityError, match="do not agree on whether a scaler is used"):
        restored(made(batches, precision=run), loaded, batches)


def test_a_cursor_that_the_data_does_not_give_is_refused(
    batches: Batches, loaded: Loaded, tmp_path: Path
) -> None:
    source = made_source(tmp_path, "made", start=1)
    other = Batches(
        plan=plan_of([source]),
        sources={"made": source},
        seed=SEED,
        context=CONTEXT,
        global_batch_size=4,
    )
    with pytest.raises(DataError, match="the data does not continue the checkpoint at step 2"):
        resume_position(other, loaded.exact)


def test_what_a_step_has_not_said_is_in_its_checkpoint(batches: Batches) -> None:
    """Also a loss that is not a number; and it changes no digest, which `extra` has no part in."""
    state = TrainingState(tensors={}, exact={"step": 3}, extra={"generators": {}})
    row = {"step": 3, "loss": 0.1 + 0.2, "gradient_norm": float("inf"), "tokens/a": 5}
    kept = with_unsaid(state, row)
    canonical_json(dict(kept.extra))
    parts: Any = {"checkpoint": None, "tensors": {}, "exact": kept.exact}
    assert unsaid(Loaded(**parts, extra=dict(kept.extra))) == row
    assert unsaid(Loaded(**parts, extra=dict(state.extra))) is None
    assert (kept.exact, kept.tensors) == (state.exact, state.tensors)
