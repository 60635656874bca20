import dataclasses

import pytest

from launch.config import RunConfig, parse_config
from launch.presets import PRESETS
from trainer.model import ModelConfig, parameter_count

GPT2_VOCABULARY = 50_257
BYTES_VOCABULARY = 257


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_whole_configuration(name: str) -> None:
    config = parse_config(["--preset", name])
    assert config.preset == name
    for section, fields in PRESETS[name].items():
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
    batch = parse_config(["--preset", name]).batch
    shares = {len(batch.share(rank)) for rank in range(batch.virtual_ranks)}
    assert len(shares) == 1 and shares.pop() % batch.micro_batch_size == 0


def test_a_preset_can_be_overridden() -> None:
    config = parse_config(["--preset=gpt2-124m", "--n_layer=3", "--max_steps=7"])
    assert config.model == dataclasses.replace(
        ModelConfig(**PRESETS["gpt2-124m"]["model"]), n_layer=3
    )
    assert config.schedule.max_steps == 7
