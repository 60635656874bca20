"""The operator commands, on real runs and on damaged copies of them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from checkpointing.history import history
from checkpointing.runs import main
from storage.log import Draft, Log
from storage.store import open_store
from tests.programs import ROOT, checkpoints, final_digest, train_here

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "a"
    assert (
        train_here(
            "--run",
            run,
            "--max_steps=6",
            "--n_embd=32",
            "--eval_interval_steps=4",
            "--eval_windows=4",
            "--sample_interval_steps=0",
            "--save_interval_steps=2",
            "--wait_for_saves",
            "--wait_for_saves",
        )
        == 0
    )
    for folder in ("corpus", "tensorboard", ".tmp"):  # nothing here reads them
        shutil.rmtree(run / folder, ignore_errors=True)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to damage."""
    shutil.copytree(trained, tmp_path / "runs" / "a")
    return tmp_path / "runs" / "a"


def said(capsys: Capture) -> Any:
    return json.loads(capsys.readouterr().out)


def append(run: Path, kind: str, index: int) -> None:
    draft = Draft(kind=kind, generation=0, body={"checkpoints": [index]})
    Log(open_store(str(run))).append(lambda _: draft)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def weights_of(run: Path, step: int) -> Path:
    return next(run.glob(f"checkpoints/*/s{step:08d}-*/*.safetensors"))


def test_show_tells_every_checkpoint(run: Path, capsys: Capture) -> None:
    first, second, third = checkpoints(run)
    append(run, "RETIRE", first.index)
    append(run, "QUARANTINE", second.index)
    append(run, "VERIFIED", third.index)
    assert main(["show", str(run), "--json"]) == 0
    found = said(capsys)
    assert found["run"] == json.loads((run / "run.json").read_text())["run"]
    assert (found["generation"], found["complete"], found["damaged_records"]) == (1, True, [])
    states = ("step", "live", "retired", "quarantined", "verified")
    assert [tuple(c[name] for name in states) for c in found["checkpoints"]] == [
        (2, False, True, False, False),
        (4, False, False, True, False),
        (6, True, False, False, True),
    ]
    for checkpoint, entry in zip((first, second, third), found["checkpoints"], strict=True):
        for name in ("index", "step", "digest", "generation", "validation_loss"):
            assert entry[name] == getattr(checkpoint, name)
    assert found["checkpoints"][0]["validation_loss"] is None
    assert found["checkpoints"][1]["validation_loss"] > 0


def test_show_prints_a_table(run: Path, capsys: Capture) -> None:
    assert main(["show", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r".*/a: complete, generation 1, run \w{32}", lines[0])
    assert re.match(r"step +digest +generation +state +validation loss +saved", lines[1])
    assert len(lines) == 5
    digest = checkpoints(run)[1].digest[:12]
    assert re.match(rf"4 +{digest} +1 +live +\d\.\d{{4}} +\d{{4}}-", lines[3])


def test_show_names_damaged_records(run: Path, capsys: Capture) -> None:
    index = checkpoints(run)[0].index
    flip(run / "log" / f"{index:010d}.json")
    assert main(["show", str(run), "--json"]) == 0
    found = said(capsys)
    assert found["damaged_records"] == [index]
    assert [c["step"] for c in found["checkpoints"]] == [4, 6]
    assert main(["show", str(run)]) == 0
    assert f"damaged records of the log, left out: {index}" in capsys.readouterr().out


def test_ls_finds_runs_at_any_depth(run: Path, capsys: Capture) -> None:
    above = run.parent
    unfinished = above / "deep" / "er" / "b"
    shutil.copytree(run, unfinished)
    max(unfinished.glob("log/*")).unlink()  # the END
    (above / "not-a-run.json").write_text("{}")
    assert main(["ls", str(above), "--json"]) == 0
    a, b = said(capsys)
    assert (a["url"], a["step"], a["complete"]) == (str(run), 6, True)
    assert (b["url"], b["step"], b["complete"]) == (str(unfinished), 6, False)
    assert main(["ls", f"{above}/"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"run +step +live +generation +state", lines[0])
    assert re.match(r".*/a +6 +3 +1 +complete", lines[1])
    assert re.match(r".*/deep/er/b +6 +3 +1 +not complete", lines[2])


def test_ls_of_a_run_that_has_just_begun(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "run.json").write_text('{"format":1,"run":"x","identity":{}}')
    assert main(["ls", str(tmp_path), "--json"]) == 0
    assert said(capsys) == [
        {
            "run": "x",
            "url": str(tmp_path),
            "step": None,
            "live": 0,
            "generation": 0,
            "complete": False,
        }
    ]


def test_ls_names_what_it_cannot_read_and_lists_the_rest(run: Path, capsys: Capture) -> None:
    (run.parent / "[b]").mkdir()
    (run.parent / "[b]" / "run.json").write_text('{"format":1,')
    assert main(["ls", str(run.parent)]) == 78
    out = capsys.readouterr().out
    together = "".join(out.split())  # a long path is folded
    assert "/[b]" in together and "run.jsonisdamaged" in together
    assert re.search(r" 6 ", out)


def test_ls_where_nothing_is(tmp_path: Path, capsys: Capture) -> None:
    assert main(["ls", str(tmp_path)]) == 0
    assert f"no run below {tmp_path}" in capsys.readouterr().out
    assert main(["ls", str(tmp_path / "typo")]) == 78
    assert re.fullmatch(r"error: there is no folder .*typo; give the .*\n", capsys.readouterr().err)


def test_verify_of_a_whole_run_changes_nothing(run: Path, capsys: Capture) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["verify", str(run)]) == 0
    assert "3 of 3 checkpoints are whole" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_verify_names_the_damaged_object(run: Path, capsys: Capture) -> None:
    path = weights_of(run, 4)
    flip(path)
    assert main(["verify", str(run), "--record"]) == 78
    out = capsys.readouterr().out
    assert f"step 4: DAMAGED, {path.relative_to(run)} is damaged: bytes 0 and following of " in out
    assert "step 2: whole, recorded\n" in out
    assert "2 of 3 checkpoints are whole" in out
    assert [c.verified for c in checkpoints(run)] == [True, False, True]
    assert main(["verify", str(run), "--json"]) == 78
    found = said(capsys)
    assert [c["verdict"] for c in found["checkpoints"]] == ["whole", "damaged", "whole"]
    assert str(path.relative_to(run)) in found["checkpoints"][1]["damage"]


@pytest.mark.parametrize("name", ["r000-p00.safetensors", "manifest.json"])
def test_verify_names_what_is_missing(name: str, run: Path, capsys: Capture) -> None:
    (weights_of(run, 6).parent / name).unlink()
    assert main(["verify", str(run)]) == 78
    assert re.search(rf"step 6: DAMAGED, checkpoints/.*/{name} is missing", capsys.readouterr().out)


def test_record_lifts_a_quarantine_and_is_written_once(run: Path, capsys: Capture) -> None:
    first = checkpoints(run)[0]
    append(run, "QUARANTINE", first.index)
    assert main(["verify", str(run)]) == 0
    assert "step 2: whole, and in quarantine; --record lifts that" in capsys.readouterr().out
    assert [c.step for c in checkpoints(run)] == [4, 6]
    assert main(["verify", str(run), "--record"]) == 0
    assert [c.step for c in checkpoints(run)] == [2, 4, 6]
    records = Log(open_store(str(run))).refresh()
    verified = [r for r in records if r.kind == "VERIFIED"]
    assert [(r.generation, len(r.body["checkpoints"])) for r in verified] == [(0, 1)] * 3
    assert history(records).claim is not None
    assert main(["verify", str(run), "--record"]) == 0
    assert len(Log(open_store(str(run))).refresh()) == len(records)


def test_a_retired_checkpoint_is_not_read(run: Path, capsys: Capture) -> None:
    first = checkpoints(run)[0]
    append(run, "RETIRE", first.index)
    shutil.rmtree(weights_of(run, 2).parent)
    assert main(["verify", str(run)]) == 0
    assert "2 of 2 checkpoints are whole" in capsys.readouterr().out


def test_a_record_damaged_later_is_damage_and_a_voided_one_is_not(
    run: Path, capsys: Capture
) -> None:
    torn = len(list(run.glob("log/*"))) + 1
    (run / "log" / f"{torn:010d}.json").write_text('{"torn')
    append(run, "VERIFIED", checkpoints(run)[-1].index)
    assert main(["verify", str(run)]) == 0
    flip(run / "log" / "0000000002.json")
    capsys.readouterr()
    assert main(["verify", str(run), "--json"]) == 78
    assert said(capsys)["damaged_records"] == [2]
    assert main(["verify", str(run)]) == 78
    assert "damaged records of the log: 2" in capsys.readouterr().out


def test_one_checkpoint_may_be_verified_alone(run: Path, capsys: Capture) -> None:
    first = checkpoints(run)[0]
    append(run, "QUARANTINE", first.index)
    flip(weights_of(run, 6))
    for name, step, verdict, code in (
        ("4", 4, "whole", 0),
        ("latest", 6, "damaged", 78),
        ("best", 6, "damaged", 78),
        ("2", 2, "whole", 0),
    ):
        assert main(["verify", str(run), "--step", name, "--json"]) == code
        assert [(c["step"], c["verdict"]) for c in said(capsys)["checkpoints"]] == [(step, verdict)]
    assert main(["verify", str(run), "--step=2", "--record"]) == 0
    assert "step 2: whole, recorded\n1 of 1 checkpoints are whole" in capsys.readouterr().out


def test_pin_show_unpin(run: Path, capsys: Capture) -> None:
    index = checkpoints(run)[0].index
    assert main(["pin", str(run), "2", "--reason", "the paper\x1b[2J"]) == 0
    assert re.fullmatch(r"step 2 is pinned, digest \w{12}\n", capsys.readouterr().out)
    assert main(["pin", str(run), "2", "--json"]) == 0
    told = said(capsys)
    assert (told["step"], told["index"]) == (2, index)
    assert main(["show", str(run), "--json"]) == 0
    told = said(capsys)
    assert [c["pinned"] for c in told["checkpoints"]] == [True, False, False]
    assert main(["show", str(run)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^2 .* live, pinned ", shown, re.MULTILINE)
    assert "step 2 is pinned: the paper?[2J\n" in shown
    assert main(["prune", str(run), "--keep_last=2", "--json"]) == 0
    assert said(capsys)["retired"] == []
    assert main(["unpin", str(run), "4"]) == 78
    assert "STEP must be that of a pinned checkpoint (2); got '4'" in capsys.readouterr().err
    assert main(["unpin", str(run), "2"]) == 0
    assert capsys.readouterr().out == "step 2 is not pinned any more\n"
    assert main(["unpin", str(run), "2"]) == 78
    assert "(none); got '2'" in capsys.readouterr().err


def test_prune_tells_first_and_removes_then(run: Path, capsys: Capture) -> None:
    before = sorted(path for path in run.rglob("*") if path.is_file())
    assert main(["prune", str(run)]) == 0
    assert capsys.readouterr().out == (
        "0 objects removed, 0 bytes (keep_last 3, keep_every_steps 0)\n"
    )
    assert main(["prune", str(run), "--dry-run", "--keep-last=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"step +generation +why +objects +size", lines[0])
    assert re.match(r"2 +1 +retired now +2 +[\d.]+ kB", lines[1])
    assert re.fullmatch(r"2 objects would be removed, [\d.]+ kB \(keep_last 2, .*\)", lines[2])
    assert sorted(path for path in run.rglob("*") if path.is_file()) == before
    assert main(["prune", str(run), "--keep_last=2", "--json"]) == 0
    told = said(capsys)
    assert (told["retired"], told["objects"], told["dry_run"]) == ([2], 2, False)
    assert [c.step for c in checkpoints(run)] == [4, 6]
    assert main(["prune", str(run), "--keep_last=1"]) == 78
    assert "keep_last must be at least 2" in capsys.readouterr().err


def test_what_an_operator_does_while_it_trains_changes_no_bits(
    tmp_path: Path, data: tuple[str, ...], capsys: Capture
) -> None:
    """Every command at every phase of saving and retiring, beside the real program."""
    shape = (*data, "--max_steps=6", "--n_embd=32", "--context=32", "--eval_interval_steps=0")
    every = (
        "--wait_for_saves",
        "--sample_interval_steps=0",
        "--save_interval_steps=1",
        "--keep_last=3",
    )
    assert train_here("--run", tmp_path / "alone", *shape, *every) == 0
    run, copy = str(tmp_path / "run"), str(tmp_path / "copy")
    commands = (
        ("show", run),
        ("pin", run, "latest"),
        ("prune", run, "--keep_last=2"),
        ("verify", run, "--record", "--step=latest"),
        ("copy", run, copy),
        ("doctor", run),
    )
    ran = 0

    def listener(phase: str, step: int) -> None:
        nonlocal ran
        if step < 2 or not phase.startswith(("save:", "retire:")):
            return
        command = commands[ran % len(commands)]
        ran += 1
        assert main(list(command)) == 0, capsys.readouterr()

    assert train_here("--run", run, *shape, *every, listener=listener) == 0
    assert ran > 2 * len(commands)
    assert final_digest(run) == final_digest(tmp_path / "alone")
    assert main(["verify", run]) == 0
    assert main(["copy", run, copy]) == 0
    assert main(["verify", copy]) == 0


def test_copy_says_what_it_did(run: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = str(tmp_path / "copy")
    assert main(["copy", str(run), copy]) == 0
    assert re.fullmatch(
        r".*/copy: 3 checkpoints verified, \d+ records, \d+ objects copied \([\d.]+ [kM]B\), "
        r"0 were there already\n",
        capsys.readouterr().out,
    )
    assert main(["copy", str(run), copy, "--json"]) == 0
    told = said(capsys)
    assert (told["copied_objects"], told["copied_bytes"]) == (0, 0)
    assert told["present_objects"] > 6 and told["present_bytes"] > 0
    assert [c["verdict"] for c in told["checkpoints"]] == ["whole"] * 3
    flip(weights_of(run, 4))
    assert main(["copy", str(run), str(tmp_path / "again")]) == 78
    assert "DAMAGED, as in the source: steps 4" in capsys.readouterr().out
    assert main(["copy", str(run), str(tmp_path)]) == 78
    assert re.fullmatch(r"error: .* lie in each other; .*\n", capsys.readouterr().err)


def test_doctor_prints_findings(run: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["doctor", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"looked at +found", lines[0])
    assert any(re.match(r"checkpoints +ok +live at steps 2, 4, 6; none read", n) for n in lines)
    weights_of(run, 6).unlink()
    assert main(["doctor", str(run)]) == 78
    assert re.search(r"^step 6 +WRONG .* is missing; put it", capsys.readouterr().out, re.MULTILINE)
    assert main(["doctor", str(run), "--json"]) == 78
    assert {"name", "ok", "detail"} == set(said(capsys)[0])
    assert main(["doctor", str(tmp_path / "empty")]) == 0
    assert "none here yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"Expected one of \{ls, show, verify, pin, unpin, prune, copy, ask, doctor\}"),
        (["frob", "runs"], r"frob"),
        (["show"], r"RUN"),
        (["show", "FILE"], r"holds no run"),
        (["verify", "FILE/none"], r"holds no run"),
        (["pin", "FILE/none", "latest"], r"holds no run"),
        (["unpin", "FILE/none", "3"], r"holds no run"),
        (["prune", "FILE/none"], r"holds no run"),
        (["copy", "FILE/none", "x"], r"holds no run"),
        (["doctor", "gs://user:secret@b/x"], r"holds credentials"),
        (["copy", "FILE/none", "gs://user:secret@b/x"], r"holds credentials"),
        (["show", "gs://user@secret/x"], r"holds credentials"),
        (["show", "nostore://x"], r"no store for nostore:// URLs"),
    ],
)
def test_a_users_mistake_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("")
    assert main([a.replace("FILE", str(tmp_path / "file")) for a in arguments]) == 78
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{message}.*\n", error), error
    assert "secret" not in error
    assert not (tmp_path / "none").exists()


def test_a_store_that_fails_says_try_again(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "run.json").mkdir()  # as good as a disk that fails, and root meets it too
    assert main(["show", str(tmp_path)]) == 75
    assert re.fullmatch(r"error: .*run.json: Is a directory\n", capsys.readouterr().err)


def test_the_program_returns_its_exit_code_and_needs_no_torch_to_list(run: Path) -> None:
    program = [sys.executable, "-X", "importtime", "-m", "checkpointing.runs"]
    done = subprocess.run([*program, "ls", run.parent], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, "complete" in done.stdout) == (0, True)
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)
    done = subprocess.run(
        [*program[:1], *program[3:], "show", "/none"], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 78
    assert re.fullmatch(r"error: .*\n", done.stderr)
