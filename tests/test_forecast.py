"""The forecast's numbers are those of a brute-force count; warnings come when they must."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_service.forecast import PlanArguments, forecast, main
from data_service.plan import Plan
from data_service.source import Source
from storage.store import open_store
from tests.made_data_runs import DataRun
from tests.made_sources import made_source, plan_of, segment_of, write_source
from tests.programs import ROOT, train_here
from trainer.model import ModelConfig, parameter_count

RAMP = [[(0, 900_000), (80, 200_000)], [(0, 100_000), (80, 800_000)]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        "code": made_source(folder, "code", train=(400, 33, 250, 9, 3), start=5),
        "web": made_source(folder, "web", train=(901, 700), start=90),
    }


@pytest.fixture
def run(tmp_path: Path, sources: dict[str, Source]) -> DataRun:
    return DataRun(str(tmp_path / "run"), sources, plan_of(list(sources.values()), RAMP))


def told_of(found: dict[str, Any], name: str) -> dict[str, Any]:
    (told,) = [told for told in found["sources"] if told["source"] == name]
    return dict(told)


def test_tokens_samples_and_epochs_are_those_of_a_count(run: DataRun) -> None:
    run.save(20)
    found = forecast(PlanArguments(run=run.place, max_steps=90))
    seen = Counter(sample[0] for step in range(90) for sample in run.batches.sample_ids(step))
    done = Counter(sample[0] for step in range(20) for sample in run.batches.sample_ids(step))
    epochs = {
        name: len({s for step in range(90) for s in run.batches.sample_ids(step) if s[0] == name})
        for name in seen
    }
    assert (found["begun"], found["steps_done"], found["tokens"]) == (True, 20, 90 * 6 * 8)
    for name in ("code", "web"):
        told = told_of(found, name)
        assert told["samples"] == seen[name] == epochs[name]
        assert told["samples_done"] == done[name]
        assert told["tokens"] == seen[name] * 8
        shards = run.sources[name].shards("train")
        windows = sum((entry.tokens - 1) // 8 for entry in shards)
        assert told["windows"] == windows and told["epochs"] == seen[name] / windows
        assert told["unread_tokens"] == sum(e.tokens for e in shards) - windows * 8
        files = [Path(run.sources[name].url, f"{entry.name}.npy") for entry in shards]
        assert told["bytes"] == sum(file.stat().st_size for file in files)
        assert told["largest_shard_bytes"] == max(file.stat().st_size for file in files)
    assert found["volume"]["remote_bytes"] == 0
    assert found["volume"]["bytes"] == sum(told["bytes"] for told in found["sources"])
    assert found["first_batch_seconds"] > 0


def test_the_length_of_a_run_is_that_of_its_newest_start(run: DataRun) -> None:
    assert forecast(PlanArguments(run=run.place))["max_steps"] == 400


def test_repeats_beyond_four_epochs_are_warned_of(run: DataRun) -> None:
    few = forecast(PlanArguments(run=run.place, max_steps=20, parameters=1))
    assert few["warnings"] == []
    many = forecast(PlanArguments(run=run.place, max_steps=400))
    code = told_of(many, "code")
    assert code["epochs"] > 4
    assert any(
        line.startswith(f"source code: each sample comes {code['epochs']:.1f} times")
        and "Muennighoff" in line
        for line in many["warnings"]
    )


def test_few_tokens_for_a_model_are_warned_of(run: DataRun) -> None:
    tokens = 20 * 6 * 8
    few = forecast(PlanArguments(run=run.place, max_steps=20, parameters=tokens / 19.9))
    assert few["tokens_per_parameter"] == pytest.approx(19.9)
    assert ["Chinchilla" in line for line in few["warnings"]] == [True]
    enough = forecast(PlanArguments(run=run.place, max_steps=20, parameters=tokens / 20.1))
    assert enough["warnings"] == []


def test_a_source_that_is_never_read_is_warned_of(run: DataRun, sources: dict[str, Source]) -> None:
    plan = run.batches.plan
    run.edit(plan.appended(segment_of(list(sources.values()), from_step=30)))
    none = plan_of(list(sources.values()), [[(0, 0)], [(0, 1)]])
    run.edit(none)
    found = forecast(PlanArguments(run=run.place, max_steps=20, parameters=1))
    assert told_of(found, "code")["samples"] == 0
    assert found["warnings"] == [
        "source code: no sample of it is read; its weight is 0 or the run too short"
    ]


def test_a_new_run_is_forecast_from_flags(tmp_path: Path, sources: dict[str, Source]) -> None:
    found = forecast(
        PlanArguments(
            run=str(tmp_path / "new"),
            data=(f"code={sources['code'].url}:1", f"web={sources['web'].url}:3"),
            max_steps=50,
            global_batch_size=4,
            context=8,
        )
    )
    assert not found["begun"] and found["parameters"] is None
    assert told_of(found, "web")["samples"] == 150 and told_of(found, "code")["samples"] == 50
    assert found["mixture"] == [{"step": 0, "shares": {"code": 250_000, "web": 750_000}}]
    assert not (tmp_path / "new").exists(), "a forecast changes nothing"


def test_a_new_run_may_ramp(
    tmp_path: Path, sources: dict[str, Source], capsys: pytest.CaptureFixture[str]
) -> None:
    data = (f"code={sources['code'].url}", f"web={sources['web'].url}")
    shape: dict[str, Any] = {"max_steps": 50, "global_batch_size": 4, "context": 8}
    arguments = PlanArguments(
        run=str(tmp_path / "new"), data=data, weights=("web=0@10,3@30",), **shape
    )
    rows = forecast(arguments)["mixture"]
    assert rows[0] == {"step": 0, "shares": {"code": 1_000_000, "web": 0}}
    assert rows[-1] == {"step": 30, "shares": {"code": 250_000, "web": 750_000}}
    flags = [f"--data={flag}" for flag in data] + [f"--{k}={v}" for k, v in shape.items()]
    assert main([str(tmp_path / "new"), *flags, "--weights=books=1"]) == 78
    assert "--weights books: there is no --data books=URL" in capsys.readouterr().err


def test_a_ramp_is_shown_over_its_steps_also_when_the_run_ends_in_it(run: DataRun) -> None:
    rows = forecast(PlanArguments(run=run.place, max_steps=200))["mixture"]
    assert rows[0] == {"step": 0, "shares": {"code": 900_000, "web": 100_000}}
    assert rows[-1] == {"step": 80, "shares": {"code": 200_000, "web": 800_000}}
    assert 7 <= len(rows) <= 10
    shares = [row["shares"]["code"] for row in rows]
    assert shares == sorted(shares, reverse=True)
    cut = forecast(PlanArguments(run=run.place, max_steps=41))["mixture"]
    assert cut[-1] == {"step": 40, "shares": {"code": 550_000, "web": 450_000}}


def test_segments_of_edits_are_shown_as_far_as_the_run_goes(
    run: DataRun, sources: dict[str, Source]
) -> None:
    plan = plan_of([sources["web"]])
    plan = plan.appended(segment_of(list(sources.values()), from_step=10))
    run.edit(plan.appended(segment_of([sources["code"]], from_step=30)))
    rows = forecast(PlanArguments(run=run.place, max_steps=30))["mixture"]
    assert rows == [
        {"step": 0, "shares": {"web": 1_000_000}},
        {"step": 10, "shares": {"code": 500_000, "web": 500_000}},
    ]


def test_what_an_edit_skips_is_not_seen(run: DataRun, sources: dict[str, Source]) -> None:
    both = segment_of(list(sources.values()), from_step=12)
    run.edit(run.batches.plan.appended(replace(both, skip_steps=5)))
    seen = Counter(sample[0] for step in range(40) for sample in run.batches.sample_ids(step))
    found = forecast(PlanArguments(run=run.place, max_steps=40))
    assert {told["source"]: told["samples"] for told in found["sources"]} == seen


def test_volume_and_rate_of_a_remote_source(sources: dict[str, Source], tmp_path: Path) -> None:
    place = write_source("memory://forecast-web", train=(901, 700), start=90)
    arguments = PlanArguments(
        run=str(tmp_path / "new"),
        data=(f"code={sources['code'].url}", f"web={place}"),
        max_steps=400,
        global_batch_size=6,
        context=8,
        tokens_per_second=1000,
    )
    found = forecast(arguments)
    web = told_of(found, "web")
    volume = found["volume"]
    assert web["remote"] and not told_of(found, "code")["remote"]
    assert volume["remote_bytes"] == volume["download_bytes"] == web["bytes"]
    least = web["bytes"] + web["largest_shard_bytes"]
    assert volume["least_cache_bytes"] == least, "both shards are under way, and one more"
    assert volume["least_cache_download_bytes"] == round(web["bytes"] * web["epochs"])
    assert found["rate"]["read_bytes_per_second"] == pytest.approx(1000 * 2 * 9 / 8)
    per_token = web["bytes"] / (web["windows"] * 8)
    assert found["rate"]["remote_bytes_per_second"] == pytest.approx(500 * per_token, rel=1e-3)
    assert found["rate"]["hours"] == pytest.approx(400 * 6 * 8 / 1000 / 3600)


def test_people_get_tables_and_warnings(run: DataRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([run.place, "--tokens_per_second=5000", "--parameters=1e6"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{run.place}: step 0 of 400 steps of 6 sequences of 8 tokens, 19,200")
    for part in ("tokens to be seen", "90.0%", "0.0 tokens per parameter", "warning: source code"):
        assert part in shown
    assert "the first batch was there after" in shown
    assert main([run.place, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_steps"] == 400


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ((), "has no plan yet, so --data, --max_steps, --global_batch_size, --context must say"),
        (("--max_steps=0",), "--max_steps must be above 0, got 0"),
        (("--max_steps=5", "--tokens_per_second=-1"), "--tokens_per_second must be above 0"),
        (
            ("--data=a=nowhere", "--max_steps=5", "--global_batch_size=2", "--context=4"),
            "source 'a' at nowhere: there is no data here",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(
    flags: tuple[str, ...], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "new"), *flags]) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


def test_what_a_run_keeps_cannot_be_asked_otherwise(
    run: DataRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([run.place, "--context=16"]) == 78
    assert "--context 16: the run has context 8, which it keeps" in capsys.readouterr().err
    assert main([run.place, "--context=8"]) == 0
    assert main([run.place, "--weights=web=1"]) == 78
    assert "--weights is for a new run" in capsys.readouterr().err


def test_a_log_that_does_not_say_how_long_asks_for_it(tmp_path: Path) -> None:
    source = made_source(tmp_path, "web")
    run = DataRun(str(tmp_path / "run"), {"web": source}, plan_of([source]))
    store = open_store(run.place)
    assert store.list("log/")
    assert forecast(PlanArguments(run=run.place, max_steps=3))["max_steps"] == 3


def test_the_contracts_name_runs_it_on_a_real_run(tmp_path: Path, data: tuple[str, ...]) -> None:
    run = tmp_path / "run"
    shape = ("--max_steps=4", "--n_embd=32", "--n_layer=1", "--context=16", "--warmup_steps=1")
    quiet = ("--eval_interval_steps=0", "--sample_interval_steps=0", "--global_batch_size=8")
    assert train_here("--run", run, *shape, *quiet, *data) == 0
    command = [sys.executable, "-m", "data_service.plan", str(run), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["steps_done"], found["max_steps"], found["tokens"]) == (4, 4, 4 * 8 * 16)
    model = ModelConfig(n_layer=1, n_embd=32, context=16)
    assert found["parameters"] == pytest.approx(parameter_count(model, 257), rel=0.15)


def test_the_plan_of_the_contract_is_the_plan(run: DataRun) -> None:
    found = forecast(PlanArguments(run=run.place))
    assert Plan.from_json(run.batches.plan.to_json()).hash == found["plan"]
