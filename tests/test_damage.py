"""Any one object or record of the newest checkpoint damaged: seen, stepped back, same end."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from checkpointing.history import history
from checkpointing.layout import ObjectLayout
from checkpointing.snapshot import flat_bytes
from storage.log import Log
from storage.store import Store, open_store
from tests.conftest import Interrupted
from tests.programs import checkpoints, curve, final_digest, train_here

SHAPE = (
    "--max_steps=9",
    "--eval_interval_steps=0",
    "--sample_interval_steps=0",
    "--save_interval_steps=2",
    "--wait_for_saves",
    "--n_embd=32",
    "--context=32",
    "--global_batch_size=8",
    "--warmup_steps=4",
    "--dropout=0.1",
)

Interrupt = Callable[[str, int], Callable[[str, int], None]]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...]) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    assert train_here("--run", run, *data, *SHAPE) == 0
    return run


@pytest.fixture
def broken_off(tmp_path: Path, data: tuple[str, ...], interrupt: Interrupt) -> Path:
    """A run left in step 8, with checkpoints of steps 2, 4 and 6."""
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        train_here("--run", run, *data, *SHAPE, listener=interrupt("update:before", 8))
    assert [c.step for c in checkpoints(run)] == [2, 4, 6]
    return run


def truncate(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def delete(path: Path, other: Path) -> None:
    path.unlink()


def swap(path: Path, other: Path) -> None:
    shutil.copy(other, path)


DAMAGES = (truncate, flip, delete, swap)


def parts(run: Path, part: str) -> tuple[Path, Path]:
    """The file of that part of the newest checkpoint, and that of the one before."""
    before, newest = checkpoints(run)[-2:]
    if part == "record":
        return tuple(run / f"log/{c.index:010d}.json" for c in (newest, before))  # type: ignore
    name = "manifest.json" if part == "manifest" else "r000-p00.safetensors"
    return tuple((run / c.manifest_key).with_name(name) for c in (newest, before))  # type: ignore


@pytest.mark.parametrize("part", ["tensors", "manifest", "record"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_the_newest_checkpoint_is_seen_and_the_one_before_restored(
    part: str,
    damage: Callable[[Path, Path], None],
    broken_off: Path,
    unbroken: Path,
    data: tuple[str, ...],
) -> None:
    damage(*parts(broken_off, part))
    begun: list[int] = []

    def listener(phase: str, step: int) -> None:
        if phase == "step":
            begun.append(step)

    assert train_here("--run", broken_off, *data, *SHAPE, listener=listener) == 0

    assert begun[0] == 4, "the one before the newest is of step 4"
    log = Log(open_store(str(broken_off)))
    quarantined = [c.step for c in history(log.refresh()).checkpoints if c.quarantined]
    assert quarantined == ([] if part == "record" else [6])
    assert bool(log.damaged) == (part == "record" and damage is not delete)
    assert final_digest(broken_off) == final_digest(unbroken)
    assert curve(broken_off) == curve(unbroken)


def test_two_damaged_checkpoints_stop_the_run_and_a_third_is_used_afterwards(
    broken_off: Path, unbroken: Path, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for checkpoint in checkpoints(broken_off)[-2:]:
        flip((broken_off / checkpoint.manifest_key).with_name("r000-p00.safetensors"), broken_off)
    assert train_here("--run", broken_off, *data, *SHAPE) == 78
    assert "checkpoints of this run are damaged" in capsys.readouterr().err
    assert train_here("--run", broken_off, *data, *SHAPE) == 0
    assert final_digest(broken_off) == final_digest(unbroken)


def test_without_verification_damage_would_pass(
    broken_off: Path, unbroken: Path, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: without the digests, a flipped weight ends in other bits."""
    monkeypatch.setattr("checkpointing.load._read_object", _unverified)
    flip(*parts(broken_off, "tensors"))
    assert train_here("--run", broken_off, *data, *SHAPE) == 0
    assert final_digest(broken_off) != final_digest(unbroken)


def _unverified(
    store: Store,
    key: str,
    layout: ObjectLayout,
    specs: object,
    tensors: Mapping[str, torch.Tensor],
    table: object,
) -> None:
    data = torch.frombuffer(bytearray(store.get(key)), dtype=torch.uint8)
    for piece, offset in layout.offsets():
        size = piece.stop - piece.start
        place = flat_bytes(tensors[piece.tensor])
        place[piece.start : piece.stop] = data[offset : offset + size]
