"""What a plan will cost and give, before training: `python -m data_service.plan RUN`.

For a run that has begun, the plan is that of its log; for one that has not, what `--data` says.

Does not cover: how fast training will be; say it with `--tokens_per_second`.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from data_service.batches import LANES
from data_service.outlook import (
    TOKENS_PER_PARAMETER,
    mixture_rows,
    rate_of,
    source_outlooks,
    volume_of,
    warnings_of,
)
from data_service.plan import Plan, PlanSource, Segment, parse_data_flag, parse_weights_flag
from data_service.recorded import RecordedPlan, located, recorded_plans
from data_service.run_data import (
    RunLog,
    batches_of,
    moved_sources,
    open_sources,
    read_log,
)
from data_service.shares import PPM
from data_service.source import Source, open_source
from storage.commands import run_command
from storage.display import print_table, size
from storage.errors import ConfigurationError
from storage.store import open_store

_DESCRIPTION = """Forecasts what a plan gives and costs: tokens, epochs, repeats, volume, time.

For a run that has begun, from its log; for a new one, from --data and the three numbers.

Example:
    python -m data_service.plan runs/default
    python -m data_service.plan runs/new --data web=data/web:0.7 --data books=data/books:0.3
        --max_steps 20000 --global_batch_size 256 --context 1024 --parameters 124e6
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanArguments:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Path or URL of the run; it need not exist."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=URL[:WEIGHT] of a source; for a run that has begun, NAME=URL of one that has moved."""
    weights: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=WEIGHT[@STEP],WEIGHT@STEP...: a new run's weights of a source, linear in between."""
    max_steps: int | None = None
    """Steps of the run; for a run that has begun, those of its newest start when not given."""
    global_batch_size: int | None = None
    """Sequences per step; only for a new run, as are --context and --seed."""
    context: int | None = None
    """Tokens per sequence."""
    seed: int | None = None
    """Decides the order of data; 0 when not given."""
    parameters: float | None = None
    """Parameters of the model, such as 124e6."""
    tokens_per_second: float | None = None
    """Speed of training, all processes together."""
    json: bool = False
    """Print the forecast as JSON."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; what it returns is the exit code."""

    def execute(arguments: PlanArguments) -> int:
        found = forecast(arguments)
        if arguments.json:
            print(json.dumps(found))
        else:
            _show(found)
        return 0

    return run_command(
        PlanArguments, execute, argv, prog="python -m data_service.plan", description=_DESCRIPTION
    )


def forecast(arguments: PlanArguments) -> dict[str, Any]:
    """All that the command tells, as JSON."""
    for name in ("max_steps", "parameters", "tokens_per_second"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ConfigurationError(f"--{name} must be above 0, got {value:g}")
    begun = time.monotonic()
    log = read_log(arguments.run)
    plans = recorded_plans(log.records)
    if plans:
        recorded, sources = _of_run(arguments, plans[-1])
    else:
        recorded, sources = _of_flags(arguments)
    max_steps = arguments.max_steps or _max_steps(log)
    done = log.committed_step
    batches = batches_of(recorded, sources)
    batches.batch(done)
    first_batch_seconds = time.monotonic() - begun
    tokens = max_steps * recorded.global_batch_size * recorded.context
    told = source_outlooks(batches, sources, max_steps, done)
    parameters = arguments.parameters or _parameters(log, arguments.run, batches.vocab_size)
    return {
        "run": arguments.run,
        "begun": bool(plans),
        "steps_done": done,
        "max_steps": max_steps,
        "global_batch_size": recorded.global_batch_size,
        "context": recorded.context,
        "seed": recorded.seed,
        "plan": recorded.plan.hash,
        "tokens": tokens,
        "sources": told,
        "warnings": warnings_of(told, tokens, parameters),
        "parameters": parameters,
        "tokens_per_parameter": None if parameters is None else tokens / parameters,
        "volume": volume_of(told, recorded.plan),
        "first_batch_seconds": round(first_batch_seconds, 3),
        "rate": rate_of(told, arguments.tokens_per_second, tokens, recorded.context),
        "mixture": mixture_rows(recorded.plan, max_steps),
    }


def _of_run(
    arguments: PlanArguments, recorded: RecordedPlan
) -> tuple[RecordedPlan, dict[str, Source]]:
    for name in ("global_batch_size", "context", "seed"):
        asked, has = getattr(arguments, name), getattr(recorded, name)
        if asked is not None and asked != has:
            raise ConfigurationError(
                f"--{name} {asked}: the run has {name} {has}, which it keeps; leave it out, or "
                "name a new run"
            )
    if arguments.weights:
        raise ConfigurationError(
            "--weights is for a new run; `python -m data_service.edit RUN` changes one that trains"
        )
    moved = moved_sources(arguments.data, list(recorded.plan.sources))
    return recorded, open_sources(arguments.run, recorded, moved)


def _of_flags(arguments: PlanArguments) -> tuple[RecordedPlan, dict[str, Source]]:
    """The plan that a new run with these flags would begin with."""
    needed = ("data", "max_steps", "global_batch_size", "context")
    missing = [f"--{name}" for name in needed if not getattr(arguments, name)]
    if missing:
        raise ConfigurationError(
            f"{arguments.run} has no plan yet, so {', '.join(missing)} must say what it will be"
        )
    assert arguments.context is not None and arguments.global_batch_size is not None
    flags = [parse_data_flag(text) for text in arguments.data]
    weights = dict(parse_weights_flag(text) for text in arguments.weights)
    for name in weights.keys() - {flag.name for flag in flags}:
        raise ConfigurationError(f"--weights {name}: there is no --data {name}=URL")
    sources = {
        flag.name: open_source(flag.name, located(arguments.run, flag.url)) for flag in flags
    }
    segment = Segment(
        from_step=0,
        sources=tuple(
            PlanSource(
                name=flag.name,
                url=flag.url,
                fingerprint=sources[flag.name].fingerprint,
                weights=weights.get(flag.name, ((0, flag.weight),)),
            )
            for flag in flags
        ),
    )
    recorded = RecordedPlan(
        plan=Plan(segments=(segment,)),
        from_step=0,
        seed=arguments.seed or 0,
        context=arguments.context,
        global_batch_size=arguments.global_batch_size,
        lanes=LANES,
    )
    return recorded, sources


def _max_steps(log: RunLog) -> int:
    if log.max_steps > 0:
        return log.max_steps
    raise ConfigurationError(f"the log of {log.url} does not say how long it trains: --max_steps N")


def _parameters(log: RunLog, run: str, vocab_size: int) -> float | None:
    """About how many the run's model has, by the shape in its `run.json`; None when unknown.

    A layer of a GPT of width C has 12 C^2; embeddings C for each id and each position.
    """
    if not log.records:
        return None
    try:
        identity = json.loads(open_store(run).get("run.json"))["identity"]
        layers, width, context = (
            int(identity[f"model.{name}"]) for name in ("n_layer", "n_embd", "context")
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return float(12 * layers * width**2 + (vocab_size + context) * width)


def _show(found: Mapping[str, Any]) -> None:
    state = f"step {found['steps_done']} of" if found["begun"] else "not begun,"
    print(
        f"{found['run']}: {state} {found['max_steps']} steps of {found['global_batch_size']} "
        f"sequences of {found['context']} tokens, {found['tokens']:,} tokens in all"
    )
    print_table(
        ("source", "tokens to be seen", "samples", "of them done", "epochs", "shards", "size", ""),
        [
            (
                told["source"],
                f"{told['tokens']:,}",
                f"{told['samples']:,}",
                f"{told['samples_done']:,}",
                f"{told['epochs']:.2f}",
                f"{told['shards']:,}",
                size(told["bytes"]),
                "remote" if told["remote"] else "local",
            )
            for told in found["sources"]
        ],
    )
    if len(found["mixture"]) > 1:
        names = [told["source"] for told in found["sources"]]
        print_table(
            ("from step", *names),
            [
                (row["step"], *(_percent(row["shares"].get(name)) for name in names))
                for row in found["mixture"]
            ],
        )
    if found["parameters"] is not None:
        print(
            f"{found['tokens_per_parameter']:.1f} tokens per parameter, of "
            f"{found['parameters']:,.0f} (Chinchilla: {TOKENS_PER_PARAMETER:.0f})"
        )
    volume = found["volume"]
    print(f"volume: {size(volume['bytes'])} of shards, {size(volume['remote_bytes'])} remote")
    if volume["remote_bytes"]:
        print(
            f"download: {size(volume['download_bytes'])} with room for all of it, "
            f"{size(volume['least_cache_download_bytes'])} with the least cache, of "
            f"{size(volume['least_cache_bytes'])}"
        )
    rate = found["rate"]
    if rate is not None:
        print(
            f"at {rate['tokens_per_second']:,.0f} tokens/s: {rate['hours']:.1f} hours, "
            f"{size(round(rate['read_bytes_per_second']))}/s read, "
            f"{size(round(rate['remote_bytes_per_second']))}/s downloaded"
        )
    print(f"the first batch was there after {found['first_batch_seconds']:.2f} s")
    for warning in found["warnings"]:
        print(f"warning: {warning}")


def _percent(share: int | None) -> str | None:
    return None if share is None else f"{100 * share / PPM:.1f}%"


if __name__ == "__main__":
    sys.exit(main())
