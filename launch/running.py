"""What the training loop is given: saves, metrics, and the answer to "must we stop?"."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from checkpointing.beats import Beats
from checkpointing.history import history
from checkpointing.incarnation import Incarnation
from checkpointing.retention import retire
from checkpointing.save import save
from data_service.batches import Batches
from launch.config import RunConfig
from launch.notice import Notice
from launch.phase import Phase
from launch.world import World
from storage.canonical import sha256_hex
from storage.errors import StoreUnavailableError
from storage.store import Store
from trainer.loop import Surroundings
from trainer.metrics import Metrics
from trainer.state import capture
from trainer.step import TrainStep

logger = logging.getLogger(__name__)


class Keeper:
    """Keeps a run's checkpoints and curves. Only rank 0 has an incarnation and metrics."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        store: Store,
        incarnation: Incarnation | None,
        metrics: Metrics | None,
        training: TrainStep,
        batches: Batches,
        phase: Phase,
        parent: int | None,
    ) -> None:
        self._config = config
        self._world = world
        self._store = store
        self._incarnation = incarnation
        self._metrics = metrics
        self._training = training
        self._batches = batches
        self._phase = phase
        self._parent = parent

    def record(self, row: dict[str, Any]) -> None:
        """Remember the row of a step until the next flush."""
        if self._metrics is not None:
            self._metrics.add(row)

    def flush(self) -> None:
        """Write the rows so far, unless a later incarnation owns the run (FencedError)."""
        if self._incarnation is not None and self._metrics is not None:
            self._incarnation.check()
            self._metrics.flush()

    def save(self, step: int, validation_loss: float | None, healthy: bool) -> bool:
        """Flush, save, and retire what is old; whether the checkpoint was committed."""
        self._world.on_rank_0(self.flush)
        seed, batches = self._config.seed, self._batches
        checkpoint = save(
            self._store,
            self._incarnation,
            self._world,
            capture(self._training, step=step, batches=batches, seed=seed),
            step=step,
            parent=self._parent,
            healthy=healthy,
            validation_loss=validation_loss,
            announce=self._phase,
        )
        if self._incarnation is not None and checkpoint is not None:
            logger.info("step %d is saved, digest %s", step, checkpoint.digest[:12])
            self._retire()
        return bool(self._world.broadcast(checkpoint is not None))

    def _retire(self) -> None:
        assert self._incarnation is not None
        try:
            retire(
                self._store,
                self._incarnation,
                keep_last=self._config.keep_last,
                announce=self._phase,
            )
        except StoreUnavailableError as error:
            logger.warning("old checkpoints were not retired: %s", error)


def surroundings(
    world: World, keeper: Keeper, notice: Notice, phase: Phase, beats: Beats | None
) -> Surroundings:
    """The loop's view of this process. A fenced process stops as one that got a notice."""

    def stop_requested() -> bool:
        return notice.requested() or (beats is not None and beats.fenced)

    return Surroundings(
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        gather=world.gather,
        announce=phase,
        stop_requested=stop_requested,
        record=keeper.record,
        flush=keeper.flush,
        save=keeper.save,
    )


def open_metrics(
    config: RunConfig, store: Store, owner: Incarnation, step: int, stack: ExitStack
) -> Metrics:
    """The curves of this incarnation: in the run, or in `runs/<name>-<hash>` for a remote one."""
    inside = store.local_path("metrics.jsonl")
    place = config.run.rstrip("/")
    name = f"{place.rpartition('/')[2]}-{sha256_hex(place.encode())[:8]}"
    folder = inside.parent if inside else Path("runs") / name
    logger.info("curves: tensorboard --logdir %s", folder / "tensorboard")
    metrics = Metrics(folder, generation=owner.generation, step=step, check=owner.check)
    return stack.enter_context(metrics)


def finish(incarnation: Incarnation) -> None:
    """Record that the run is complete."""
    newest = history(incarnation.check()).live[-1]
    body = {"step": newest.step, "digest": newest.digest}
    incarnation.append("END", lambda _: body)
    logger.info("complete: %d steps, digest %s", newest.step, newest.digest)
