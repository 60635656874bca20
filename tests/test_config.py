import dataclasses
import json
import re
from pathlib import Path

import pytest

from data_service.plan import parse_weights_flag
from launch.config import KINDS, RunConfig, fields_of_kind, parse_config
from launch.train import main
from storage.errors import ConfigurationError


@pytest.fixture
def toml(tmp_path: Path) -> "Toml":
    return Toml(tmp_path / "run.toml")


class Toml:
    """Writes a configuration file; parses it together with flags."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def parse(self, text: str, *flags: str) -> RunConfig:
        self.path.write_text(text)
        return parse_config([*flags, "--config", str(self.path)])


def leaves(config: RunConfig) -> dict[str, object]:
    """Every field by its dotted name."""
    found: dict[str, object] = {}
    for name, value in dataclasses.asdict(config).items():
        found |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {}
        found |= {} if isinstance(value, dict) else {name: value}
    return found


def test_a_file_wins_over_the_preset_and_a_flag_over_both(toml: Toml) -> None:
    text = "[model]\nn_layer = 5\nn_head = 4\n[schedule]\nmax_steps = 9"
    config = toml.parse(text, "--preset=gpt2-124m", "--n_layer=7")
    assert config.model.n_layer == 7, "the flag"
    assert (config.model.n_head, config.schedule.max_steps) == (4, 9), "the file"
    assert (config.model.n_embd, config.schedule.learning_rate) == (768, 6e-4), "the preset"
    assert config.schedule.warmup_steps == 200, "the preset, in a section that the file names"


def test_the_file_may_name_the_preset_and_the_flag_wins(toml: Toml) -> None:
    text = "preset = 'course-small'"
    assert toml.parse(text).model.n_embd == 256
    assert toml.parse(text).preset == "course-small"
    chosen = toml.parse(text, "--preset=course-medium")
    assert (chosen.model.n_embd, chosen.preset) == (384, "course-medium")


@pytest.mark.parametrize("flags", [("--max_steps=3",), ("--max-steps=3",), ("--max-steps", "3")])
def test_flags_are_written_with_underscores_or_hyphens(flags: tuple[str, ...]) -> None:
    assert parse_config(flags).schedule.max_steps == 3


def test_the_last_of_a_repeated_flag_wins() -> None:
    config = parse_config(["--preset=tiny", "--n_layer=1", "--preset", "course-small"])
    assert (config.preset, config.model.n_layer, config.model.n_embd) == ("course-small", 1, 256)
    assert parse_config(["--max_steps=3", "--max_steps=4"]).schedule.max_steps == 4


def test_data_and_accepted_changes_are_repeatable() -> None:
    arguments = ["--data", "a=x:1", "--data=b=y", "--accept_change=seed", "--accept-change", "bias"]
    config = parse_config(arguments)
    assert (config.data, config.accept_change) == (("a=x:1", "b=y"), ("seed", "bias"))


def test_the_short_names_of_the_contract_are_flags() -> None:
    contract = (
        *("--run=r", "--preset=tiny", "--data=a=b", "--max_steps=3", "--global_batch_size=8"),
        *("--micro_batch_size=2", "--learning_rate=0.1", "--eval_interval_steps=3"),
        *("--save_interval_steps=4", "--keep_last=5", "--virtual_ranks=2", "--seed=6"),
    )
    config = parse_config(contract)
    assert (config.run, config.retention.keep_last, config.seed) == ("r", 5, 6)
    assert config.schedule.learning_rate == 0.1
    assert config.loop.save_interval_steps == 4


def test_every_field_is_of_a_kind() -> None:
    fields = leaves(RunConfig())
    assert {name for name in fields if KINDS.get(name.partition(".")[0]) is None} == set()
    known = {*fields, *(name.partition(".")[0] for name in fields)}
    assert set(KINDS) <= known, "a kind of a field that does not exist"
    assert set(KINDS.values()) == {"identity", "schedule", "runtime"}


def test_each_field_is_of_exactly_one_kind() -> None:
    config = parse_config(["--data=a=b", "--accept_change=seed"])
    kinds = [fields_of_kind(config, kind) for kind in ("identity", "schedule", "runtime")]
    assert sorted(name for kind in kinds for name in kind) == sorted(leaves(config))
    merged = {name: value for kind in kinds for name, value in kind.items()}
    assert json.loads(json.dumps(merged)) == merged, "it is JSON, and stays the same as JSON"
    assert merged["data"] == ["a=b"]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("identity", {"seed", "model.dropout", "batch.virtual_ranks", "numerics.precision"}),
        ("identity", {"optimizer.beta1", "numerics.cpu_threads", "loop.eval_micro_batch_size"}),
        ("schedule", {"data", "schedule.max_steps", "schedule.learning_rate"}),
        (
            "runtime",
            {"run", "retention.keep_last", "loop.save_interval_steps", "loop.eval_windows"},
        ),
    ],
)
def test_kinds_are_those_of_the_design(kind: str, names: set[str]) -> None:
    assert names <= set(fields_of_kind(RunConfig(), kind))


def test_names_of_flags_are_unique_over_the_sections() -> None:
    """Because flags leave out the section."""
    names = [name.rpartition(".")[2] for name in leaves(RunConfig())]
    assert sorted(names) == sorted(set(names))


def test_the_file_may_say_1_for_1_0_and_a_list_for_many(toml: Toml) -> None:
    config = toml.parse("data = ['a=x']\n[optimizer]\nclip_norm = 1\n[schedule]\nlearning_rate = 1")
    assert config.data == ("a=x",)
    assert (config.optimizer.clip_norm, config.schedule.learning_rate) == (1.0, 1.0)
    assert type(config.optimizer.clip_norm) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps = 3", r"run\.toml: no field 'max_steps'; there are run, .*, schedule, "),
        ("[model]\nlayers = 3", r"run\.toml, \[model\]: no field 'layers'; there are n_layer, "),
        ("[models]\nn_layer = 3", r"run\.toml: no field 'models'; there are run, "),
        ("run = 3", r"run\.toml: run is 3, expected a text$"),
        ("[model]\nn_layer = 2.5", r"\[model\]: n_layer is 2\.5, expected a whole number$"),
        ("[model]\nbias = 1", r"\[model\]: bias is 1, expected true or false$"),
        ("seed = true", r"seed is True, expected a whole number$"),
        ("[schedule]\nmax_steps = '9'", r"max_steps is '9', expected a whole number$"),
        ("data = 'a=b'", r"data is 'a=b', expected a list of texts$"),
        ("model = 3", r"run\.toml: model is 3, expected a section$"),
        ("[seed]\nx = 3", r"run\.toml: seed is \{'x': 3\}, expected a whole number$"),
        ("[schedule]\nlearning_rate = '1'", r"learning_rate is '1', expected a number$"),
        ("[schedule]\nlearning_rate = true", r"learning_rate is True, expected a number$"),
        ("data = ['a=b', 3]", r"data is \['a=b', 3\], expected a list of texts$"),
        ("[loop]\nsample_prompts = 'a'", r"sample_prompts is 'a', expected a list of texts$"),
        ("[[model]]\nn_layer = 2", r"model is \[\{'n_layer': 2\}\], expected a section$"),
        ("[optimizer]\noptimizer = 'sgd'", r"\[optimizer\]: optimizer is 'sgd', expected "),
        ("[model]\nattention = 'x'", r"\[model\]: attention is 'x', expected "),
        ("preset = ['tiny']", r"run\.toml: preset is \['tiny'\], expected a text$"),
        ("a = = b", r"--config .*run\.toml is not TOML: Invalid value \(at line 1, column 5\)"),
        ("preset = 'huge'", r"no preset 'huge'; there are tiny, course-tiny, .*, gpt2-345m"),
    ],
)
def test_a_wrong_file_is_refused_naming_the_place(toml: Toml, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        toml.parse(text)


def test_a_file_that_is_not_text_is_refused(toml: Toml) -> None:
    toml.path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match=r"run\.toml is not TOML: 'utf-8' codec"):
        parse_config(["--config", str(toml.path)])


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"--config no/such\.toml: No such file"):
        parse_config(["--config=no/such.toml"])


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no preset 'huge'; there are tiny, "):
        parse_config(["--preset", "huge"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--keep_last=1", "keep_last must be at least 2, because the newest .*; got 1"),
        ("--seed=-1", "seed must be from 0 to 2"),
    ],
)
def test_a_value_that_cannot_be_is_refused(flag: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_config([flag])


def test_help_shows_an_example_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "torchrun --nproc_per_node=4 -- launch/train.py --run gs://" in shown
    for code in ("0 complete", "75 start again", "76 fenced", "78 change something", "70 a defect"):
        assert code in re.sub(r"\s+", " ", shown)
    for name in leaves(RunConfig()):
        assert f"--{name.rpartition('.')[2]}" in shown


def test_help_is_no_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_config(["--preset=course-small", "--help"]) is None
    assert "(default: 256)" in capsys.readouterr().out, "defaults are those of the preset"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--no_such_flag=3", "Unrecognized options: --no_such_flag=3"),
        ("--max_steps=many", "Error parsing --max_steps: invalid literal .* 'many'"),
        ("--precision=8", "invalid choice '8' for argument '--precision'"),
        ("--n_layer", "Missing value for argument '--n_layer'"),
        ("runs/x", "Unrecognized options: runs/x"),
    ],
)
def test_a_wrong_flag_is_one_line_naming_it_and_exits_78(
    flag: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_config([flag])
    assert capsys.readouterr() == ("", "")
    assert main([flag]) == 78
    shown = capsys.readouterr()
    assert re.fullmatch(rf"error: .*{message}.*\n", shown.err) and shown.out == ""


def test_data_flags_win_over_the_data_of_a_file(toml: Toml) -> None:
    text = "data = ['a=x', 'c=z']"
    assert toml.parse(text).data == ("a=x", "c=z")
    assert toml.parse(text, "--data=b=y").data == ("b=y",)
    assert toml.parse(text, "--data", "b=y", "--data=d=w").data == ("b=y", "d=w")


def test_only_the_whole_of_file_and_flags_is_judged(toml: Toml) -> None:
    text = "[batch]\nglobal_batch_size = 2"
    config = toml.parse(text, "--virtual_ranks=2")
    assert config.batch.global_batch_size == 2
    with pytest.raises(ConfigurationError, match="global_batch_size must be at least virtual_rank"):
        toml.parse(text)


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("[model]\nbias = false", (), False),
        ("[model]\nbias = true", (), True),
        ("[model]\nbias = false", ("--bias",), True),
        ("[model]\nbias = true", ("--no_bias",), False),
        ("[model]\nbias = true", ("--no-bias",), False),
    ],
)
def test_a_file_says_yes_or_no_and_a_flag_wins(
    text: str, flags: tuple[str, ...], expected: bool, toml: Toml
) -> None:
    assert toml.parse(text, *flags).model.bias is expected


def test_a_files_list_of_texts_may_be_empty_and_a_flag_replaces_it(toml: Toml) -> None:
    text = "[loop]\nsample_prompts = ['def f(', '', ' a b']"
    assert toml.parse(text).loop.sample_prompts == ("def f(", "", " a b")
    assert toml.parse(text, "--sample_prompts", "x").loop.sample_prompts == ("x",)
    assert toml.parse("[loop]\nsample_prompts = []").loop.sample_prompts == ()


def test_every_field_may_stand_in_a_file(toml: Toml) -> None:
    """Each with the value that it has by default, written as TOML writes it."""
    config = dataclasses.asdict(RunConfig(data=("a=x:1", "b=y")))
    lines = [line_of(name, v) for name, v in config.items() if not isinstance(v, dict)]
    for section, fields in config.items():
        if isinstance(fields, dict):
            lines += [f"[{section}]", *(line_of(name, value) for name, value in fields.items())]
    found = toml.parse("\n".join(lines))
    assert found == RunConfig(data=("a=x:1", "b=y"), config=str(toml.path))


def line_of(name: str, value: object) -> str:
    """A field in TOML, which writes these values as JSON does."""
    return f"{name} = {json.dumps(value)}"


def test_texts_of_a_list_in_a_file_are_never_flags(toml: Toml) -> None:
    config = toml.parse("[loop]\nsample_prompts = ['--help', '--seed=5', '-x']")
    assert config.loop.sample_prompts == ("--help", "--seed=5", "-x")
    assert config.seed == 0


def test_weights_over_steps_are_given_by_name_and_the_last_wins(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('data = ["a=x/a", "b=x/b"]\nweights = ["a=1,0@50", "b=0.5"]\n')
    config = parse_config(["--config", str(file), "--weights=b=0@10,2@50"])
    assert config is not None
    assert config.weights == ("a=1,0@50", "b=0.5", "b=0@10,2@50")
    assert fields_of_kind(config, "schedule")["weights"] == list(config.weights)
    parsed = dict(parse_weights_flag(text) for text in config.weights)
    assert parsed == {"a": ((0, 1_000_000), (50, 0)), "b": ((10, 0), (50, 2_000_000))}
    embedded = parse_config(["--weights=python=2"])
    assert embedded is not None and embedded.weights == ("python=2",)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("c=1", "--weights c: there is no such source; there are a$"),
        ("a", "--weights must be NAME=WEIGHT or .*; got 'a'"),
        ("a=1,2", "--weights must be NAME=WEIGHT or"),
        ("a=1@5@6", "--weights must be NAME=WEIGHT or"),
        ("a=1@x", "--weights must be NAME=WEIGHT or"),
        ("a=1@99999999", "--weights must be NAME=WEIGHT or"),
        ("a=x@5", "a weight must be a number such as 0.3 or 2; got 'x'"),
        ("../a=1", "a source's name must be"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_config(["--data=a=x/a", f"--weights={weights}"])


@pytest.mark.parametrize("seconds", ["1", "-3", "nan", "inf"])
def test_a_grace_too_short_to_leave_in_is_refused(
    seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"--grace_seconds={seconds}"]) == 78
    assert "grace_seconds must be a number above 1, the second that" in capsys.readouterr().err
