"""Repeats the optimizer step until the run is complete or a process is asked to stop.

After every step, in this order: evaluation, samples, metrics, save. A save at step S is therefore
preceded by everything that step S has to say, and a resume from S begins with step S + 1. A save
runs beside the next steps; one that is due while another is in flight is put off, not left out.

Asked to stop, the process finishes the step and saves it, where there is time for both; else it
gives the step up and saves the one before. Evaluation and samples are given up at once: the
checkpoint then keeps what the step has not said, and the next start says it first.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from data_service.batches import Batches
from data_service.loader import StepRows
from data_service.tokenizer import Tokenizer
from storage.errors import (
    ConfigurationError,
    DataError,
    StopRequestedError,
    StoreUnavailableError,
)
from trainer.canary import canary_window, check_canary
from trainer.evaluate import evaluate, held_out
from trainer.losses import by_source
from trainer.sample import sample
from trainer.step import Abandoned, Flags, StepResult, TrainStep

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """What happens between steps, and how often. 0 switches an interval off."""

    eval_interval_steps: int = 200
    eval_windows: int = 64
    """Held-out windows of each source."""
    eval_micro_batch_size: int = 16
    sample_interval_steps: int = 600
    sample_tokens: int = 120
    sample_temperature: float = 0.7
    sample_prompts: tuple[str, ...] = ("def __init__(self", "The ")
    log_interval_steps: int = 50
    save_interval_steps: int = 200
    """Steps between saves; a save is also made when it is due by the clock, and at the end."""
    local_interval_steps: int = 20
    """Steps between snapshots to the local tier, if there is one."""

    def __post_init__(self) -> None:
        if self.eval_windows < 1 or self.eval_micro_batch_size < 1:
            raise ConfigurationError(
                "eval_windows and eval_micro_batch_size must be at least 1; got "
                f"{self.eval_windows} and {self.eval_micro_batch_size}"
            )
        intervals = (
            self.eval_interval_steps,
            self.sample_interval_steps,
            self.log_interval_steps,
            self.save_interval_steps,
            self.local_interval_steps,
        )
        if min(intervals) < 0:
            raise ConfigurationError(f"an interval cannot be negative; got {min(intervals)}")
        if self.sample_tokens < 0:
            raise ConfigurationError(f"sample_tokens cannot be negative; got {self.sample_tokens}")
        if not 0.0 <= self.sample_temperature < math.inf:
            raise ConfigurationError(
                f"sample_temperature must be a number from 0; got {self.sample_temperature}"
            )


class Rows(Protocol):
    """Where this process's rows of each global batch come from."""

    def next(self, step: int) -> StepRows:
        """Their tokens, and which of them are learnt."""


class Announce(Protocol):
    """Told every phase that the program enters; knows the step by `step`."""

    step: int

    def __call__(self, phase: str) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What the loop is given by `launch`.

    `flags` is what this process tells the others in each step. `record` takes the row of a step; it
    does nothing on ranks other than 0. `save` begins to save the state, which may change after
    `wait_for_copy`; with `wait` it returns when that and all before it are over, and whether the
    step was committed, the same on every rank. `put_off` is told that a save waits for the one in
    flight. `save_locally` begins a snapshot to the local tier, if there is one. `save` raises
    FencedError when a later incarnation owns the run. `finish_saves` waits for what is in flight,
    and gives the newest step committed in this start. `abandon` is what a step asks between
    micro-batches, `stopping` what evaluation and samples ask: whether to give up. `stepped` is told
    each step that was made, with its position. `edited` answers what operators ask of the
    plan, between the step that it is given and the next; it returns the batches from there on, and
    the rows change with them. `data_metrics` is what the data has to say of the step; the names
    begin with `data_`.
    """

    rank: int
    world_size: int
    device: torch.device
    gather: Callable[[Any], list[Any]]
    announce: Announce
    flags: Callable[[], Flags]
    record: Callable[[dict[str, Any]], None]
    save: "Save"
    put_off: Callable[[int], None]
    save_locally: Callable[[int, bool], None]
    wait_for_copy: Callable[[], None]
    edited: Callable[[int], Batches]
    data_metrics: Callable[[], dict[str, float]] = dict
    finish_saves: Callable[[], int | None] = lambda: None
    abandon: Callable[[int, int], bool] = lambda done, of: False
    stopping: Callable[[], bool] = lambda: False
    stepped: Callable[[int, int, StepResult], None] = lambda step, position, result: None


class Save(Protocol):
    """Saves the state after `step` steps; `healthy` when every loss since the last was finite.

    `unsaid` is the row of the step, where evaluation or samples of it were given up.
    """

    def __call__(
        self,
        step: int,
        *,
        validation_loss: float | None,
        healthy: bool,
        wait: bool,
        unsaid: dict[str, Any] | None,
    ) -> bool: ...


class Loop:
    """The rest of a run, from `step` finished steps on. `position` is the next batch's number."""

    def __init__(
        self,
        training: TrainStep,
        batches: Batches,
        rows: Rows,
        around: Surroundings,
        config: LoopConfig,
        *,
        seed: int,
        max_steps: int,
    ) -> None:
        self._training = training
        self._batches = batches
        self._rows = rows
        self._around = around
        self._config = config
        self._seed = seed
        self._max_steps = max_steps
        self._validated = list(batches.plan.sources)
        self._validation = held_out(batches, config.eval_windows, self._validated)
        self._canary = canary_window(seed, batches.context, batches.vocab_size)
        self._prompts = _encoded_prompts(batches.tokenizer, config) if around.rank == 0 else {}
        self._healthy = True
        self._waiting = False
        self._restored = self._begun = -1  # steps: begun is what a save was last begun of
        self._validation_loss: float | None = None
        self._unsaid: dict[str, Any] | None = None

    def run(self, step: int, position: int, unsaid: dict[str, Any] | None = None) -> bool:
        """Go on to the end. False when a process was asked to stop; the state is then saved, if
        there was time. `unsaid` is the row of `step` that it has yet to say in full.
        """
        around = self._around
        self._restored = self._begun = step
        speed = _Speed(self._batches, self._max_steps, step)
        if unsaid is not None:
            self._say(step, unsaid, speed, last=step == self._max_steps)
            self._save_if_due(step, Flags(), last=False)
        while step < self._max_steps:
            around.announce.step = step
            around.announce("step")
            result = self._step(step, position)
            if isinstance(result, Abandoned):
                self._leave(step, result.flags)
                return False
            sources = self._batches.sources_of(position)
            step, position = step + 1, position + 1
            around.announce.step = step
            around.stepped(step, position - 1, result)
            self._healthy = self._healthy and math.isfinite(result.loss)
            last = step == self._max_steps
            self._say(step, self._row(step, result, sources, speed), speed, last=last)
            if result.flags.stop and not last:
                self._leave(step, result.flags)
                return False
            self._save_if_due(step, result.flags, last=last)
            if result.flags.edit and not last:
                around.announce("edit")
                self._batches = around.edited(position)
        return True

    def _step(self, step: int, position: int) -> StepResult | Abandoned:
        """One optimizer step; a stop during the wait for its data gives it up."""
        around, tokens, learn = self._around, None, None
        if self._unsaid is None:
            with suppress(StopRequestedError):
                rows = self._rows.next(position)
                tokens = torch.from_numpy(rows.tokens).to(around.device)
                if rows.learn is not None:
                    learn = torch.from_numpy(rows.learn).to(around.device)
        return self._training.run(
            step,
            tokens,
            learn,
            flags=around.flags,
            announce=around.announce,
            before_update=around.wait_for_copy,
            abandon=around.abandon,
        )

    def _row(
        self,
        step: int,
        result: StepResult,
        sources: Sequence[str],
        speed: "_Speed",
    ) -> dict[str, Any]:
        """What step `step` says of itself at once."""
        row: dict[str, Any] = {
            "step": step,
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "gradient_norm": result.gradient_norm,
            "tokens_per_second": round(speed.of_last_step(step), 1),
        }
        for source, (loss, tokens) in by_source(result.losses, result.learnt, sources).items():
            row[f"tokens/{source}"] = tokens
            if tokens:
                row[f"loss/{source}"] = loss
        return row | self._around.data_metrics()

    def _say(self, step: int, row: dict[str, Any], speed: "_Speed", *, last: bool) -> None:
        """Add evaluation and samples to the row where they are due, and record it; or, when asked
        to stop, neither. The last step says everything: nothing comes after it.
        """
        stopping = (lambda: False) if last else self._around.stopping
        said = self._complete(step, row, stopping, last=last)
        self._unsaid = None if said else row
        self._validation_loss = row.get("validation_loss")
        if said:
            self._around.record(row)
            if _due(step, self._config.log_interval_steps) or last:
                self._log(row, speed)
        speed.restart()

    def _complete(
        self, step: int, row: dict[str, Any], stopping: Callable[[], bool], *, last: bool
    ) -> bool:
        """Whether the row has evaluation and samples where they are due, those now made as well.

        Only rank 0 draws samples, and may give them up; all give up an evaluation together.
        """
        config = self._config
        evaluates = _due(step, config.eval_interval_steps) or (last and config.eval_interval_steps)
        if evaluates and "validation_loss" not in row:
            found = self._evaluate(step, stopping)
            if found is None:
                return False
            row |= found
        if _due(step, config.sample_interval_steps) or (last and config.sample_interval_steps):
            self._around.announce("sample")
            if self._around.rank == 0 and "samples" not in row:
                try:
                    row["samples"] = self._samples(step, stopping)
                except StopRequestedError:
                    return False
        return True

    def _evaluate(self, step: int, stopping: Callable[[], bool]) -> dict[str, float] | None:
        windows, sources, learn = self._held_out(step)
        around = self._around
        found = evaluate(
            self._training.model,
            self._training.forward,
            windows,
            sources,
            learn,
            micro_batch_size=self._config.eval_micro_batch_size,
            precision=self._training.precision,
            device=around.device,
            rank=around.rank,
            world_size=around.world_size,
            gather=around.gather,
            announce=around.announce,
            stopping=stopping,
        )
        if found is None:
            return None
        found |= check_canary(
            self._training.model,
            self._training.forward,
            self._canary,
            precision=self._training.precision,
            device=around.device,
        )
        logger.info(
            "step %d: validation loss %.4f, perplexity %.2f",
            step,
            found["validation_loss"],
            found["validation_perplexity"],
        )
        return found

    def _held_out(self, step: int) -> tuple[Tensor, list[str], Tensor | None]:
        """Of the sources trained on so far: a later edit is not seen at a step that is done again.

        A source that was removed stays: what is forgotten shows.
        """
        names = list(self._batches.plan.prefix(step).sources)
        if names != self._validated:
            self._validated = names
            self._validation = held_out(self._batches, self._config.eval_windows, names)
        return self._validation

    def _samples(self, step: int, stopping: Callable[[], bool]) -> list[dict[str, str]]:
        tokenizer: Tokenizer = self._batches.tokenizer
        samples = []
        for number, encoded in self._prompts.items():
            prompt = self._config.sample_prompts[number]
            ids = sample(
                self._training.model,
                encoded,
                tokens=self._config.sample_tokens,
                temperature=self._config.sample_temperature,
                end_of_text=tokenizer.end_of_text,
                key=(self._seed, step, number),
                precision=self._training.precision,
                device=self._around.device,
                stopping=stopping,
            )
            response = tokenizer.decode(ids)
            samples.append({"prompt": prompt, "response": response})
            logger.info("step %d: sample %s", step, json.dumps(prompt + response))
        return samples

    def _log(self, row: dict[str, Any], speed: "_Speed") -> None:
        """Tell people."""
        logger.info(
            "step %d/%d  loss %.4f  rate %.2e  norm %.2f  %s",
            row["step"],
            self._max_steps,
            row["loss"],
            row["learning_rate"],
            row["gradient_norm"],
            speed.summary(row["step"]),
        )

    def _save_if_due(self, step: int, flags: Flags, *, last: bool) -> None:
        """Save, or put it off; at the end, a save that failed is an error."""
        due = _due(step, self._config.save_interval_steps) or flags.save_due
        put_off = flags.saving and not last
        if (due or self._waiting) and put_off:
            if not self._waiting:
                self._around.put_off(step)
            self._waiting = True
        if put_off or not (last or due or self._waiting):
            if _due(step, self._config.local_interval_steps) and not flags.saving_locally:
                self._around.save_locally(step, self._healthy)
            return
        self._waiting = False
        saved = self._save(step, wait=last)
        self._healthy = self._healthy or saved
        if last and not saved:
            raise _not_saved(step)

    def _leave(self, step: int, flags: Flags) -> None:
        """Save the last boundary if there is time, unless that has begun; wait for the end of it.

        A save that failed is an error; one for which there is no time is not begun.
        """
        if self._begun != step and not flags.no_time:
            saved = self._save(step, wait=True)
        else:
            saved = self._around.finish_saves() == step or step == self._restored
        if not saved and not flags.no_time:
            raise _not_saved(step)

    def _save(self, step: int, *, wait: bool) -> bool:
        self._begun = step
        return self._around.save(
            step,
            validation_loss=self._validation_loss,
            healthy=self._healthy,
            wait=wait,
            unsaid=self._unsaid,
        )


def _encoded_prompts(tokenizer: Tokenizer, config: LoopConfig) -> dict[int, list[int]]:
    """Token ids of each prompt by its number, before the first step, not when samples are due.

    A prompt with a character that the tokenizer does not know is left out, with a warning. Raises
    StoreUnavailableError where the tokenizer's vocabulary cannot be loaded.
    """
    encoded: dict[int, list[int]] = {}
    for number, prompt in enumerate(config.sample_prompts if config.sample_interval_steps else ()):
        try:
            encoded[number] = [int(token) for token in tokenizer.encode(prompt)]
        except DataError as error:
            logger.warning(
                "no samples from the prompt %s: %s, or give other --sample_prompts",
                json.dumps(prompt),
                error,
            )
    return encoded


def _not_saved(step: int) -> StoreUnavailableError:
    return StoreUnavailableError(
        f"step {step} could not be saved, for the reason in the warning above; what was "
        "committed before is safe. Start again with the same command when the store works"
    )


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


class _Speed:
    """Tokens per second of steps alone, and what is left at the pace of the whole start."""

    def __init__(self, batches: Batches, max_steps: int, step: int) -> None:
        self._tokens = batches.global_batch_size * batches.context
        self._max_steps = max_steps
        self._first = step
        self._begun = self._last = time.monotonic()
        self._busy = 0.0
        self._steps = 0

    def of_last_step(self, step: int) -> float:
        seconds = max(1e-9, time.monotonic() - self._last)
        self._busy += seconds
        self._steps += 1
        return self._tokens / seconds

    def restart(self) -> None:
        self._last = time.monotonic()

    def summary(self, step: int) -> str:
        per_second = self._tokens * self._steps / max(1e-9, self._busy)
        elapsed = time.monotonic() - self._begun
        left = int(elapsed / max(1, step - self._first) * (self._max_steps - step))
        self._busy, self._steps = 0.0, 0
        minutes, seconds = divmod(left, 60)
        return f"{per_second:,.0f} tokens/s  ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
