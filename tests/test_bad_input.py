"""What users, files and disks do wrong, through the real program: exit code, message, way out."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpointing.history import history
from data_service.shard_format import npy_bytes
from launch.chaos.small_disk import SmallDisk
from launch.chaos.small_disk import small_disk as made_disk
from launch.config import FIXED, RunConfig, fields_of_kind
from storage.canonical import sha256_hex
from storage.log import Log
from storage.store import LocalStore, open_store
from tests.conftest import Interrupted
from tests.made_sources import change_first_shard, write_source
from tests.programs import checkpoints, curve, final_digest, train_here

SHAPE = (
    "--max_steps=6",
    "--eval_interval_steps=0",
    "--sample_interval_steps=0",
    "--save_interval_steps=2",
    "--wait_for_saves",
    "--n_embd=32",
    "--context=16",
    "--global_batch_size=8",
    "--warmup_steps=2",
)


class Refused:
    """Starts the program, which must end with a code and one line that says why."""

    def __init__(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.run = run
        self.shown = ""
        self._capsys = capsys

    def __call__(self, code: int, *arguments: str | Path, listener: object = None) -> str:
        self._capsys.readouterr()
        assert train_here("--run", self.run, *SHAPE, *arguments, listener=listener) == code
        shown = self._capsys.readouterr()
        assert "Traceback" not in shown.err, shown.err
        assert shown.out == ""
        self.shown = shown.err
        (line,) = [line for line in shown.err.splitlines() if line.startswith("error: ")]
        assert shown.err.endswith(f"{line}\n"), "the reason comes last, where people look"
        return line


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    return Refused(tmp_path / "run", capsys)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small good source."""
    write_source(tmp_path / "source", train=(3000,), validation=(400,))
    return tmp_path / "source"


def with_shard(source: Path, tokens: Any, *, in_index: bool) -> None:
    """Replace the training shard; `in_index`, as a preparation would that made it so."""
    data = npy_bytes(tokens)
    (source / "train-00000.npy").write_bytes(data)
    if in_index:
        change_first_shard(str(source), bytes=len(data), sha256=sha256_hex(data))


def test_the_good_source_trains(source: Path, refused: Refused) -> None:
    assert train_here("--run", refused.run, *SHAPE, f"--data=a={source}") == 0


def test_data_that_is_not_there(tmp_path: Path, refused: Refused) -> None:
    message = refused(78, f"--data=a={tmp_path}/nowhere")
    assert f"source 'a' at {tmp_path}/nowhere: there is no data here" in message
    assert "make it with `python -m data_service.prepare INPUT... --out URL`" in message


def test_a_preparation_that_did_not_finish(source: Path, refused: Refused) -> None:
    (source / "index.json").unlink()
    message = refused(78, f"--data=a={source}")
    assert "there is no index.json (it is written last: the preparation did not finish" in message


def test_an_index_without_the_validation_stamp(source: Path, refused: Refused) -> None:
    index = json.loads((source / "index.json").read_text())
    del index["validation"]
    (source / "index.json").write_text(json.dumps(index))
    assert "index.json has no validation stamp" in refused(78, f"--data=a={source}")


def test_a_shard_of_another_dtype(source: Path, refused: Refused) -> None:
    with_shard(source, np.zeros(3000, dtype=np.int16), in_index=False)
    message = refused(78, f"--data=a={source}")
    assert "shard train-00000.npy has dtype int16, the index says uint16" in message


def test_a_truncated_shard(source: Path, refused: Refused) -> None:
    path = source / "train-00000.npy"
    path.write_bytes(path.read_bytes()[:-100])
    message = refused(78, f"--data=a={source}")
    assert "shard train-00000.npy is truncated: 6028 bytes, the index names 6128" in message


def test_a_shard_that_is_missing(source: Path, refused: Refused) -> None:
    (source / "train-00000.npy").unlink()
    assert "shard train-00000.npy is missing" in refused(78, f"--data=a={source}")


def test_a_shard_whose_bytes_changed(source: Path, refused: Refused) -> None:
    with_shard(source, np.zeros(3000, dtype=np.uint16), in_index=False)
    message = refused(78, f"--data=a={source}")
    assert "its bytes have changed; copy it there again" in message


def test_a_token_beyond_the_vocabulary(source: Path, refused: Refused) -> None:
    with_shard(source, np.full(3000, 999, dtype=np.uint16), in_index=True)
    message = refused(78, f"--data=a={source}")
    assert "shard train-00000 holds token id 999 at position " in message
    assert "beyond the bytes vocabulary of 257; prepare the source again" in message


def test_too_little_text_held_out(tmp_path: Path, refused: Refused) -> None:
    write_source(tmp_path / "little", train=(3000,), validation=(40,))
    message = refused(78, f"--data=a={tmp_path}/little")
    assert "has 2 validation windows of 16 tokens, and needs at least 10" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data=a={source}:0",), "the weights of all sources (a) are 0 at step 0"),
        (("--data=a={source}:0", "--data=b={source}:0.0"), "all sources (a, b) are 0 at step 0"),
        (("--data=a={source}", "--data=a={source}"), "source name 'a' is given twice"),
        (("--data={source}",), "--data must be NAME=URL or NAME=URL:WEIGHT"),
        (("--data=a=",), "--data must be NAME=URL or NAME=URL:WEIGHT, got 'a='"),
        (("--data=.a={source}",), "a source's name must be 1 to 48 letters"),
        (("--data=a=nosuch://bucket/a",), "no store for nosuch:// URLs"),
        (("--data=a=gs://me:secret@bucket/a",), "holds credentials, which would reach logs"),
        (
            ("--data=a={source}:-1",),
            "the weight of source 'a' at step 0 must be from 0 to 1000000000000, got -1000000; 0 "
            "means none of it",
        ),
    ],
)
def test_a_wrong_data_flag(
    flags: tuple[str, ...], message: str, source: Path, refused: Refused
) -> None:
    arguments = [flag.format(source=source) for flag in flags]
    if "secret" in flags[0]:
        arguments = list(flags)
    shown = refused(78, *arguments)
    assert message in shown and "secret" not in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--global_batch_size=3",),
            "global_batch_size must be at least virtual_ranks, because every virtual rank takes a "
            "sequence; got 3 and 4",
        ),
        (("--n_head=5",), "model.n_embd must be a multiple of model.n_head, because each head"),
        (("--n_head=5",), "got n_embd 32, n_head 5"),
        (("--n_layer=0",), "every size of a model must be at least 1"),
        (("--dropout=1.0",), "model.dropout must be in [0, 1); got 1.0"),
        (("--micro_batch_size=0",), "every size of a batch must be at least 1"),
        (("--max_steps=0",), "max_steps must be at least 1; got 0"),
        (("--learning_rate=-1",), "schedule.min_learning_rate must lie between 0 and"),
        (("--warmup_steps=-1",), "warmup_steps cannot be negative; got -1"),
        (("--beta2=1",), "optimizer.beta1 and beta2 must be in [0, 1); got 0.9, 1.0"),
        (("--clip_norm=-1",), "optimizer.clip_norm must be positive, or 0 for no clipping"),
        (("--cpu_threads=0",), "cpu_threads must be from 1 to 1024; got 0"),
        (("--save_interval_steps=-1",), "an interval cannot be negative; got -1"),
        (("--eval_windows=0",), "eval_windows and eval_micro_batch_size must"),
        (("--sample_temperature=-1",), "sample_temperature must be a number from 0; got -1.0"),
        (("--seed=-1",), "seed must be from 0 to 2"),
        (("--keep_last=1",), "keep_last must be at least 2, because the newest checkpoint"),
        (("--context=2000",), "source 'a' at "),
        (("--run=",), "the URL of a store is empty; give a path or a URL such as gs://b/x"),
        (("--config=no/such.toml",), "--config no/such.toml: No such file or directory"),
    ],
)
def test_a_value_that_cannot_be(
    flags: tuple[str, ...], message: str, source: Path, refused: Refused
) -> None:
    assert message in refused(78, f"--data=a={source}", *flags)
    if flags[0] != "--context=2000":
        assert not refused.run.exists(), "refused before anything is written"


@pytest.mark.parametrize(
    ("flag", "before", "after"),
    [("--dropout=0.25", 0.0, 0.25), ("--clip_norm=2", 1.0, 2.0), ("--virtual_ranks=2", 4, 2)],
)
def test_a_change_of_identity_names_the_field_both_values_and_the_way_out(
    flag: str, before: object, after: object, source: Path, refused: Refused
) -> None:
    arguments = ("--run", refused.run, *SHAPE, f"--data=a={source}")
    assert train_here(*arguments, "--max_steps=2") == 0
    name = flag[2:].partition("=")[0]
    assert refused(78, f"--data=a={source}", flag) == (
        f"error: {name} decides bits: the run has {before}, this start asks for {after}. Start "
        f"anew with --run runs/other, or pass --accept_change {name}, and exactness ends there"
    )


def test_an_accepted_change_of_identity_goes_on_and_is_not_asked_for_again(
    source: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--run", refused.run, *SHAPE, f"--data=a={source}")
    assert train_here(*arguments, "--max_steps=2") == 0
    changed = (*arguments, "--dropout=0.25")
    assert train_here(*changed, "--max_steps=4", "--accept_change=dropout") == 0
    assert "model.dropout changes from 0.0 to 0.25: exact up to here" in capsys.readouterr().err
    assert train_here(*changed) == 0
    past = history(Log(open_store(str(refused.run))).refresh())
    assert [fields for _, fields in past.changes] == [{"model.dropout": 0.25}]
    assert len(past.lifespans) == 3
    assert [step for step, _ in curve(refused.run)] == [1, 2, 3, 4, 5, 6]


CHANGES = {
    "model.dropout": "--dropout=0.25",
    "model.attention": "--attention=math",
    "optimizer.beta1": "--beta1=0.8",
    "optimizer.beta2": "--beta2=0.9",
    "optimizer.epsilon": "--epsilon=1e-7",
    "optimizer.weight_decay": "--weight_decay=0.2",
    "optimizer.clip_norm": "--clip_norm=2",
    "batch.micro_batch_size": "--micro_batch_size=2",
    "batch.virtual_ranks": "--virtual_ranks=2",
    "numerics.compile": "--compile",
    "numerics.tf32": "--tf32",
    "numerics.reduction": "--reduction=fast",
    "numerics.cpu_threads": "--cpu_threads=2",
    "loop.eval_micro_batch_size": "--eval_micro_batch_size=3",
}
"""Of every identity field whose change can be accepted, one that is."""

UNCHANGEABLE = {
    "seed": "--seed=5",
    "batch.global_batch_size": "--global_batch_size=10",
    "model.n_layer": "--n_layer=3",
    "model.n_head": "--n_head=4",
    "model.n_embd": "--n_embd=64",
    "model.context": "--context=8",
    "model.bias": "--no_bias",
    "numerics.precision": "--precision=fp16",
    "optimizer.optimizer": "--optimizer=adamw8bit",
}
"""Of every other identity field."""


def test_every_field_that_decides_bits_is_changed_here() -> None:
    assert set(UNCHANGEABLE) == FIXED
    assert set(CHANGES) | FIXED == set(fields_of_kind(RunConfig(), "identity"))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two steps, and its source's flag."""
    folder = tmp_path_factory.mktemp("begun")
    write_source(folder / "source", train=(3000,), validation=(400,))
    data = f"--data=a={folder}/source"
    assert train_here("--run", folder / "run", *SHAPE, data, "--max_steps=2") == 0
    return folder / "run", data


@pytest.mark.parametrize("field", sorted(CHANGES.keys() - {"numerics.compile"}))
def test_the_way_out_that_the_message_offers_is_open(
    field: str, begun: tuple[Path, str], refused: Refused
) -> None:
    run, data = begun
    shutil.copytree(run, refused.run)
    flag, name = CHANGES[field], field.rpartition(".")[2]
    message = refused(78, data, flag)
    assert message.startswith(f"error: {name} decides bits: the run has ")
    assert message.endswith(f"or pass --accept_change {name}, and exactness ends there")
    arguments = ("--run", refused.run, *SHAPE, data, flag)
    assert train_here(*arguments, "--max_steps=4", f"--accept_change={name}") == 0
    assert train_here(*arguments) == 0, "it is not asked for again"
    assert checkpoints(refused.run)[-1].step == 6


@pytest.mark.parametrize("field", sorted(UNCHANGEABLE))
def test_what_no_checkpoint_fits_cannot_be_accepted_and_does_not_lock_the_run(
    field: str, begun: tuple[Path, str], refused: Refused
) -> None:
    run, data = begun
    shutil.copytree(run, refused.run)
    log = sorted(path.name for path in (refused.run / "log").iterdir())
    flag, name = UNCHANGEABLE[field], field.rpartition(".")[2]
    for arguments in ((flag,), (flag, f"--accept_change={name}")):
        message = refused(78, data, *arguments)
        assert message.startswith(f"error: {name} decides bits: the run has ")
        assert message.endswith(". Start anew with --run runs/other")
    assert sorted(path.name for path in (refused.run / "log").iterdir()) == log
    assert train_here("--run", refused.run, *SHAPE, data, "--max_steps=3") == 0


@pytest.mark.parametrize("flag", ["--seed=5", "--global_batch_size=10", "--n_layer=3"])
def test_the_other_run_that_the_message_names_can_be_started(
    flag: str, begun: tuple[Path, str], refused: Refused
) -> None:
    assert train_here("--run", refused.run, *SHAPE, begun[1], flag, "--max_steps=2") == 0


def test_an_accepted_change_of_no_field_is_refused(
    begun: tuple[Path, str], refused: Refused
) -> None:
    assert refused(78, begun[1], "--accept_change=dropuot") == (
        "error: --accept_change dropuot: there is no such field that decides bits"
    )
    assert not list(refused.run.glob("log/*")), "refused before the claim"


def test_a_store_that_cannot_fence_is_refused_unless_the_user_insists(
    source: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overwrite(store: LocalStore, key: str, data: bytes) -> bool:
        store.put(key, data)
        return True

    monkeypatch.setattr(LocalStore, "put_if_absent", overwrite)
    message = refused(78, f"--data=a={source}")
    assert "cannot fence: creating a key twice must fail the second time" in message
    assert "or pass --allow_unfenced_store to take the risk" in message
    assert not [path for path in refused.run.rglob("*") if path.is_file()], "nothing is left there"
    arguments = ("--run", refused.run, *SHAPE, f"--data=a={source}", "--allow_unfenced_store")
    assert train_here(*arguments) == 0
    assert checkpoints(refused.run)[-1].step == 6


def test_a_run_directory_that_holds_something_else(source: Path, refused: Refused) -> None:
    refused.run.mkdir()
    (refused.run / "thesis.tex").write_text("mine")
    message = refused(78, f"--data=a={source}")
    assert "holds something that is not a run (thesis.tex); give --run an empty" in message
    assert [path.name for path in refused.run.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("flags", [(), ("--allow_unfenced_store",)])
@pytest.mark.parametrize("below", ["", "below", "below/it"])
def test_a_run_that_is_a_file_or_lies_below_one(
    below: str, flags: tuple[str, ...], source: Path, refused: Refused
) -> None:
    file = refused.run
    file.write_text("mine")
    refused.run = file / below
    message = refused(78, f"--data=a={source}", *flags)
    assert message == f"error: {refused.run} is a file, expected a folder, or a new place"
    assert file.read_text() == "mine"


def test_a_run_of_another_format(source: Path, refused: Refused) -> None:
    refused.run.mkdir()
    (refused.run / "run.json").write_text('{"format": 99}')
    assert refused(78, f"--data=a={source}") == (
        f"error: {refused.run}/run.json has format 99, expected 1: it is no run, or one of another "
        "version of RangeFlow"
    )


def test_a_folder_that_may_not_be_written(
    source: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(source: object, target: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "link", denied)
    message = refused(78, f"--data=a={source}")
    assert ": Permission denied. Give this user the permission to read and write there" in message


PLACES = [("claim", 1), ("save:begin", 2), ("save:manifest", 1)]
FLUSH = ("update:after", 2)
"""Where space runs out: at the claim, a save's objects, its COMMIT; at the flush of metrics."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A source that stays, and the digest of a run on it that nothing broke."""
    folder = tmp_path_factory.mktemp("unbroken")
    write_source(folder / "source", train=(3000,), validation=(400,))
    data = f"--data=a={folder}/source"
    assert train_here("--run", folder / "run", *SHAPE, data) == 0
    return data, final_digest(folder / "run")


class Full:
    """A listener that calls `fill` when the program enters a phase for the nth time."""

    def __init__(self, phase: str, nth: int, fill: Callable[[], object]) -> None:
        self._phase = phase
        self._left = nth
        self._fill = fill

    def __call__(self, phase: str, step: int) -> None:
        self._left -= phase == self._phase
        if phase == self._phase and self._left == 0:
            self._fill()


@pytest.mark.parametrize(("phase", "nth"), [*PLACES, FLUSH])
def test_after_enospc_the_same_command_goes_on_to_the_same_digest(
    phase: str,
    nth: int,
    unbroken: tuple[str, str],
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, digest = unbroken

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        full = Full(phase, nth, lambda: disk.setattr(os, "fsync", no_space))
        refused(75, data, "--take_over", listener=full)
    assert "no space left" in refused.shown.lower()
    assert train_here("--run", refused.run, *SHAPE, data, "--take_over") == 0
    assert final_digest(refused.run) == digest


@pytest.fixture(scope="module")
def small_disk() -> Iterator[Path]:
    """A real file system of 4 MiB."""
    with ExitStack() as stack:
        try:
            disk = stack.enter_context(made_disk())
        except OSError as error:
            pytest.skip(str(error))
        yield disk.folder


def fill(disk: Path) -> None:
    """Write until nothing more fits."""
    SmallDisk(disk).fill()


@pytest.mark.parametrize(("phase", "nth"), [*PLACES, FLUSH])
def test_after_a_full_disk_the_same_command_goes_on_to_the_same_digest(
    phase: str,
    nth: int,
    unbroken: tuple[str, str],
    small_disk: Path,
    refused: Refused,
) -> None:
    data, digest = unbroken
    refused.run = small_disk / "run"
    shutil.rmtree(refused.run, ignore_errors=True)
    full = Full(phase, nth, lambda: fill(small_disk))
    refused(75, data, "--take_over", listener=full)
    (small_disk / "filler").unlink()
    assert "no space left" in refused.shown.lower()
    assert train_here("--run", refused.run, *SHAPE, data, "--take_over") == 0
    assert final_digest(refused.run) == digest


def test_a_disk_that_is_full_from_the_start(
    unbroken: tuple[str, str], small_disk: Path, refused: Refused
) -> None:
    data, digest = unbroken
    refused.run = small_disk / "run"
    shutil.rmtree(refused.run, ignore_errors=True)
    fill(small_disk)
    message = refused(75, data)
    (small_disk / "filler").unlink()
    assert "no space left; free some or move the run, then start again" in message
    assert train_here("--run", refused.run, *SHAPE, data) == 0
    assert final_digest(refused.run) == digest


def test_a_run_left_in_the_middle_is_not_refused(
    source: Path, refused: Refused, interrupt: Callable[[str, int], object]
) -> None:
    """The control of all the above: an interruption is no bad input."""
    arguments = ("--run", refused.run, *SHAPE, f"--data=a={source}", "--take_over")
    with pytest.raises(Interrupted):
        train_here(*arguments, listener=interrupt("update:before", 4))
    assert train_here(*arguments) == 0
