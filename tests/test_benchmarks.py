"""The benchmarks run, and write what docs/benchmarks.md and its readers rely on."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_checkpoint_benchmark_writes_its_figures_and_leaves_no_files(tmp_path: Path) -> None:
    answer, folder = tmp_path / "figures.json", tmp_path / "disk"
    folder.mkdir()
    subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks/checkpoint.py", "--size=small", "--repeats=1"),
            *("--parts", "saving", "loading", "--contestants", "torch.save", "rangeflow"),
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
    }
    for row in found["table"]:
        assert row["lowest"] <= row["median"] <= row["highest"]
        assert len(row["values"]) == 1
    assert list(folder.iterdir()) == []
