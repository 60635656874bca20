import dataclasses
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from data_service.plan import parse_weights_flag
from data_service.shares import shares_of_steps
from launch.config import RunConfig, parse_config
from launch.presets import PRESETS
from storage.errors import ConfigurationError
from trainer.model import ModelConfig, parameter_count

GPT2_VOCABULARY = 50_257
BYTES_VOCABULARY = 257


def arguments(name: str) -> list[str]:
    """Those of a preset, with the sources that it needs."""
    names = [weights.partition("=")[0] for weights in PRESETS[name].get("weights", ())]
    return ["--preset", name, *(f"--data={one}=data/{one}" for one in names)]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_whole_configuration(name: str) -> None:
    config = parse_config(arguments(name))
    assert config.preset == name
    for section, fields in PRESETS[name].items():
        if section == "weights":
            assert config.weights == fields
            continue
        for field, value in fields.items():
            assert getattr(getattr(config, section), field) == value


def test_tiny_is_what_no_flag_gives() -> None:
    assert parse_config([]) == parse_config(["--preset=tiny"]) == RunConfig()


@pytest.mark.parametrize(
    ("name", "layers", "width", "parameters"),
    [("gpt2-124m", 12, 768, 124_439_808), ("gpt2-345m", 24, 1024, 354_823_168)],
)
def test_gpt2_sizes_are_those_of_the_released_weights(
    name: str, layers: int, width: int, parameters: int
) -> None:
    """Parameters as Hugging Face counts them in `gpt2` and `gpt2-medium`."""
    model = parse_config(["--preset", name]).model
    assert (model.n_layer, model.n_embd, model.context) == (layers, width, 1024)
    assert parameter_count(model, GPT2_VOCABULARY) == parameters


@pytest.mark.parametrize("name", ["gpt2-124m", "gpt2-345m"])
def test_gpt2_sizes_train_on_20_tokens_a_parameter(name: str) -> None:
    config = parse_config(["--preset", name])
    tokens = config.schedule.max_steps * config.batch.global_batch_size * config.model.context
    parameters = parameter_count(config.model, GPT2_VOCABULARY)
    assert tokens / parameters == pytest.approx(20, rel=0.01), "steps are rounded to hundreds"


def test_the_largest_course_size_has_10_7_million_parameters() -> None:
    model = parse_config(["--preset=course-medium"]).model
    assert parameter_count(model, BYTES_VOCABULARY) == pytest.approx(10.7e6, rel=0.02)


@pytest.mark.parametrize("name", PRESETS)
def test_virtual_ranks_take_equal_shares_of_whole_micro_batches(name: str) -> None:
    """Otherwise some processes would wait for others in every step."""
    batch = parse_config(arguments(name)).batch
    shares = {len(batch.share(rank)) for rank in range(batch.virtual_ranks)}
    assert len(shares) == 1 and shares.pop() % batch.micro_batch_size == 0


def test_a_preset_can_be_overridden() -> None:
    config = parse_config(["--preset=gpt2-124m", "--n_layer=3", "--max_steps=7"])
    assert config.model == dataclasses.replace(
        ModelConfig(**PRESETS["gpt2-124m"]["model"]), n_layer=3
    )
    assert config.schedule.max_steps == 7


@pytest.mark.parametrize("name", [name for name in PRESETS if "weights" in PRESETS[name]])
def test_a_recipe_names_the_sources_that_it_needs(name: str) -> None:
    names = sorted(weights.partition("=")[0] for weights in PRESETS[name]["weights"])
    missing = " ".join(f"--data {one}=URL" for one in names)
    with pytest.raises(ConfigurationError, match=f"{name} trains on .*: give {missing}; docs/rec"):
        parse_config(["--preset", name])


def test_rangeflow_gpt_takes_129_024_tokens_a_step() -> None:
    config = parse_config(arguments("c4"))
    assert config.batch.global_batch_size * config.model.context == 129_024
    assert parameter_count(config.model, GPT2_VOCABULARY) == 124_439_808


def test_c4_gives_way_to_the_mixture_by_a_linear_ramp() -> None:
    weights = [parse_weights_flag(text) for text in PRESETS["c4-to-mixture"]["weights"]]
    names = [name for name, _ in weights]
    table = shares_of_steps([points for _, points in weights], 0, 20_002)

    def at(step: int) -> dict[str, float]:
        return {n: share / 1e6 for n, share in zip(names, table[step], strict=True) if share}

    end = {"cosmopedia": 0.5, "alpaca": 0.3, "python": 0.2}
    assert at(0) == at(14_999) == {"c4": 1.0}
    assert at(15_000) == {"c4": 0.9, "cosmopedia": 0.05, "alpaca": 0.03, "python": 0.02}
    assert at(17_500) == pytest.approx(
        {"c4": 0.45} | {name: 0.55 * share for name, share in end.items()}, abs=1e-5
    )
    assert at(20_000) == at(20_001) == end


def test_the_commands_of_the_recipes_are_right() -> None:
    """Each recipe is trained by a command in `docs/recipes.md` that is taken as it stands."""
    text = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("torchrun")]
    # torchrun's own parser: that of Python 3.11 takes a `--run` for its `--run-path`
    asked = [get_args_parser().parse_args(words[1:]) for words in commands]
    assert {torchrun.training_script for torchrun in asked} == {"launch/train.py"}
    configs = [parse_config(torchrun.training_script_args) for torchrun in asked]
    assert {config.preset for config in configs if config} == {
        name for name in PRESETS if "weights" in PRESETS[name]
    }
