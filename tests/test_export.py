"""Exported weights give others the same model: transformers' GPT-2 is the reference."""

import errno
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from checkpointing.export import _write_weights, end_of_text, export, main
from checkpointing.history import history
from checkpointing.load import load
from checkpointing.pins import pinned_checkpoints
from data_service.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    Gpt2Tokenizer,
)
from storage.canonical import canonical_json, sha256_hex
from storage.errors import ConfigurationError, IntegrityError
from storage.log import Draft, Log
from storage.store import open_store
from tests.gpt2_reference import TOLERANCE, as_gpt2, logits_of_both
from tests.programs import checkpoints, train_here
from trainer.losses import token_losses
from trainer.model import GPT, ModelConfig
from trainer.sample import sample
from trainer.state import restore_model

TRAINING = (
    "--max_steps=4",
    "--warmup_steps=1",
    "--eval_interval_steps=2",
    "--eval_windows=4",
    "--sample_interval_steps=0",
    "--save_interval_steps=2",
    "--wait_for_saves",
)
PROMPT = list(b"def __init__(self")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("export") / "run"
    assert train_here("--run", run, *TRAINING) == 0
    return run


@pytest.fixture(scope="module")
def run_without_biases(run: Path) -> Path:
    other = run.parent / "no-bias"
    data = f"--data=python={run}/corpus/python"
    assert train_here("--run", other, data, "--no_bias", *TRAINING) == 0
    return other


def ours(run: Path) -> GPT:
    """Our model with the weights of the run's newest checkpoint."""
    identity = json.loads((run / "run.json").read_text())["identity"]
    config = {k.removeprefix("model."): v for k, v in identity.items() if k.startswith("model.")}
    loaded = load(open_store(str(run)), checkpoints(run)[-1])
    model = GPT(ModelConfig(**config), loaded.extra["vocab_size"])
    weights = {k.removeprefix("model."): t for k, t in loaded.tensors.items() if "model." in k}
    restore_model(model, weights)
    return model.eval()


def theirs(folder: Path) -> GPT2LMHeadModel:
    model, report = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("kind", ["run", "run_without_biases"])
def test_transformers_computes_the_same_logits(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run: Path = request.getfixturevalue(kind)
    about = export(str(run), str(tmp_path / "out"))
    model, other = ours(run), theirs(tmp_path / "out")
    expected, found = logits_of_both(model, other)
    assert found.shape == expected.shape == (3, 128, 257)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert about["digest"] == checkpoints(run)[-1].digest
    biases = [t for name, t in other.state_dict().items() if name.endswith(".bias")]
    assert len(biases) == 13
    assert any(bool(bias.any()) for bias in biases) == (kind == "run")


def greedy(model: GPT, prompt: list[int], end_of_text: int) -> list[int]:
    return sample(
        model,
        prompt,
        tokens=50,
        temperature=0.0,
        end_of_text=end_of_text,
        key=(0,),
        precision="fp32",
        device=torch.device("cpu"),
    )


def their_greedy(model: GPT2LMHeadModel, prompt: list[int], end_of_text: int) -> list[int]:
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),
        max_new_tokens=50,
        do_sample=False,
        pad_token_id=end_of_text,
    )
    new: list[int] = found[0, len(prompt) :].tolist()
    return new[: new.index(end_of_text)] if end_of_text in new else new


@pytest.mark.parametrize("kind", ["run", "run_without_biases"])
def test_transformers_generates_the_same_tokens(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run: Path = request.getfixturevalue(kind)
    export(str(run), str(tmp_path / "out"))
    expected = greedy(ours(run), PROMPT, 256)
    assert len(expected) == 50
    assert their_greedy(theirs(tmp_path / "out"), PROMPT, 256) == expected


def test_transformers_repeats_what_a_model_has_learnt() -> None:
    """After four steps a model only says spaces; this one has learnt a random sequence by heart."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, context=64), 70)
    text = torch.randint(69, (1, 53))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(120):
        optimizer.zero_grad()
        token_losses(model(text[:, :-1]), text[:, 1:]).mean().backward()
        optimizer.step()
    prompt, learnt = text[0, :3].tolist(), text[0, 3:].tolist()
    assert greedy(model.eval(), prompt, 69) == learnt
    assert their_greedy(as_gpt2(model), prompt, 69) == learnt


def test_the_config_is_that_of_gpt2(run: Path, tmp_path: Path) -> None:
    export(str(run), str(tmp_path / "out"))
    config = theirs(tmp_path / "out").config
    assert config.architectures == ["GPT2LMHeadModel"]
    assert (config.activation_function, config.layer_norm_epsilon) == ("gelu_new", 1e-5)
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == (2, 2, 128, 128)
    assert (config.vocab_size, config.tie_word_embeddings) == (257, True)
    assert config.bos_token_id == config.eos_token_id == 256
    spec = json.loads((tmp_path / "out" / "rangeflow_tokenizer.json").read_text())
    assert spec == {"kind": "bytes"}
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1, "who may read one file of an export may read all"


def test_the_end_of_text_is_that_of_the_tokenizer() -> None:
    made = (ByteTokenizer(chat=True), CharacterTokenizer("abc"), BpeTokenizer([b"ab"]))
    for tokenizer in (ByteTokenizer(), Gpt2Tokenizer(), *made):
        assert end_of_text(tokenizer.spec()) == tokenizer.end_of_text
    assert end_of_text({"kind": "of the future"}) is None


def same_as(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor)


def test_safetensors_and_torch_hold_our_own_tensors(run: Path, tmp_path: Path) -> None:
    expected = ours(run).state_dict()
    export(str(run), str(tmp_path / "a"), format="safetensors")
    same_as(expected, safetensors.torch.load_file(tmp_path / "a" / "model.safetensors"))
    export(str(run), str(tmp_path / "b"), format="torch")
    same_as(expected, torch.load(tmp_path / "b" / "model.pt", weights_only=True))
    for folder in ("a", "b"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert (config["n_head"], config["bias"], config["vocab_size"]) == (2, True, 257)


def test_an_export_replaces_an_export_and_leaves_nothing_else(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(str(run), str(out), step="2", format="torch")
    export(str(run), str(out), step="4")
    assert json.loads((out / "rangeflow_export.json").read_text())["step"] == 4
    assert not (out / "model.pt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list(run.glob("pins/*"))


def test_the_checkpoint_is_pinned_while_it_is_read(run: Path, tmp_path: Path) -> None:
    held: dict[str, set[int]] = {}

    def listen(phase: str) -> None:
        held[phase] = pinned_checkpoints(open_store(str(run)))

    export(str(run), str(tmp_path / "out"), step="2", announce=listen)
    assert held == {"export:pinned": {checkpoints(run)[0].index}, "export:written": set()}


def test_an_export_that_fails_leaves_the_earlier_one(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(str(run), str(out), step="2")

    def fail(phase: str) -> None:
        if phase == "export:written":
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ConfigurationError, match=r"out could not be written: No space left"):
        export(str(run), str(out), step="4", announce=fail)
    assert json.loads((out / "rangeflow_export.json").read_text())["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def copy_of(run: Path, to: Path) -> Path:
    for path in run.rglob("*"):
        if path.is_file() and path.parts[len(run.parts)] in ("run.json", "log", "checkpoints"):
            target = to / path.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return to


def test_a_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path) -> None:
    damaged = copy_of(run, tmp_path / "run")
    path = next(damaged.glob("checkpoints/*/s00000004-*/*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"p00.safetensors is damaged: bytes 0 and following"):
        export(str(damaged), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert export(str(damaged), str(tmp_path / "out"), step="2")["step"] == 2


def test_a_retired_step_is_refused_with_the_live_ones(run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    first = checkpoints(copy)[0].index
    retire = Draft(kind="RETIRE", generation=0, body={"checkpoints": [first]})
    Log(open_store(str(copy))).append(lambda _: retire)
    with pytest.raises(ConfigurationError, match=r"live checkpoints \(4\); got '2'"):
        export(str(copy), str(tmp_path / "out"), step="2")


def test_a_folder_with_something_else_is_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(str(run), str(out))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"something else than an export \(notes.txt\)"):
        export(str(run), str(out))
    assert (out / "notes.txt").read_text() == "mine"
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"\(no rangeflow_export.json\)"):
        export(str(run), str(model))
    with pytest.raises(ConfigurationError, match=r"--out must be a folder; .* is a file"):
        export(str(run), str(model / "config.json"))
    with pytest.raises(ConfigurationError, match=r"--out must be a local folder; got gs://b/x"):
        export(str(run), "gs://b/x")
    with pytest.raises(ConfigurationError, match=r"could not be written: .*give another folder"):
        export(str(run), "/proc/out")


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "full.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="did not write all of it"):
        _write_weights(tmp_path / "full.pt", {"a": torch.zeros(1000)})


def test_a_checkpoint_without_a_vocabulary_is_refused(run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    log = Log(open_store(str(copy)))
    newest = next(r for r in log.refresh() if r.index == checkpoints(copy)[-1].index)
    path = copy / newest.body["manifest_key"]
    manifest = json.loads(path.read_text())
    del manifest["extra"]["vocab_size"]
    path.write_bytes(canonical_json(manifest))
    body = {**newest.body, "manifest_sha256": sha256_hex(canonical_json(manifest))}
    log.append(lambda _: Draft(kind="COMMIT", generation=1, body=body))
    with pytest.raises(ConfigurationError, match=r"step 4 does not say its vocabulary"):
        export(str(copy), str(tmp_path / "out"))


def test_the_head_count_is_that_of_the_checkpoint(run: Path, tmp_path: Path) -> None:
    """A change of n_head keeps every shape: accepted later, it must not reach older checkpoints."""
    copy = copy_of(run, tmp_path / "run")
    log = Log(open_store(str(copy)))
    claim = history(log.refresh()).claim
    assert claim is not None
    body = {**claim.body, "accepted_changes": {"model.n_head": 4}}
    log.append(lambda _: Draft(kind="CLAIM", generation=2, body=body))
    newest = next(r for r in log.records if r.index == checkpoints(copy)[-1].index)
    export(str(copy), str(tmp_path / "before"))
    assert theirs(tmp_path / "before").config.n_head == 2
    log.append(lambda _: Draft(kind="COMMIT", generation=2, body=newest.body))
    export(str(copy), str(tmp_path / "after"))
    assert theirs(tmp_path / "after").config.n_head == 4


def test_the_command_writes_an_export_and_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main([str(run), "--out", out, "--step", "best", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["step"], said["format"], said["out"]) == (4, "huggingface", out)
    assert said["digest"] == checkpoints(run)[-1].digest
    assert main([str(run), "--out", out, "--format", "torch"]) == 0
    message = r".*out: step 4 of .*, 454,144 parameters as torch, digest \w{12}\n"
    assert re.fullmatch(message, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--out", "OUT", "--step", "3"], r"live checkpoints \(2, 4\); got '3'"),
        (["RUN", "--out", "RUN"], r"holds something else than an export \("),
        (["RUN", "--out", "OUT", "--format", "onnx"], r"invalid choice 'onnx'"),
        (["RUN"], r"--out"),
        (["OUT", "--out", "OUT"], r"holds no run: there is no run.json"),
    ],
)
def test_a_users_mistake_is_one_line(
    arguments: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"RUN": str(run), "OUT": str(tmp_path / "out")}
    assert main([places.get(argument, argument) for argument in arguments]) == 78
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{message}.*\n", said), said


def test_the_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "python -m checkpointing.export runs/default --out" in capsys.readouterr().out
