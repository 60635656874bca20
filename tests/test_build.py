import logging
from pathlib import Path

import pytest
import torch

from data_service.batches import Batches
from launch.build import build_training, settled
from launch.config import RunConfig, of_the_world, parse_config
from launch.world import World
from storage.errors import ConfigurationError
from tests.made_sources import made_source, plan_of

CPU = torch.device("cpu")
SHAPE = ("--n_embd=32", "--context=16", "--global_batch_size=8", "--virtual_ranks=4")


def batches_of(folder: Path, config: RunConfig) -> Batches:
    source = made_source(folder, "a", train=(4000,), validation=(400,))
    return Batches(
        plan=plan_of([source]),
        sources={"a": source},
        seed=config.seed,
        context=config.model.context,
        global_batch_size=config.batch.global_batch_size,
    )


def world(rank: int = 0, size: int = 1) -> World:
    """A place in a world; of several, only what needs no other process works."""
    alone = World(rank, 1, CPU, "none")
    alone.size = size
    return alone


def weights(config: RunConfig, batches: Batches) -> list[torch.Tensor]:
    return list(build_training(config, world(), batches).model.state_dict().values())


def test_auto_is_resolved_and_nothing_else_changes() -> None:
    config = parse_config(SHAPE)
    found = settled(config, world())
    assert found.numerics.precision == "fp32"
    assert parse_config([*SHAPE, "--precision=fp32"]) == found
    assert settled(found, world()) == found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_chosen_precision_is_kept(precision: str) -> None:
    config = parse_config([*SHAPE, f"--precision={precision}"])
    assert settled(config, world()) == config


def test_a_world_larger_than_the_virtual_ranks_is_refused() -> None:
    config = parse_config(SHAPE)
    assert settled(config, world(3, 4)).batch == config.batch
    message = "5 processes cannot share 4 virtual ranks: start at most 4, or a new run with more"
    with pytest.raises(ConfigurationError, match=message):
        settled(config, world(0, 5))


def test_the_seed_decides_the_first_weights(tmp_path: Path) -> None:
    config = parse_config([*SHAPE, "--seed=3"])
    batches = batches_of(tmp_path, config)
    one = weights(config, batches)
    torch.rand(7)  # what was drawn before does not matter
    two = weights(config, batches)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    other = weights(parse_config([*SHAPE, "--seed=4"]), batches)
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_step_is_as_configured(tmp_path: Path) -> None:
    flags = (*SHAPE, "--precision=fp16", "--cpu_threads=2", "--weight_decay=0.3", "--n_layer=1")
    config = settled(parse_config(flags), world())
    training = build_training(config, world(), batches_of(tmp_path, config))
    assert training.precision == "fp16" and training.scaler.is_enabled()
    assert training.forward is training.model, "not compiled"
    assert len(training.model.transformer.h) == 1
    assert training.model.transformer.wte.weight.shape == (320, 32), "257 bytes, padded"
    decays = [group["weight_decay"] for group in training.optimizer.param_groups]
    assert decays == [0.3, 0.0]
    assert torch.get_num_threads() == 2


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning")
def test_a_compiled_step_trains_the_same_model(tmp_path: Path) -> None:
    config = parse_config([*SHAPE, "--compile"])
    training = build_training(config, world(), batches_of(tmp_path, config))
    assert training.forward is not training.model
    assert training.forward._orig_mod is training.model  # type: ignore[attr-defined]


def test_the_operator_is_told_what_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = parse_config(SHAPE)
    with caplog.at_level(logging.INFO):
        build_training(config, world(), batches_of(tmp_path, config))
    (line,) = [r.getMessage() for r in caplog.records if r.name == "launch.build"]
    assert line == (
        "34,208 parameters, vocabulary 257 (padded to 320), fp32, 4 of 4 virtual ranks here, on cpu"
    )


def test_a_world_of_unlike_devices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config, place = parse_config(SHAPE), world(0, 2)
    other = {"device": "NVIDIA T4", "torch": torch.__version__}
    monkeypatch.setattr(place, "gather", lambda value: [value, [other, value[1]]])
    with pytest.raises(ConfigurationError, match=r"need the same device .* rank 1 has .*T4"):
        settled(config, place)


NO_KERNEL = [("--attention=efficient",), ("--attention=flash", "--dropout=.1")]


@pytest.mark.parametrize("flags", NO_KERNEL)
def test_an_attention_without_a_kernel_is_refused_before_the_first_step(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    config = parse_config([*SHAPE, *flags])
    message = (
        "attention '.*' does not work here: .* for cpu, fp32 and dropout .*Choose auto or math"
    )
    with pytest.raises(ConfigurationError, match=message):
        build_training(config, world(), batches_of(tmp_path, config))


def test_a_chosen_attention_that_works_changes_no_random_number(tmp_path: Path) -> None:
    config = parse_config([*SHAPE, "--attention=math", "--dropout=.1"])
    before = torch.random.get_rng_state()
    build_training(config, world(), batches_of(tmp_path, config))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--seed=1",), "seed 1, rank 0 with 0"),
        (("--dropout=0.2",), "model.dropout 0.2, rank 0 with 0.0"),
        (("--virtual_ranks=2",), "batch.virtual_ranks 2, rank 0 with 4"),
        (("--max_steps=9",), "schedule.max_steps 9"),
        (("--save_interval_steps=9",), "loop.save_interval_steps 9"),
        (("--wait_for_saves",), "wait_for_saves True"),
        (("--local_tier=/dev/shm/x",), "local_tier True, rank 0 with False"),
        (("--data=a=/x",), r"data \[\['a', 1000000\]\], rank 0 with \[\]"),
    ],
)
def test_a_world_of_unlike_configurations_is_refused(
    flags: tuple[str, ...], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same shapes each rank would train its part in its own way, and nothing would show."""
    place, theirs = world(0, 2), of_the_world(parse_config([*SHAPE, *flags]))
    monkeypatch.setattr(place, "gather", lambda value: [value, [value[0], theirs]])
    with pytest.raises(ConfigurationError, match=f"rank 1 was started with {named}"):
        settled(parse_config(SHAPE), place)


def test_hosts_may_have_their_files_at_different_places(monkeypatch: pytest.MonkeyPatch) -> None:
    here = [*SHAPE, "--run=/a", "--data=a=/x:2", "--local_tier=/b", "--cache_dir=/c"]
    there = [*SHAPE, "--run=/d", "--data=a=/y:2", "--local_tier=/e", "--cache_dir=/f"]
    place, theirs = world(0, 2), of_the_world(parse_config(there))
    monkeypatch.setattr(place, "gather", lambda value: [value, [value[0], theirs]])
    config = parse_config(here)
    assert settled(config, place).data == config.data
