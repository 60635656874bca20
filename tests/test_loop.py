"""What happens between steps: in which order, how often, and when a save fails."""

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_service.batches import Batches
from data_service.loader import StepRows
from data_service.tokenizer import CharacterTokenizer
from launch.build import build_training
from launch.config import RunConfig
from launch.grace import Grace
from launch.phase import Phase
from launch.world import World
from storage.errors import ConfigurationError, DataError, FencedError, StoreUnavailableError
from tests.made_sources import made_source, plan_of, segment_of
from trainer.canary import MOST_NATS
from trainer.evaluate import evaluate, held_out
from trainer.loop import Loop, LoopConfig, Surroundings
from trainer.model import ModelConfig
from trainer.sample import sample
from trainer.schedule import ScheduleConfig
from trainer.step import BatchConfig, Flags, StepResult, TrainStep

CPU = torch.device("cpu")
SMALL = BatchConfig(global_batch_size=2, micro_batch_size=2, virtual_ranks=1)
STEP = ["step", "micro_batch", "reduce", "update:before", "wait_for_copy", "update:after"]
NEVER = {
    "eval_interval_steps": 0,
    "sample_interval_steps": 0,
    "save_interval_steps": 0,
    "log_interval_steps": 1000,
}


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    folder = tmp_path_factory.mktemp("sources")
    sources = {name: made_source(folder, name, start=len(name)) for name in ("code", "web")}
    return Batches(
        plan=plan_of(list(sources.values())),
        sources=sources,
        seed=5,
        context=8,
        global_batch_size=2,
    )


class Recorder:
    """The surroundings of a loop that write down what they are told, in order."""

    def __init__(
        self,
        training: TrainStep,
        batches: Batches,
        *,
        save: Callable[[int], bool] = lambda step: True,
        saving: Callable[[int], bool] = lambda step: False,
        save_due: Callable[[int], bool] = lambda step: False,
        edits: dict[int, Batches] | None = None,
        stop_at: int = 10**9,
        rank: int = 0,
        rows: Callable[[int], StepRows] | None = None,
        data_metrics: Callable[[], dict[str, float]] = dict,
        announce: Callable[[str, int], None] = lambda phase, step: None,
        grace: Grace | None = None,
    ) -> None:
        self.events: list[tuple[int, str]] = []
        """(finished steps, what)"""
        self.rows: list[dict[str, Any]] = []
        self.saves: list[tuple[int, float | None, bool]] = []
        self.waits: list[bool] = []
        self.positions: list[int] = []
        self.unsaid: list[dict[str, Any] | None] = []
        """Of each save."""
        self.stepped: list[tuple[int, int]] = []
        self.fenced = False
        self.training = training
        self._batches = batches
        self._save = save
        self._saving = saving
        self._save_due = save_due
        self._edits = edits or {}
        self._stop_at = stop_at
        self._rank = rank
        self._rows = rows or (lambda step: StepRows(self._batches.batch(step), None))
        self._data_metrics = data_metrics
        self._announce = announce
        self._grace = grace
        self.phase = Phase(self._hear)

    def _hear(self, phase: str, step: int) -> None:
        self.events.append((step, phase))
        self._announce(phase, step)

    def next(self, step: int) -> StepRows:
        self.positions.append(step)
        return self._rows(step)

    def loop(self, max_steps: int, **config: Any) -> Loop:
        around = Surroundings(
            rank=self._rank,
            world_size=1,
            device=CPU,
            gather=lambda value: [value],
            announce=self.phase,
            flags=self._flags,
            record=self._record,
            save=self._keep,
            put_off=lambda step: self.phase("put_off"),
            save_locally=lambda step, healthy: self.phase("save_locally"),
            wait_for_copy=lambda: self.phase("wait_for_copy"),
            data_metrics=self._data_metrics,
            edited=self._edited,
            finish_saves=self._finish_saves,
            abandon=self._grace.gives_up if self._grace else lambda done, of: False,
            stopping=self._grace.requested if self._grace else lambda: False,
            stepped=self._stepped,
        )
        options = NEVER | {"sample_tokens": 3, "eval_windows": 4} | config
        return Loop(
            self.training,
            self._batches,
            self,
            around,
            LoopConfig(**options),
            seed=5,
            max_steps=max_steps,
        )

    def steps_of(self, name: str) -> list[int]:
        return [step for step, event in self.events if event == name]

    def _record(self, row: dict[str, Any]) -> None:
        self.phase("record")
        self.rows.append(row)

    def _flags(self) -> Flags:
        step = self.phase.step + 1
        grace = self._grace
        return Flags(
            stop=step >= self._stop_at or (grace is not None and grace.requested()),
            no_time=grace is not None and grace.no_time(),
            saving=self._saving(step),
            save_due=self._save_due(step),
            edit=step in self._edits,
        )

    def _edited(self, step: int) -> Batches:
        self.phase("edited")
        self._batches = self._edits[step]
        return self._batches

    def _stepped(self, step: int, position: int, result: StepResult) -> None:
        self.stepped.append((step, position))
        if self._grace is not None:
            self._grace.step_is_over()

    def _finish_saves(self) -> int | None:
        self.phase("finish_saves")
        return self.saves[-1][0] if self.saves else None

    def _keep(
        self,
        step: int,
        *,
        validation_loss: float | None,
        healthy: bool,
        wait: bool,
        unsaid: dict[str, Any] | None,
    ) -> bool:
        if self.fenced:
            raise FencedError("a later incarnation owns the run")
        self.phase("save")
        self.unsaid.append(unsaid)
        self.saves.append((step, validation_loss, healthy))
        self.waits.append(wait)
        return self._save(step)


def made_training(batches: Batches, batch: BatchConfig = SMALL) -> TrainStep:
    config = RunConfig(
        seed=5,
        model=ModelConfig(n_layer=1, n_head=2, n_embd=16, context=8),
        schedule=ScheduleConfig(max_steps=50, warmup_steps=2),
        batch=batch,
    )
    return build_training(config, World(0, 1, CPU, "none"), batches)


def recorder(batches: Batches, **options: Any) -> Recorder:
    return Recorder(made_training(batches), batches, **options)


def test_after_a_step_come_evaluation_samples_metrics_and_save(batches: Batches) -> None:
    recorded = recorder(batches)
    loop = recorded.loop(
        2,
        eval_interval_steps=1,
        sample_interval_steps=1,
        save_interval_steps=1,
        log_interval_steps=1,
    )
    assert loop.run(0, 0)
    after = ["evaluate", "sample", "record", "save"]
    assert recorded.events == [
        *[(0, phase) for phase in STEP],
        *[(1, phase) for phase in after],
        *[(1, phase) for phase in STEP],
        *[(2, phase) for phase in after],
    ]


def test_each_happens_at_its_interval_and_at_the_end(batches: Batches) -> None:
    recorded = recorder(batches)
    loop = recorded.loop(
        13,
        eval_interval_steps=4,
        sample_interval_steps=6,
        save_interval_steps=5,
        log_interval_steps=3,
    )
    assert loop.run(0, 0)
    assert recorded.steps_of("evaluate") == [4, 8, 12, 13]
    assert recorded.steps_of("sample") == [6, 12, 13]
    assert recorded.steps_of("save") == [5, 10, 13]
    assert [row["step"] for row in recorded.rows] == list(range(1, 14))
    assert [row["step"] for row in recorded.rows if "validation_loss" in row] == [4, 8, 12, 13]
    assert [row["step"] for row in recorded.rows if "samples" in row] == [6, 12, 13]


def test_an_interval_of_0_switches_off_even_at_the_end_but_the_last_save(batches: Batches) -> None:
    recorded = recorder(batches)
    assert recorded.loop(3).run(0, 0)
    assert recorded.steps_of("evaluate") == []
    assert recorded.steps_of("sample") == []
    assert recorded.saves == [(3, None, True)]
    assert set(recorded.rows[-1]) == {
        "step",
        "loss",
        "learning_rate",
        "gradient_norm",
        "tokens_per_second",
        *("loss/code", "loss/web", "tokens/code", "tokens/web"),
    }


def test_a_save_is_told_the_validation_loss_of_its_step(batches: Batches) -> None:
    recorded = recorder(batches)
    assert recorded.loop(5, eval_interval_steps=2, save_interval_steps=1).run(0, 0)
    losses = {row["step"]: row.get("validation_loss") for row in recorded.rows}
    assert [loss for _, loss, _ in recorded.saves] == list(losses.values())
    assert [step for step, loss in losses.items() if loss is not None] == [2, 4, 5]


def test_the_validation_loss_is_that_of_the_model_after_the_step(batches: Batches) -> None:
    recorded = recorder(batches)
    assert recorded.loop(2, eval_interval_steps=1).run(0, 0)
    windows, sources, learn = held_out(batches, 4, ["code", "web"])
    expected = evaluate(
        recorded.training.model,
        recorded.training.model,
        windows,
        sources,
        learn,
        micro_batch_size=16,
        precision="fp32",
        device=CPU,
        rank=0,
        world_size=1,
        gather=lambda value: [value],
    )
    assert sorted(expected)[:3] == [
        "validation_loss",
        "validation_loss/code",
        "validation_loss/web",
    ]
    assert expected.items() <= recorded.rows[-1].items()


def test_held_out_windows_are_those_of_all_sources_in_order(batches: Batches) -> None:
    windows, sources, learn = held_out(batches, 3, ["code", "web"])
    assert learn is None
    assert sources == ["code"] * 3 + ["web"] * 3
    expected = np.concatenate([batches.validation_rows(3)[name] for name in ("code", "web")])
    assert windows.tolist() == expected.tolist()


@pytest.fixture(scope="module")
def edited(batches: Batches, tmp_path_factory: pytest.TempPathFactory) -> Batches:
    """As `batches`, with another source from step 3 on."""
    more = made_source(tmp_path_factory.mktemp("more"), "more", start=9)
    sources = batches.sources | {"more": more}
    plan = batches.plan.appended(segment_of([more], from_step=3))
    return Batches(plan=plan, sources=sources, seed=5, context=8, global_batch_size=2)


def test_an_edit_comes_after_the_save_of_its_step_and_before_the_next(
    batches: Batches, edited: Batches
) -> None:
    recorded = recorder(batches, edits={3: edited})
    assert recorded.loop(5, save_interval_steps=3, eval_interval_steps=1).run(0, 0)
    after = [event for event in recorded.events if event[1] in ("step", "save", "edit", "edited")]
    around = after.index((3, "edit"))
    expected = ["save", "edit", "edited", "step"]
    assert after[around - 1 : around + 3] == [(3, name) for name in expected]


def test_an_edit_is_not_made_where_the_loop_ends(batches: Batches, edited: Batches) -> None:
    for options in ({"stop_at": 3}, {}):
        recorded = recorder(batches, edits={3: edited}, **options)
        recorded.loop(3 if not options else 9).run(0, 0)
        assert recorded.steps_of("edit") == []


def test_evaluation_sees_a_source_from_the_first_step_that_it_is_trained_on(
    batches: Batches, edited: Batches
) -> None:
    """Also when steps before the edit are done again, after a crash: the same metrics."""
    live = recorder(batches, edits={3: edited})
    again = recorder(edited)
    for recorded in (live, again):
        assert recorded.loop(5, eval_interval_steps=1).run(0, 0)
    seen = [["validation_loss/more" in row for row in r.rows] for r in (live, again)]
    assert seen == [[False, False, False, True, True]] * 2
    for one, other in zip(live.rows, again.rows, strict=True):
        one.pop("tokens_per_second"), other.pop("tokens_per_second")
        assert one == other


class Masked:
    """Batches whose source "code" has masks: `learnt` of the 8 targets of a window count."""

    def __init__(self, batches: Batches, learnt: int) -> None:
        self._batches = batches
        self._learnt = learnt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def rows(self, step: int) -> StepRows:
        learn = [self._of(source, 1)[0] for source in self._batches.sources_of(step)]
        return StepRows(self._batches.batch(step), np.stack(learn))

    def validation_learn(self, n: int) -> dict[str, Any]:
        rows = self._batches.validation_rows(n)
        return {name: self._of(name, len(rows[name])) for name in reversed(rows)}

    def _of(self, source: str, count: int) -> Any:
        least = 8 - self._learnt if source == "code" else 0
        return np.broadcast_to(np.arange(8) >= least, (count, 8)).copy()


def test_held_out_masks_belong_to_their_windows(batches: Batches) -> None:
    windows, sources, learn = held_out(Masked(batches, 3), 2, ["code", "web"])  # type: ignore[arg-type]
    assert windows.tolist() == held_out(batches, 2, ["code", "web"])[0].tolist()
    assert learn is not None
    assert learn.sum(dim=1).tolist() == [{"code": 3, "web": 8}[source] for source in sources]


def test_held_out_windows_without_learnt_tokens_are_refused(batches: Batches) -> None:
    with pytest.raises(DataError, match="the 2 validation windows of source 'code' hold no token"):
        held_out(Masked(batches, 0), 2, ["code", "web"])  # type: ignore[arg-type]


def test_a_row_tells_loss_and_tokens_of_each_source(batches: Batches) -> None:
    masked = Masked(batches, 3)
    recorded = recorder(batches, rows=masked.rows)
    assert recorded.loop(6).run(0, 0)
    for step, row in enumerate(recorded.rows):
        sources = batches.sources_of(step)
        learnt = {name: sources.count(name) * n for name, n in (("code", 3), ("web", 8))}
        told = {name: row[f"tokens/{name}"] for name in set(sources)}
        assert told == {name: learnt[name] for name in set(sources)}
        total = sum(row[f"loss/{name}"] * tokens for name, tokens in told.items())
        # Two roundings of float64 each.
        assert row["loss"] == pytest.approx(total / sum(told.values()), rel=1e-12)
    assert {name for row in recorded.rows for name in row if "/" in name} == {
        f"{what}/{name}" for what in ("loss", "tokens") for name in ("code", "web")
    }


def test_a_source_without_learnt_tokens_in_a_step_has_no_loss_there(batches: Batches) -> None:
    recorded = recorder(batches, rows=Masked(batches, 0).rows)
    assert recorded.loop(2, save_interval_steps=1).run(0, 0)
    assert [row["tokens/code"] for row in recorded.rows] == [0, 0]
    assert not any("loss/code" in row for row in recorded.rows)
    assert [row["loss"] for row in recorded.rows] == [row["loss/web"] for row in recorded.rows]
    assert all(healthy for _, _, healthy in recorded.saves)


def test_what_the_data_says_of_itself_is_in_the_row(batches: Batches) -> None:
    waited = iter([0.5, 0.25])
    recorded = recorder(batches, data_metrics=lambda: {"data_wait_seconds": next(waited)})
    assert recorded.loop(2).run(0, 0)
    assert [row["data_wait_seconds"] for row in recorded.rows] == [0.5, 0.25]


def test_each_evaluation_looks_at_the_canary(batches: Batches) -> None:
    recorded = recorder(batches)
    assert recorded.loop(4, eval_interval_steps=2).run(0, 0)
    told = [row.get("validation_canary_nats") for row in recorded.rows]
    assert [found is not None for found in told] == [False, True, False, True]
    assert all(found is None or found < MOST_NATS for found in told)
    assert "validation_canary_loss" in recorded.rows[-1]


def test_rows_come_from_the_position_and_steps_count_on(batches: Batches) -> None:
    recorded = recorder(batches)
    assert recorded.loop(9).run(6, 4)
    assert recorded.positions == [4, 5, 6]
    assert [row["step"] for row in recorded.rows] == [7, 8, 9]


def test_a_loop_in_two_halves_says_the_same_as_one(batches: Batches) -> None:
    config = {"eval_interval_steps": 2, "sample_interval_steps": 3}
    whole, halves = recorder(batches), recorder(batches, stop_at=3)
    assert whole.loop(6, **config).run(0, 0)
    assert not halves.loop(6, **config).run(0, 0)
    second = Recorder(halves.training, batches)
    assert second.loop(6, **config).run(3, 3)
    for row in (rows := [*halves.rows, *second.rows]) + whole.rows:
        del row["tokens_per_second"]
    assert rows == whole.rows


def test_samples_tell_prompt_and_response(
    batches: Batches, caplog: pytest.LogCaptureFixture
) -> None:
    recorded = recorder(batches)
    caplog.set_level(logging.INFO, "trainer.loop")
    prompts = ("def f(", "The ")
    assert recorded.loop(1, sample_interval_steps=1, sample_prompts=prompts).run(0, 0)
    samples = recorded.rows[0]["samples"]
    assert [one["prompt"] for one in samples] == list(prompts)
    assert all(isinstance(one["response"], str) for one in samples)
    assert caplog.text.count("step 1: sample ") == 2


def test_samples_are_drawn_by_seed_step_and_number(batches: Batches) -> None:
    recorded = recorder(batches)
    prompts = ("def f(", "def f(")
    assert recorded.loop(2, sample_interval_steps=2, sample_prompts=prompts).run(0, 0)
    responses = []
    for number, prompt in enumerate(prompts):
        ids = sample(
            recorded.training.model,
            [int(token) for token in batches.tokenizer.encode(prompt)],
            tokens=3,
            temperature=0.7,
            end_of_text=batches.tokenizer.end_of_text,
            key=(5, 2, number),
            precision="fp32",
            device=CPU,
        )
        responses.append(batches.tokenizer.decode(ids))
    assert [one["response"] for one in recorded.rows[-1]["samples"]] == responses
    assert responses[0] != responses[1]


def test_a_prompt_that_the_tokenizer_does_not_know_is_left_out_from_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    letters = CharacterTokenizer("".join(map(chr, range(1000, 1260))))
    source = made_source(tmp_path, "letters", tokenizer=letters)
    batches = Batches(
        plan=plan_of([source]), sources={"letters": source}, seed=5, context=8, global_batch_size=2
    )
    prompts = ("def f(", chr(1001))
    recorder(batches).loop(2, sample_interval_steps=0, sample_prompts=prompts)
    recorder(batches, rank=1).loop(2, sample_interval_steps=2, sample_prompts=prompts)
    assert not caplog.text, "nobody here draws samples"
    recorded = recorder(batches)
    loop = recorded.loop(2, sample_interval_steps=2, sample_prompts=prompts)
    assert """no samples from the prompt "def f(": character 'd' is not among""" in caplog.text
    assert "or give other --sample_prompts" in caplog.text
    assert loop.run(0, 0)
    assert [one["prompt"] for one in recorded.rows[-1]["samples"]] == [chr(1001)]


def test_only_rank_0_draws_samples(batches: Batches) -> None:
    recorded = recorder(batches, rank=1)
    assert recorded.loop(1, sample_interval_steps=1).run(0, 0)
    assert recorded.steps_of("sample") == [1]
    assert "samples" not in recorded.rows[0]


def test_a_save_that_fails_on_the_way_does_not_stop_the_run(batches: Batches) -> None:
    recorded = recorder(batches, save=lambda step: step != 2)
    assert recorded.loop(5, save_interval_steps=1).run(0, 0)
    assert [step for step, _, _ in recorded.saves] == [1, 2, 3, 4, 5]


FAILED = (
    "^step {} could not be saved, for the reason in the warning above; what was committed before "
    "is safe. Start again with the same command when the store works$"
)


def test_a_save_that_fails_at_the_end_is_an_error(batches: Batches) -> None:
    recorded = recorder(batches, save=lambda step: step != 4)
    with pytest.raises(StoreUnavailableError, match=FAILED.format(4)):
        recorded.loop(4, save_interval_steps=1).run(0, 0)


def test_a_save_that_fails_where_the_run_is_asked_to_stop_is_an_error(batches: Batches) -> None:
    recorded = recorder(batches, save=lambda step: False, stop_at=2)
    with pytest.raises(StoreUnavailableError, match=FAILED.format(2)):
        recorded.loop(4).run(0, 0)


def test_only_the_last_step_waits_for_its_save(batches: Batches) -> None:
    recorded = recorder(batches)
    assert recorded.loop(5, save_interval_steps=2).run(0, 0)
    assert recorded.steps_of("save") == [2, 4, 5]
    assert recorded.waits == [False, False, True]


def test_a_save_due_while_one_is_in_flight_is_made_once_at_the_first_step_after(
    batches: Batches,
) -> None:
    """In flight in steps 3 to 7: what is due at 4 and 6 is one save, at step 8."""
    recorded = recorder(batches, saving=lambda step: 3 <= step <= 7)
    assert recorded.loop(11, save_interval_steps=2).run(0, 0)
    assert recorded.steps_of("put_off") == [4]
    assert recorded.steps_of("save") == [2, 8, 10, 11]


def test_a_save_put_off_is_made_though_none_is_due_then(batches: Batches) -> None:
    recorded = recorder(batches, saving=lambda step: step in (4, 8))
    assert recorded.loop(10, save_interval_steps=4).run(0, 0)
    assert recorded.steps_of("put_off") == [4, 8]
    assert recorded.steps_of("save") == [5, 9, 10]


@pytest.mark.parametrize("stop_at", [3, 10**9])
def test_where_the_loop_ends_a_save_in_flight_puts_nothing_off(
    stop_at: int, batches: Batches
) -> None:
    recorded = recorder(batches, saving=lambda step: True, stop_at=stop_at)
    assert recorded.loop(5).run(0, 0) == (stop_at > 5)
    assert recorded.steps_of("put_off") == []
    assert [step for step, _, _ in recorded.saves] == [min(5, stop_at)]
    assert recorded.waits == [True]


def test_a_save_put_off_is_not_made_again_where_the_run_is_asked_to_stop(batches: Batches) -> None:
    recorded = recorder(batches, saving=lambda step: step <= 3, stop_at=3)
    assert not recorded.loop(9, save_interval_steps=2).run(0, 0)
    assert recorded.steps_of("put_off") == [2]
    assert recorded.steps_of("save") == [3]


def test_a_save_due_by_the_clock_of_any_process_is_made(batches: Batches) -> None:
    recorded = recorder(batches, save_due=lambda step: step in (2, 3, 5), saving=lambda s: s == 5)
    assert recorded.loop(7).run(0, 0)
    assert recorded.steps_of("put_off") == [5]
    assert recorded.steps_of("save") == [2, 3, 6, 7]


def test_a_save_put_off_over_a_loss_that_is_not_finite_is_not_called_healthy(
    batches: Batches,
) -> None:
    recorded = poisoned(batches, {3}, saving=lambda step: step in (2, 3))
    assert recorded.loop(6, save_interval_steps=2).run(0, 0)
    assert recorded.saves == [(4, None, False), (6, None, True)]


def test_a_request_to_stop_saves_the_step_and_ends(batches: Batches) -> None:
    recorded = recorder(batches, stop_at=2)
    assert not recorded.loop(9).run(0, 0)
    assert recorded.events[-2:] == [(2, "record"), (2, "save")]
    assert [step for step, _, _ in recorded.saves] == [2]


def test_a_request_to_stop_at_the_last_step_leaves_a_complete_run(batches: Batches) -> None:
    recorded = recorder(batches, stop_at=3)
    assert recorded.loop(3).run(0, 0)
    assert [step for step, _, _ in recorded.saves] == [3]


def test_a_run_that_is_already_complete_does_nothing(batches: Batches) -> None:
    recorded = recorder(batches)
    assert recorded.loop(3).run(3, 3)
    assert recorded.events == []


def test_a_fenced_run_ends_at_the_next_save(batches: Batches) -> None:
    recorded = recorder(batches)
    recorded.fenced = True
    with pytest.raises(FencedError, match="a later incarnation owns the run"):
        recorded.loop(9, log_interval_steps=2, save_interval_steps=2).run(0, 0)
    assert [row["step"] for row in recorded.rows] == [1, 2]
    assert recorded.saves == []


def poisoned(batches: Batches, bad: set[int], **options: Any) -> Recorder:
    """Losses of the given steps are not finite; a loss scaler then skips the update."""
    training = made_training(batches)
    training.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=True)
    recorded = Recorder(training, batches, **options)

    def forward(tokens: Tensor) -> Tensor:
        logits: Tensor = training.model(tokens)
        step = len(recorded.positions)
        return logits * math.nan if step in bad else logits

    training.forward = forward
    return recorded


def test_a_save_after_a_loss_that_is_not_finite_is_not_called_healthy(batches: Batches) -> None:
    recorded = poisoned(batches, {2, 5})
    assert recorded.loop(8, save_interval_steps=3).run(0, 0)
    assert recorded.saves == [(3, None, False), (6, None, False), (8, None, True)]


def test_a_failed_save_does_not_make_the_next_healthy(batches: Batches) -> None:
    recorded = poisoned(batches, {2}, save=lambda step: step != 3)
    assert recorded.loop(9, save_interval_steps=3).run(0, 0)
    assert recorded.saves == [(3, None, False), (6, None, False), (9, None, True)]


def test_people_are_told_loss_speed_and_what_is_left(
    batches: Batches, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trainer.loop")
    assert recorder(batches).loop(4, log_interval_steps=2).run(0, 0)
    line = r"step 2/4  loss \d\.\d{4}  rate 4\.00e-03  norm \d+\.\d\d  [\d,]+ tokens/s  ETA 0:00:0"
    assert re.search(line, caplog.text)
    assert len(caplog.records) == 2
    assert recorder(batches).loop(4, log_interval_steps=0).run(0, 0)
    assert len(caplog.records) == 3, "0 switches it off, but for the last step"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_windows": 0}, "eval_windows and .* must be at least 1; got 0 and 16"),
        ({"eval_micro_batch_size": 0}, "must be at least 1; got 64 and 0"),
        ({"log_interval_steps": -1}, "an interval cannot be negative; got -1"),
        ({"eval_interval_steps": -1}, "an interval cannot be negative; got -1"),
        ({"sample_interval_steps": -2}, "an interval cannot be negative; got -2"),
        ({"save_interval_steps": -3}, "an interval cannot be negative; got -3"),
        ({"sample_temperature": -0.5}, r"sample_temperature must be a number from 0; got -0\.5"),
    ],
)
def test_impossible_intervals_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LoopConfig(**changes)
