"""The benchmarks run, and write what docs/benchmarks.md and its readers rely on."""

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import goodput
from benchmarks.data_contestants import installed
from benchmarks.data_parts import drift, equal_share, wrong_samples
from benchmarks.data_registry import MAKERS
from benchmarks.measuring import Row, markdown
from benchmarks.restart_programs import Program
from benchmarks.restart_replicas import samples_of
from checkpointing.beats import BEAT_SECONDS

ROOT = Path(__file__).resolve().parents[1]


def test_the_checkpoint_benchmark_writes_its_figures_and_leaves_no_files(tmp_path: Path) -> None:
    answer, folder = tmp_path / "figures.json", tmp_path / "disk"
    folder.mkdir()
    subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks/checkpoint.py", "--size=small", "--repeats=1"),
            *("--parts", "saving", "loading", "--contestants", "torch.save", "rangeflow"),
            "rangeflow, process prototype",
            *("--folder", folder, "--json", answer),
        ],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    found = json.loads(answer.read_text())
    assert set(found) == {"machine", "claims", "table"}
    assert found["machine"]["size"] == "small"
    assert all(set(c) == {"name", "value", "unit", "target", "holds"} for c in found["claims"])
    assert {row["figure"] for row in found["table"]} == {
        *("quiet step", "blocked", "effective stall", "time to durable", "blocked, first save"),
        *("load, warm", "load, cold"),
        *("load and put in place, warm", "load and put in place, cold"),
    }
    for row in found["table"]:
        assert row["lowest"] <= row["median"] <= row["highest"]
        assert len(row["values"]) == 1
    assert list(folder.iterdir()) == []


@pytest.mark.soak
def test_the_data_benchmark_writes_its_figures_and_names_what_it_left_out(tmp_path: Path) -> None:
    answer, folder = tmp_path / "figures.json", tmp_path / "disk"
    folder.mkdir()
    absent = [name for name in MAKERS if not installed(MAKERS[name]())][:1]
    subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks/data.py", "--repeats=1", "--seconds=0.05"),
            *("--parts", "throughput", "start", "mixture", "resume"),
            *("--contestants", "rangeflow", *absent, "--tokens=500000", "--context=16"),
            *("--batch=8", "--far=100000", "--samples=4000", "--folder", folder, "--json", answer),
        ],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    found = json.loads(answer.read_text())
    assert found["machine"]["not measured"] == [f"{name}: not installed" for name in absent]
    rows = {row["figure"]: row["median"] for row in found["table"]}
    assert rows.pop("throughput, T=16") > 0
    assert rows.pop("drift of the mixture") <= 0.75
    assert rows.pop("equal batches after a resume") == 1
    assert rows.pop("samples skipped or repeated by a resume") == 0
    assert all(figure.startswith("first batch at") for figure in rows)
    assert len(rows) == 6
    assert list(folder.iterdir()) == []


def test_a_resume_that_starts_anew_is_not_told_as_equal() -> None:
    """The negative control of the benchmark's measure: it can tell a difference."""
    expected, again = [["a", "b"], ["c", "d"]], [["a", "b"], ["a", "b"]]
    assert equal_share(expected, expected) == 1
    assert equal_share(expected, again) == 0.5
    assert wrong_samples(expected, again) == 2


def test_drift_is_told_in_samples_at_the_worst_prefix() -> None:
    assert drift([[0, 0], [1, 2, 0, 1, 0, 1, 2, 0]]) == 1


def made_traces(folder: Path) -> list[str]:
    """Two single hosts and one gang of four, for --traces."""
    folder.mkdir()
    for name, data in (
        ("a", [1] * 40 + [0] * 3 + [1] * 20),
        ("b", [0, 1] * 10),
        ("c", [4] * 20 + [2] * 9 + [4] * 20),
    ):
        content = {"metadata": {"gap_seconds": 300}, "data": data}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return ["--traces", str(folder), "--restart_seconds=6", "--step_seconds", "1"]


def test_the_goodput_benchmark_writes_its_figures(tmp_path: Path) -> None:
    answer = tmp_path / "figures.json"
    assert goodput.main([*made_traces(tmp_path / "traces"), "--json", str(answer)]) == 0
    found = json.loads(answer.read_text())
    assert set(found) == {"machine", "claims", "table"}
    assert [claim["name"] for claim in found["claims"]] == [
        "single, steps of 1 s: goodput, mean over traces",
        "single, steps of 1 s: goodput, worst trace",
        "traces on which an alternative is as good, all modes and steps",
    ]
    assert found["claims"][2]["holds"]
    assert {row["figure"]: len(row["values"]) for row in found["table"]} == {
        "single, steps of 1 s": 2,
        "gang, steps of 1 s": 1,
        "elastic, steps of 1 s": 1,
    }


def test_the_goodput_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="there is no matplotlib here")
    place = tmp_path / "plot.png"
    assert goodput.main([*made_traces(tmp_path / "traces"), "--plot", str(place)]) == 0
    assert place.read_bytes().startswith(b"\x89PNG")


def test_an_alternative_that_is_as_good_is_counted() -> None:
    """The negative control of the claim that ours is ahead on every trace."""
    rows = [
        Row(figure="gang", contestant=name, values=values, unit="%")
        for name, values in (
            (goodput.OURS, (99.0, 98.0)),
            ("other", (98.0, 98.0)),
            ("if it were", (100.0, 100.0)),
        )
    ]
    (claim,) = goodput.claims(rows)
    assert (claim.value, claim.holds) == (1, False)


@pytest.mark.soak
def test_the_goodput_benchmark_measures_a_restart_of_the_real_program(tmp_path: Path) -> None:
    rows = {row.figure: row.median for row in goodput.restarts(tmp_path, repeats=1)}
    assert min(rows.values()) > 0
    assert rows[goodput.AT_ONCE] >= 2 * BEAT_SECONDS


def test_the_scale_benchmark_writes_its_figures(tmp_path: Path) -> None:
    answer = tmp_path / "figures.json"
    subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks/data_scale.py", "--sizes", "100", "30000"),
            *("--shard_tokens", "20000", "--repeats=1", "--json", answer),
            "--tokenizer=bytes",
        ],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    found = json.loads(answer.read_text())
    assert set(found) == {"machine", "claims", "table"}
    assert len(found["claims"]) == 4
    assert {row["contestant"] for row in found["table"]} == {"100 shards", "30,000 shards"}
    assert {row["figure"] for row in found["table"]} >= {"open", "resume", "peak memory"}


def test_a_table_for_a_document_has_a_line_a_figure_and_a_column_a_contestant() -> None:
    rows = [
        Row(figure="time", contestant="a", values=(1.5, 2.0, 4.25), unit="s"),
        Row(figure="time", contestant="b", values=(3.0,), unit="s", note="cut"),
        Row(figure="lost", contestant="b", values=(0.0, 2.0), unit="samples"),
    ]
    assert markdown(rows).splitlines() == [
        "| | a | b |",
        "|---|---|---|",
        "| time | 2.00 s (1.50..4.25) | 3 s (3..3) cut |",
        "| lost |  | 1 samples (0..2) |",
    ]


RANKS = """
import os, subprocess, sys, time
tell = "import os, time; os.write(1, b'step 7/9 done' + bytes([10])); time.sleep(600)"
child = [sys.executable, "-c", tell]
for rank in "10":
    subprocess.Popen(child, env={**os.environ, "RANK": rank}, start_new_session=True)
time.sleep(600)
"""


def test_a_program_under_measurement_knows_its_ranks_and_leaves_none_behind() -> None:
    with Program([sys.executable, "-c", RANKS]) as program:
        first = program.line(lambda line: line.step == 7)
        program.line(lambda line: line.step == 7 and line is not first)
        ranks = program.ranks()
        told = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in ranks]
        assert [b"RANK=0" in told[0], b"RANK=1" in told[1]] == [True, True]
        assert program.highest_step() == 7
        ends = [os.pidfd_open(pid) for pid in ranks]
    for end in ends:  # one that was killed may take an instant to end
        assert select.select([end], [], [], 60.0)[0] == [end]
        os.close(end)


def test_samples_of_steps_that_were_not_committed_count_as_not_trained_on() -> None:
    told = [
        {"step": 1, "samples": [0, 1], "committed": True, "replicas": 2},
        {"step": 1, "samples": [2, 3], "committed": True, "replicas": 2},
        {"step": 1, "samples": [4, 5], "committed": False, "replicas": 1},
        {"step": 2, "samples": [4, 1], "committed": True, "replicas": 1},
        {"step": 2, "samples": [], "committed": True, "replicas": 1},
        {"step": 3, "samples": [6, 7], "committed": True, "replicas": 1},
    ]
    lines = ["noise", *(json.dumps(one) for one in told)]
    assert samples_of(lines, steps=2) == {
        "samples that were to be trained on, and were not": 32.0 - 5,
        "samples trained on more than once": 1.0,
        "steps made of half a batch": 1.0,
    }


@pytest.mark.soak
def test_the_restart_benchmark_tells_where_the_time_of_a_restart_goes(tmp_path: Path) -> None:
    answer, folder = tmp_path / "figures.json", tmp_path / "disk"
    folder.mkdir()
    subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks/restart.py", "--repeats=1"),
            *("--parts", "one-host", "--folder", folder, "--json", answer),
        ],
        check=True,
        cwd=tmp_path,
    )
    table = json.loads(answer.read_text())["table"]
    ours = {r["figure"]: r["median"] for r in table if r["contestant"] == "rangeflow, supervised"}
    stages = sum(seconds for figure, seconds in ours.items() if figure[0].isdigit())
    assert stages == pytest.approx(ours["kill to the first new step"])
    assert ours["steps done again"] >= 9
    assert list(folder.iterdir()) == []
