"""One replica group of the peer torchft: the train loop of its own `train_ddp.py`, on gloo.

The place in the data is saved at every step, as that file advises. A line of JSON a step tells of
which samples it was made, and whether it was committed.

Usage: restart_torchft.py FOLDER CORPUS STEPS, with REPLICA_GROUP_ID in the environment
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":  # run by torchrun as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torchft import (
    DistributedDataParallel,
    DistributedSampler,
    Manager,
    Optimizer,
    ProcessGroupGloo,
)
from torchft.checkpointing.pg_transport import PGTransport

from benchmarks.restart_work import (
    BATCH,
    Windows,
    loss_of,
    make_model,
    make_optimizer,
    of_environment,
)

REPLICAS = 2


def main(folder: Path, corpus: Path, steps: int) -> None:
    """Train until so many steps are committed."""
    group = of_environment("REPLICA_GROUP_ID", 0)
    windows = Windows(corpus, steps * BATCH)
    sampler = DistributedSampler(
        windows,
        replica_rank=group,
        num_replica_groups=REPLICAS,
        group_rank=0,
        num_replicas=1,
        shuffle=True,
    )
    order = list(sampler)
    place = folder / f"place{group}"
    position = int(place.read_text()) if place.exists() else 0
    inner = make_model()

    def load_state_dict(state: dict[str, object]) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optim"])

    def state_dict() -> dict[str, object]:
        return {"model": model.state_dict(), "optim": optimizer.state_dict()}

    processes = ProcessGroupGloo(timeout=timedelta(seconds=5))
    manager = Manager(
        pg=processes,
        min_replica_size=1,
        load_state_dict=load_state_dict,
        state_dict=state_dict,
        replica_id=f"replica{group}",
        hostname="localhost",
        timeout=timedelta(seconds=30),
        checkpoint_transport=PGTransport(processes, timeout=timedelta(seconds=10), device="cpu"),
    )
    model = DistributedDataParallel(manager, inner)
    optimizer = Optimizer(manager, make_optimizer(inner))
    size = BATCH // REPLICAS
    while manager.current_step() < steps and position < len(order):
        samples = order[position : position + size]
        position += size
        partial = place.with_suffix(".partial")
        partial.write_text(str(position))
        partial.rename(place)  # the kill may come in between
        before = manager.current_step()
        optimizer.zero_grad()
        loss_of(model, windows.rows(samples)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        told = {
            "step": manager.current_step(),
            "samples": samples if manager.is_participating() else [],
            "committed": manager.current_step() > before,
            "replicas": manager.num_participants(),
        }
        sys.stdout.write(f"{json.dumps(told)}\n")  # in one piece: others write there too
        sys.stdout.flush()
    sys.stdout.write("complete\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
