"""The prepare command: its help, its exit codes, its one-line errors."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_service.prepare import main
from data_service.source import open_source

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"Paragraph {n} of the text." for n in range(3000)))
    return str(path)


def test_a_text_becomes_a_source(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main([text, "--out", out, "--shard-tokens", "20000", "--validation_permille=100"]) == 0
    assert f"train with --data NAME={out}" in capsys.readouterr().out
    source = open_source("a", out)
    assert source.tokenizer.name == "bytes"
    assert len(source.shards("train")) > 2
    assert source.index.stamp.permille == 100


def test_json_says_what_was_made(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main([text, "--out", out, "--tokenizer", "chars", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["tokenizer"] == "characters"
    assert said["fingerprint"] == open_source("a", out).fingerprint
    assert set(open_source("a", out).tokenizer.decode(range(3))) <= set("\n .0123456789")


def test_the_embedded_reference_needs_no_inputs(tmp_path: Path) -> None:
    assert main(["--embedded", "reference", "--out", str(tmp_path)]) == 0
    assert open_source("reference", str(tmp_path)).index.stamp.permille == 50


def test_json_lines_with_another_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "hello"}\n' * 50)
    arguments = [str(tmp_path / "a.jsonl"), "--text_field", "content"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere", "--out", "OUT"], "error: /nowhere: there is no such file or folder"),
        (["x" * 300, "--out", "OUT"], r"error: x+: cannot be read \(File name too long"),
        (["--out", "OUT"], "error: name what to prepare"),
        (["TEXT", "--embedded", "python", "--out", "OUT"], "error: name what to prepare"),
        (["TEXT"], "error: .*--out"),
        (["TEXT", "--out", "OUT", "--shards", "3"], "error: .*--shards"),
        (["TEXT", "--out", "OUT", "--shard_tokens", "many"], "error: .*many"),
        (["TEXT", "--out", "OUT", "--shard_tokens", "0"], "error: shard_tokens must be at least"),
        (["TEXT", "--out", "OUT", "--validation_permille", "0"], "error: validation_permille must"),
        (["TEXT", "--out", "nosuch://place"], "error: .*nosuch"),
        (["TEXT", "--out", "OUT", "--validation_tail", "0"], "error: validation_tail must"),
        (
            ["TEXT", "--out", "OUT", "--validation_tail", "9", "--validation_permille", "9"],
            "error: --validation_tail says where",
        ),
        (["TEXT", "--out", "OUT", "--format", "chats"], "error: .*--format"),
        (["TEXT", "--out", "OUT", "--tokenizer", "words"], "error: tokenizer must be one of"),
        (["TEXT", "--out", "OUT", "--workers", "0"], "error: workers must be at least 1"),
        (["TEXT", "--out", "OUT", "--max_words", "0"], "error: max_words must be at least 1"),
        (["TEXT", "--out", "OUT", "--tokenizer_of", "/nowhere"], "error: .*there is no data here"),
        (["FOLDER", "--out", "OUT"], r"error: --out .*/out lies in the input .* outside"),
        (["FOLDER", "--out", "FOLDER"], "error: --out .* lies in the input"),
    ],
)
def test_a_mistake_is_one_line_and_78(
    arguments: list[str],
    message: str,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = {"TEXT": text, "OUT": str(tmp_path / "out"), "FOLDER": str(tmp_path)}
    assert main([values.get(argument, argument) for argument in arguments]) == 78
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert re.search(message, said.err)


def test_a_hidden_place_in_the_input_is_not_read_and_may_be_given(
    text: str, tmp_path: Path
) -> None:
    out = str(tmp_path / ".tokens" / "a")
    for _ in range(2):
        assert main([str(tmp_path), "--out", out, "--workers", "1"]) == 0


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "Example:" in said
    assert "--validation_permille" in said
    assert re.search(r"--no_shuffle +Keep the order of the inputs", said)


def test_the_module_is_a_command(text: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_service.prepare", text, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "training" in done.stdout


def test_the_options_of_cleaning_and_chat_reach_the_source(tmp_path: Path) -> None:
    chat = [{"instruction": f"Add {n}", "output": str(n)} for n in range(40)]
    texts = [{"text": f"a\r\nb {n % 9}"} for n in range(60)] + [{"text": "one"}]
    lines = [json.dumps(record) for record in [*chat, *texts]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    out = str(tmp_path / "out")
    options = ["--clean", "--deduplicate", "--min_words", "3", "--tokenizer", "bytes-chat"]
    assert main([str(tmp_path / "a.jsonl"), "--out", out, *options]) == 0
    source = open_source("a", out)
    entries = [entry for split in ("train", "validation") for entry in source.shards(split)]
    whole = "".join(source.tokenizer.decode(source.tokens(e.name, 0, e.tokens)) for e in entries)
    assert whole.count("<|im_start|>assistant") == 40
    assert sum(whole.count(f"a\nb {n}<|endoftext|>") for n in range(9)) == 9
    assert "one" not in whole
    assert "\r" not in whole


def test_characters_are_those_of_the_parts_that_are_kept(tmp_path: Path) -> None:
    """A long text is cut into parts, and how it is cut decides which of them are left out."""
    parts = [chr(0x4E00 + n) + " w" * (17 * n % 300) for n in range(60)]
    (tmp_path / "a.txt").write_text("\n\n".join(parts))
    arguments = [str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--tokenizer", "chars"]
    options = ["--shard_tokens", "4000", "--max_words", "1700", "--workers", "1"]
    assert main([*arguments, *options]) == 0


def test_order_is_kept_where_asked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{n:03d}"}}\n' for n in range(300)))
    orders = []
    for more in ([], ["--no_shuffle"]):
        out = str(tmp_path / f"out{len(more)}")
        assert main([str(tmp_path / "a.jsonl"), "--out", out, "--shard_tokens=200", *more]) == 0
        source = open_source("a", out)
        shards = source.shards("train")
        text = "".join(source.tokenizer.decode(source.tokens(e.name, 0, e.tokens)) for e in shards)
        orders.append(text.split("<|endoftext|>")[:-1])
    assert orders[0] != sorted(orders[0])
    assert orders[1] == sorted(orders[0])
