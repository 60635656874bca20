"""The configuration of a run: a preset, then a TOML file, then flags; the later wins.

Every field is of one of three kinds. *Identity* decides bits, and does not change during a run.
*Schedule* may change at a restart, which the log records. *Runtime* never changes bits.
"""

import dataclasses
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from launch.presets import PRESETS
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
  torchrun --nproc_per_node=4 launch/train.py --run gs://bucket/runs/a --preset gpt2-124m
      --data c4=gs://bucket/tokens/c4:0.7 --data books=gs://bucket/tokens/books:0.3

Exit codes: 0 complete, 75 start again, 76 fenced by another incarnation, 78 change something first,
70 a defect."""


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
    seed: int = 0
    """Decides initial weights, order of data, dropout and samples."""
    keep_last: int = 3
    """Checkpoints to keep besides the best and the pinned."""
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

    def __post_init__(self) -> None:
        if self.keep_last < 2:
            raise ConfigurationError(
                "keep_last must be at least 2, because the newest checkpoint may turn out damaged; "
                f"got {self.keep_last}"
            )
        if self.seed < 0:
            raise ConfigurationError(f"seed cannot be negative; got {self.seed}")


KINDS = {
    "seed": "identity",
    "model": "identity",
    "optimizer": "identity",
    "batch": "identity",
    "numerics": "identity",
    "loop.eval_micro_batch_size": "identity",
    "data": "schedule",
    "schedule": "schedule",
    "run": "runtime",
    "preset": "runtime",
    "config": "runtime",
    "keep_last": "runtime",
    "take_over": "runtime",
    "accept_change": "runtime",
    "allow_unfenced_store": "runtime",
    "loop": "runtime",
}
"""The kind of each field; that of a section holds for its fields that are not named themselves."""


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


def parse_config(arguments: Sequence[str]) -> RunConfig:
    """The configuration that the arguments ask for.

    Raises ConfigurationError, or SystemExit (0 after --help, 2 for an unknown flag).
    """
    preset = _value_of("preset", arguments)
    path = _value_of("config", arguments)
    sections = _toml(path) if path else {}
    preset = preset or sections.pop("preset", None) or "tiny"
    if preset not in PRESETS:
        raise ConfigurationError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    base = _with(RunConfig(preset=preset), PRESETS[preset], where=f"preset {preset}")
    base = _with(base, sections, where=path or "")
    parsed: RunConfig = tyro.cli(
        RunConfig,
        args=list(arguments),
        default=base,
        description=DESCRIPTION,
        prog="launch/train.py",
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return parsed


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
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigurationError(f"--config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--config {path} is not TOML: {error}") from error


def _with(config: Any, changes: dict[str, Any], *, where: str) -> Any:
    """The dataclass with fields changed; sections are changed field by field."""
    known = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name, value in changes.items():
        if name not in known:
            raise ConfigurationError(f"{where}: no field {name!r}; there are {', '.join(known)}")
        old = known[name]
        if dataclasses.is_dataclass(old) != isinstance(value, dict):
            raise ConfigurationError(f"{where}: {name} is {value!r}, expected the kind of {old!r}")
        if isinstance(value, dict):
            known[name] = _with(old, value, where=f"{where}, [{name}]")
            continue
        known[name] = _like(old, value, f"{where}: {name}")
    return type(config)(**known)


def _like(old: Any, value: Any, where: str) -> Any:
    """The value as a field that holds `old` takes it; TOML has lists for tuples, 1 for 1.0."""
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(old):
        raise ConfigurationError(f"{where} is {value!r}, expected something like {old!r}")
    return value


def command_line() -> list[str]:
    """The arguments of this process."""
    return sys.argv[1:]
