"""The command that tells goodput: of a run so far, or what it would be under a spot trace."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro

from launch.accounting import GAP, Account, Life, account, lives_of, measured
from launch.replay import Replay, replay, share
from storage.commands import run_command
from storage.display import print_table

_DESCRIPTION = """Goodput: useful step time over wall time, all incarnations together.

Example:
    python -m launch.goodput runs/default
    python -m launch.goodput replay runs/default --trace traces/*.json
    python -m launch.goodput replay --help
"""

_REPLAY_DESCRIPTION = """What spot traces would cost, simulated with the costs that a run measured.

A trace is {"metadata": {"gap_seconds": G}, "data": [n0, n1, ...]}: the machines at each tick.

Example:
    python -m launch.goodput replay runs/default --trace traces/*.json --policy auto 600s
    python -m launch.goodput replay runs/try --trace trace.json --processes --compress 100 -- \\
        --preset tiny
"""

SAID = {
    GAP: "no incarnation alive: waiting for a machine, starts that failed",
    "start": "imports, claiming the run, preparing data, building the model",
    "compile": "what the first step takes longer than the second",
    "restore": "reading a checkpoint, up to the first step",
    "replay": "steps done again, because a kill took their result",
    "data_wait": "waiting for data",
    "save": "what saves take from training",
    "evaluate": "evaluation and samples",
    "step": "useful",
    "other": "edits, and what only the log shows",
}
"""The parts of the wall time, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """Where the wall time of a run went."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Path or URL of the run."""
    json: bool = False
    """Print it as JSON."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; what it returns is the exit code. A first word `replay` is no run."""
    words = list(sys.argv[1:] if argv is None else argv)
    prog = "python -m launch.goodput"
    if words[:1] != ["replay"]:
        return run_command(Goodput, _tell, words, prog=prog, description=_DESCRIPTION)
    words, training = _divided(words[1:])
    return run_command(
        Replay,
        lambda arguments: replay(arguments, training),
        words,
        prog=f"{prog} replay",
        description=_REPLAY_DESCRIPTION,
    )


def _divided(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before and after `--`."""
    at = words.index("--") if "--" in words else len(words)
    return list(words[:at]), list(words[at + 1 :])


def _tell(arguments: Goodput) -> int:
    lives = lives_of(arguments.run)
    found, costs = account(lives), measured(lives)
    if arguments.json:
        print(json.dumps(_report(arguments.run, lives, found)))
        return 0
    rows = [
        (name, f"{amount / 1000:,.1f} s", share(amount, found.wall), SAID[name])
        for name, amount in found.parts.items()
    ]
    rows.append(
        ("wall", f"{found.wall / 1000:,.1f} s", "", "from the first start to the last sign")
    )
    print_table(("part", "time", "share", ""), rows)
    if found.goodput is None or found.goodput_alive is None:
        print("nothing has run here yet")
        return 0
    print(
        f"goodput {found.goodput:.4f} of the wall time, {found.goodput_alive:.4f} of the time with "
        f"an incarnation alive; {found.incarnations} incarnations"
        + (f", {found.untold} of them known from the log alone" if found.untold else "")
    )
    print(f"notices: {found.notices_met} met, {found.notices_missed} missed")
    told = {
        "a step": costs.step_seconds,
        "a save takes": costs.stall_seconds,
        "and is durable after": costs.durable_seconds,
        "a restart": costs.restart_seconds,
    }
    print("; ".join(f"{name} {_seconds(value)}" for name, value in told.items()))
    return 0


def _report(url: str, lives: Sequence[Life], found: Account) -> dict[str, Any]:
    return {
        "url": url,
        **found.to_json(),
        "measured": asdict(measured(lives)),
        "lives": [
            {
                "generation": life.generation,
                "began": life.began / 1000,
                "ended": life.ended / 1000,
                "told": life.told,
                "parts": {name: amount / 1000 for name, amount in life.parts.items()},
            }
            for life in lives
        ],
    }


def _seconds(value: float | None) -> str:
    return "not measured yet" if value is None else f"{value:.3g} s"


if __name__ == "__main__":
    sys.exit(main())
