"""The configuration of a run: a preset, then a TOML file, then flags; the later wins.

Every field is of one of three kinds. *Identity* decides bits, and does not change during a run.
*Schedule* may change at a restart, which the log records. *Runtime* never changes bits.
"""

import dataclasses
import math
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from checkpointing.retention import RetentionConfig
from data_service.embedded import EMBEDDED_NAMES
from data_service.plan import parse_data_flag, parse_weights_flag
from launch.presets import PRESETS
from storage.commands import parse
from storage.errors import ConfigurationError
from trainer.loop import LoopConfig
from trainer.model import ModelConfig
from trainer.numerics import NumericsConfig
from trainer.optimizer import OptimizerConfig
from trainer.schedule import ScheduleConfig
from trainer.step import BatchConfig

DESCRIPTION = """Train a GPT, or go on with a run that was interrupted: the same command does both.

Examples:
  torchrun --nproc_per_node=1 launch/train.py
  torchrun --nproc_per_node=4 -- launch/train.py --run gs://bucket/runs/a --preset gpt2-124m
      --data c4=gs://bucket/tokens/c4:0.7 --data books=gs://bucket/tokens/books:0.3

Exit codes: 0 complete (or stopped, as an operator asked), 75 start again, 76 fenced by another
incarnation, 78 change something first, 70 a defect."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where the run is, and what it trains on."""

    run: str = "runs/default"
    """Path or URL that holds everything of the run."""
    preset: str = "tiny"
    """Named configuration to begin with; see the README."""
    config: str = ""
    """TOML file with sections named as below."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=URL[:WEIGHT] of a prepared source; none means the embedded corpus."""
    weights: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=WEIGHT[@STEP],WEIGHT@STEP...: weights of a source, linear between the steps."""
    data_alternate: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=URL of a second place of a remote source, asked when the first fails."""
    cache_dir: str = ""
    """Folder of this host for shards of remote sources; empty for ~/.cache/rangeflow."""
    cache_gigabytes: float = 0.0
    """What the cache may take; 0 for 30, or 80 % of what is free if that is less."""
    seed: int = 0
    """Decides initial weights, order of data, dropout and samples."""
    save_interval: Literal["fixed", "auto"] = "fixed"
    """`auto` chooses it from what saves cost and how often the run is preempted."""
    save_interval_seconds: float = 0.0
    """Seconds between saves, beside the interval in steps; 0 for none."""
    local_tier: str = ""
    """Folder of this host, best on a RAM disk, for more frequent snapshots; empty for none."""
    grace_seconds: float = 12.0
    """From a notice to the deadline, where no supervisor tells it; the process has left by then."""
    on_divergence: Literal["warn", "stop"] = "warn"
    """What a step that is made again after a resume, and gives other bits, does to the run."""
    wait_for_saves: bool = False
    """Hold up training until each save is committed; needs half the memory."""
    take_over: bool = False
    """Fence an incarnation that is still alive."""
    accept_change: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Identity field whose change ends exactness here, and is wanted all the same."""
    allow_unfenced_store: bool = False
    """Use a store in which two incarnations could both believe that they own the run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    numerics: NumericsConfig = field(default_factory=NumericsConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)

    def __post_init__(self) -> None:
        if not 0.0 <= self.save_interval_seconds < math.inf:
            raise ConfigurationError(
                "save_interval_seconds must be a number from 0, which turns it off; got "
                f"{self.save_interval_seconds}"
            )
        if not 1.0 < self.grace_seconds < math.inf:
            raise ConfigurationError(
                "grace_seconds must be a number above 1, the second that leaving takes; got "
                f"{self.grace_seconds}"
            )
        if not 0.0 <= self.cache_gigabytes < math.inf:
            raise ConfigurationError(
                f"cache_gigabytes must be a number from 0, got {self.cache_gigabytes}"
            )
        if "://" in self.cache_dir:
            raise ConfigurationError(
                f"cache_dir must be a folder of this host, got {self.cache_dir!r}"
            )
        if "://" in self.local_tier:
            raise ConfigurationError(
                f"local_tier must be a folder of this host, such as /dev/shm/rangeflow; got "
                f"{self.local_tier!r}"
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigurationError(f"seed must be from 0 to 2**63 - 1; got {self.seed}")


KINDS = {
    "seed": "identity",
    "model": "identity",
    "optimizer": "identity",
    "batch": "identity",
    "numerics": "identity",
    "loop.eval_micro_batch_size": "identity",
    "data": "schedule",
    "weights": "schedule",
    "schedule": "schedule",
    "data_alternate": "runtime",
    "cache_dir": "runtime",
    "cache_gigabytes": "runtime",
    "run": "runtime",
    "preset": "runtime",
    "config": "runtime",
    "save_interval": "runtime",
    "save_interval_seconds": "runtime",
    "grace_seconds": "runtime",
    "on_divergence": "runtime",
    "wait_for_saves": "runtime",
    "local_tier": "runtime",
    "take_over": "runtime",
    "accept_change": "runtime",
    "allow_unfenced_store": "runtime",
    "loop": "runtime",
    "retention": "runtime",
}
"""The kind of each field; that of a section holds for its fields that are not named themselves."""


FIXED = frozenset(
    {
        "seed",
        "batch.global_batch_size",
        "model.n_layer",
        "model.n_head",
        "model.n_embd",
        "model.context",
        "model.bias",
        "numerics.precision",
        "optimizer.optimizer",
    }
)
"""Identity fields that no restart can change: a checkpoint does not fit another value."""


def fields_of_kind(config: RunConfig, kind: str) -> dict[str, Any]:
    """The fields of a kind, by dotted name, as JSON."""
    found: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        inner = value if isinstance(value, dict) else {"": value}
        for part, leaf in inner.items():
            dotted = f"{name}.{part}" if part else name
            if KINDS.get(dotted, KINDS[name]) == kind:
                found[dotted] = list(leaf) if isinstance(leaf, tuple) else leaf
    return found


_OF_A_HOST = frozenset(
    {
        "run",
        "preset",
        "config",
        "data_alternate",
        "cache_dir",
        "cache_gigabytes",
        "grace_seconds",
        "take_over",
        "accept_change",
        "allow_unfenced_store",
    }
)
"""Fields that may differ between the processes of a world: paths, and what rank 0 alone heeds."""


def of_the_world(config: RunConfig) -> dict[str, Any]:
    """What all processes of a world must have the same, by dotted name, as JSON.

    Of sources their names and weights, of the local tier whether there is one: where they lie may
    differ between hosts.
    """
    kinds = ("identity", "schedule", "runtime")
    fields = {n: v for kind in kinds for n, v in fields_of_kind(config, kind).items()}
    flags = sorted((flag.name, flag.weight) for flag in map(parse_data_flag, config.data))
    fields["data"] = [list(flag) for flag in flags]
    fields["local_tier"] = bool(config.local_tier)
    return {name: value for name, value in fields.items() if name not in _OF_A_HOST}


def parse_config(arguments: Sequence[str]) -> RunConfig | None:
    """The configuration that the arguments ask for; None when help was asked for and given.

    Raises ConfigurationError for what does not fit.
    """
    path = _value_of("config", arguments)
    sections = _toml(path) if path else {}
    from_file = _as_flags(RunConfig, sections, where=path or "")
    if _value_of("data", arguments) is not None:
        from_file = [flag for flag in from_file if not flag.startswith("--data=")]
    flags = [*from_file, *arguments]
    preset = _value_of("preset", flags) or "tiny"
    if preset not in PRESETS:
        raise ConfigurationError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    parsed: RunConfig | None = parse(
        RunConfig,
        flags,
        default=_base(preset, sections),
        description=DESCRIPTION,
        prog="launch/train.py",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if parsed is not None:
        _check_weights(parsed)
    return parsed


def _check_weights(config: RunConfig) -> None:
    """Every source that is weighed is given; a preset's are those that it was made for."""
    weighed = {parse_weights_flag(text)[0] for text in config.weights}
    needed = {parse_weights_flag(text)[0] for text in PRESETS[config.preset].get("weights", ())}
    embedded = () if config.data or needed else EMBEDDED_NAMES
    given = {*embedded, *(parse_data_flag(text).name for text in config.data)}
    missing = sorted(weighed - given)
    if not missing:
        return
    if needed & set(missing):
        raise ConfigurationError(
            f"preset {config.preset} trains on sources that you name: give "
            f"{' '.join(f'--data {name}=URL' for name in missing)}; docs/recipes.md shows how "
            "they are prepared"
        )
    raise ConfigurationError(
        f"--weights {missing[0]}: there is no such source; there are {', '.join(sorted(given))}"
    )


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The last value of `--flag`, which must be known before the other flags' defaults are."""
    value = None
    for place, argument in enumerate(arguments):
        name, equals, after = argument.partition("=")
        if name == f"--{flag}":
            value = after if equals else "".join(arguments[place + 1 : place + 2])
    return value


def _toml(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"--config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--config {path} is not TOML: {error}") from error


def _base(preset: str, file: dict[str, Any]) -> RunConfig:
    """The configuration that a preset means, with the lists in a file's sections."""
    chosen = PRESETS[preset]
    base = RunConfig(preset=preset, weights=chosen.get("weights", ()))
    changes: dict[str, Any] = {}
    for section in {*chosen, *(name for name, v in file.items() if isinstance(v, dict))} - {
        "weights"
    }:
        lists = {k: tuple(v) for k, v in file.get(section, {}).items() if isinstance(v, list)}
        fields = chosen.get(section, {}) | lists
        changes[section] = dataclasses.replace(getattr(base, section), **fields)
    return dataclasses.replace(base, **changes)


def _as_flags(kind: Any, fields: dict[str, Any], *, where: str) -> list[str]:
    """A file's fields as flags, before those of the command line: the whole is judged once."""
    hints = get_type_hints(kind)
    flags: list[str] = []
    for name, value in fields.items():
        if name not in hints:
            raise ConfigurationError(f"{where}: no field {name!r}; there are {', '.join(hints)}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise ConfigurationError(f"{where}: {name} is {value!r}, expected a section")
            flags += _as_flags(hint, value, where=f"{where}, [{name}]")
            continue
        if not _fits(value, hint):
            raise ConfigurationError(f"{where}: {name} is {value!r}, expected {_said(hint)}")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        elif name in ("data", "data_alternate", "weights", "accept_change"):
            flags += [f"--{name}={one}" for one in value]
        elif isinstance(value, list):
            continue  # its texts could be taken for flags: `_base` has them
        else:
            flags.append(f"--{name}={value}")
    return flags


def _said(hint: Any) -> str:
    """A field's type in words."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if get_origin(hint) is tuple:
        return "a list of texts"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "a text")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a TOML value is one of a field's type; TOML has lists for tuples, 1 for 1.0."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def command_line() -> list[str]:
    """The arguments of this process."""
    return sys.argv[1:]
