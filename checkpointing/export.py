"""Exports the weights of one checkpoint, for inference by others and by `trainer.generate`.

The checkpoint is pinned while it is read, and every byte of it is verified. The folder appears
whole or not at all; an export that is already there is replaced by the new one.

Covers: kills at any instant; a hidden folder beside DIR may be left, `.<name>.<nonce>.partial`, or
`.replaced` with the earlier export. Does not cover: optimizer state, which stays in the run.
"""

import errno
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors
import safetensors.torch
import torch
import tyro
from torch import Tensor

from checkpointing.gpt2_layout import gpt2_config, gpt2_tensors
from checkpointing.history import Checkpoint, history
from checkpointing.load import Loaded, load
from checkpointing.naming import chosen, read_run
from checkpointing.pins import pinned
from storage.commands import run_command
from storage.errors import ConfigurationError
from storage.local_store import expanded
from storage.log import Log
from storage.store import open_store

Format = Literal["huggingface", "safetensors", "torch"]

ABOUT_FILE = "rangeflow_export.json"
TOKENIZER_FILE = "rangeflow_tokenizer.json"
CONFIG_FILE = "config.json"
WEIGHT_FILES = {
    "huggingface": "model.safetensors",
    "safetensors": "model.safetensors",
    "torch": "model.pt",
}

_FILES = {ABOUT_FILE, TOKENIZER_FILE, CONFIG_FILE, *WEIGHT_FILES.values()}
_END_OF_TEXT = {"bytes": 256, "gpt2": 50_256}

_DESCRIPTION = """Writes the weights of a checkpoint, in float32, to a folder.

Formats: huggingface (transformers.GPT2LMHeadModel.from_pretrained loads the folder), safetensors
(our own names and shapes), torch (the same as a state dict, for torch.load).

Example:
    python -m checkpointing.export runs/default --out exported --step best
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportArguments:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Path or URL of the run."""
    out: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """A folder that does not exist, is empty, or holds an earlier export."""
    step: Annotated[str, tyro.conf.arg(metavar="N|best|latest")] = "latest"
    """The step of a live checkpoint; `best` by validation loss; or `latest`."""
    format: Format = "huggingface"
    """How the weights are written."""
    json: bool = False
    """Print what was written as JSON."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; what it returns is the exit code."""
    return run_command(
        ExportArguments,
        _execute,
        argv,
        prog="python -m checkpointing.export",
        description=_DESCRIPTION,
    )


def export(
    run: str,
    out: str,
    *,
    step: str = "latest",
    format: Format = "huggingface",
    announce: Callable[[str], None] = lambda phase: None,
) -> dict[str, Any]:
    """Write a checkpoint's weights to the folder `out`; returns what the export says of itself.

    `step` is the step of a live checkpoint, `best` or `latest`. `announce` hears `export:pinned`
    before the checkpoint is read, `export:written` before the folder gets its name. Raises
    ConfigurationError for a mistake of the caller, IntegrityError when the checkpoint is damaged.
    """
    folder = _free_folder(out)
    run_id, loaded, model = _read(run, step, announce)
    vocabulary = _vocabulary(loaded)
    weights = {
        name.removeprefix("model."): tensor.float()
        for name, tensor in loaded.tensors.items()
        if name.startswith("model.")
    }
    config = {**model, "vocab_size": vocabulary}
    tokenizer = loaded.extra["tokenizer"]
    if format == "huggingface":
        weights = gpt2_tensors(
            weights, n_layer=model["n_layer"], bias=model["bias"], vocab_size=vocabulary
        )
        config = gpt2_config(model, vocab_size=vocabulary, end=end_of_text(tokenizer))
    about = {
        "format": format,
        "run": run_id,
        "url": run,
        "step": loaded.checkpoint.step,
        "digest": loaded.checkpoint.digest,
        "weights": WEIGHT_FILES[format],
        "parameters": sum(tensor.numel() for tensor in weights.values()),
    }
    with _whole(folder) as unfinished:
        _write_weights(unfinished / WEIGHT_FILES[format], weights)
        _write_json(unfinished / CONFIG_FILE, config)
        _write_json(unfinished / TOKENIZER_FILE, tokenizer)
        _write_json(unfinished / ABOUT_FILE, about)
        announce("export:written")
    return about


def end_of_text(tokenizer: Mapping[str, Any]) -> int | None:
    """The id that closes a document, by a tokenizer's spec; None for one not known here."""
    if tokenizer.get("kind") == "characters":
        return len(tokenizer["characters"])
    if isinstance(tokenizer.get("end_of_text"), int):
        return int(tokenizer["end_of_text"])
    return _END_OF_TEXT.get(str(tokenizer.get("kind")))


def _execute(arguments: ExportArguments) -> int:
    about = export(arguments.run, arguments.out, step=arguments.step, format=arguments.format)
    if arguments.json:
        print(json.dumps({**about, "out": arguments.out}))
        return 0
    print(
        f"{arguments.out}: step {about['step']} of {arguments.run}, {about['parameters']:,} "
        f"parameters as {about['format']}, digest {about['digest'][:12]}"
    )
    return 0


def _read(
    run: str, step: str, announce: Callable[[str], None]
) -> tuple[str, Loaded, dict[str, Any]]:
    """The run's identifier, the verified checkpoint, and the model's configuration of that time."""
    store = open_store(run)
    about = read_run(store)
    log = Log(store)
    with pinned(store, log, partial(chosen, name=step)) as checkpoint:
        announce("export:pinned")
        loaded = load(store, checkpoint)
        weights = {n: t.clone() for n, t in loaded.tensors.items() if n.startswith("model.")}
        loaded = replace(loaded, tensors=weights)  # what is not copied is read when it is used
    return about["run"], loaded, _model_fields(about["identity"], log, checkpoint)


def _model_fields(identity: Mapping[str, Any], log: Log, checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields `model.*` of the run, with the changes accepted before the checkpoint."""
    fields = dict(identity)
    fields |= history(log.records).accepted_changes(before=checkpoint.index)
    return {k.removeprefix("model."): v for k, v in fields.items() if k.startswith("model.")}


def _vocabulary(loaded: Loaded) -> int:
    """The count of token ids, without padding."""
    if not {"vocab_size", "tokenizer"} <= loaded.extra.keys():
        raise ConfigurationError(
            f"the checkpoint of step {loaded.checkpoint.step} does not say its vocabulary: it was "
            "written by an earlier version; train one more step with this version, then export"
        )
    return int(loaded.extra["vocab_size"])


def _free_folder(out: str) -> Path:
    """The folder to write, or ConfigurationError when it holds anything but an export."""
    if "://" in out:
        raise ConfigurationError(
            f"--out must be a local folder; got {out}. Export to a folder, then copy that"
        )
    folder = expanded(Path(out)).resolve()
    if not folder.exists():
        return folder
    if not folder.is_dir():
        raise ConfigurationError(f"--out must be a folder; {out} is a file")
    names = {path.name for path in folder.iterdir()}
    if names and (ABOUT_FILE not in names or not names <= _FILES):
        strangers = sorted(names - _FILES, key=lambda name: (name.startswith("."), name))
        raise ConfigurationError(
            f"--out {out} holds something else than an export "
            f"({', '.join(strangers[:3]) or f'no {ABOUT_FILE}'}); give a new or an empty folder"
        )
    return folder


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` when the body has ended without an error."""
    nonce = uuid.uuid4().hex[:12]
    unfinished = folder.with_name(f".{folder.name}.{nonce}.partial")
    replaced = folder.with_name(f".{folder.name}.{nonce}.replaced")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in (*unfinished.iterdir(), unfinished):
            _sync(path)
        if folder.exists():
            folder.rename(replaced)
        try:
            unfinished.rename(folder)
        except OSError:
            if replaced.exists():
                replaced.rename(folder)
            raise
        _sync(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, safetensors.SafetensorError) as error:
        what = getattr(error, "strerror", None) or error
        raise ConfigurationError(
            f"--out {folder} could not be written: {what}; make room, or give another folder"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    if path.suffix == ".pt":
        try:
            torch.save(weights, path)
        except RuntimeError as error:  # how torch's zip writer says that the disk is full
            raise OSError(errno.EIO, "torch.save did not write all of it") from error
    else:
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
