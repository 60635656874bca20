"""The peer below torchrun: PyTorch's own way to survive a failure, `torch.save` in a loop.

As in PyTorch's tutorial on fault tolerance (`multigpu_torchrun.py`): rank 0 saves model, optimizer
and step to one file every so often, every rank loads it at its start, and torchrun starts all again
when one fails. A save is written beside and renamed, as PyTorch's elastic ImageNet example does.

Usage: restart_torch_save.py FOLDER CORPUS
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # run by torchrun as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.restart_programs import SAVE_EVERY
from benchmarks.restart_work import (
    BATCH,
    Windows,
    loss_of,
    make_model,
    make_optimizer,
    of_environment,
)


def main(folder: Path, corpus: Path) -> None:
    """Train until it is killed."""
    rank, world = of_environment("RANK", 0), of_environment("WORLD_SIZE", 1)
    if world > 1:
        dist.init_process_group("gloo")
    model = make_model()
    optimizer = make_optimizer(model)
    step = 0
    snapshot = folder / "snapshot.pt"
    if snapshot.exists():
        saved = torch.load(snapshot)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
        print(f"going on from step {step}", flush=True)
    trained: nn.Module = DistributedDataParallel(model) if world > 1 else model
    windows = Windows(corpus, 1 << 30)
    while True:
        rows = windows.rows([step * BATCH + i for i in range(rank, BATCH, world)])
        optimizer.zero_grad()
        loss_of(trained, rows).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if rank == 0:
            print(f"step {step}/0 done", flush=True)
            if step % SAVE_EVERY == 0:
                partial = snapshot.with_suffix(".partial")
                torch.save(
                    {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": step,
                    },
                    partial,
                )
                os.replace(partial, snapshot)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
