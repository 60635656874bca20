"""One optimizer step: gradients of the global batch, clipped, applied.

The bits it produces depend on the model, the batch, the configuration and the number of finished
steps; not on how many processes share the work.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from storage.errors import ConfigurationError
from trainer.model import GPT, token_losses
from trainer.numerics import Precision, autocast, keyed_randomness
from trainer.optimizer import set_learning_rate
from trainer.reduction import EXTRAS, GradientReducer, hosted_range
from trainer.schedule import ScheduleConfig, learning_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """How the global batch is divided. All fields decide bits."""

    global_batch_size: int = 16
    micro_batch_size: int = 4
    virtual_ranks: int = 4

    def __post_init__(self) -> None:
        if min(self.global_batch_size, self.micro_batch_size, self.virtual_ranks) < 1:
            raise ConfigurationError(f"every size of a batch must be at least 1; got {self}")
        if self.global_batch_size < self.virtual_ranks:
            raise ConfigurationError(
                "global_batch_size must be at least virtual_ranks, because every virtual rank "
                f"takes a sequence; got {self.global_batch_size} and {self.virtual_ranks}"
            )

    def share(self, virtual_rank: int) -> range:
        """The sequences of the global batch that belong to a virtual rank."""
        size, of = self.global_batch_size, self.virtual_ranks
        return range(virtual_rank * size // of, (virtual_rank + 1) * size // of)

    def rows_of(self, rank: int, world_size: int) -> range:
        """The sequences of the global batch that a process works on."""
        lo, hi = hosted_range(rank, world_size, self.virtual_ranks)
        return range(self.share(lo).start, self.share(hi - 1).stop)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSettings:
    """The configuration of a step, and which of its processes this is."""

    batch: BatchConfig
    schedule: ScheduleConfig
    precision: Precision
    clip_norm: float
    seed: int
    rank: int
    world_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Flags:
    """What a process tells the others during a step; in a result, what any of them told."""

    stop: bool = False
    """It was asked to stop."""
    saving: bool = False
    """A save of it is in flight."""
    saving_locally: bool = False
    """A snapshot of it to the local tier is in flight."""
    save_due: bool = False
    """A save is due by the clock, or an operator asked for one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step says of itself. `loss` in nats a token, before the update.

    `flags` are the same on every process.
    """

    loss: float
    gradient_norm: float
    learning_rate: float
    flags: Flags


class TrainStep:
    """Everything a step needs; `run` makes one. All processes of the world run the same steps."""

    def __init__(
        self,
        model: GPT,
        forward: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        reducer: GradientReducer,
        settings: StepSettings,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.forward = forward
        self.precision = settings.precision
        self._reducer = reducer
        self._settings = settings
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._length = gradient_length(model)

    def run(
        self,
        step: int,
        rows: Tensor,
        *,
        flags: Callable[[], Flags],
        announce: Callable[[str], None],
        before_update: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Make the step after `step` finished ones.

        `rows` is this process's part of the global batch, (rows, T + 1) int64 on the device.
        `before_update` is called before the state changes: a copy of it may be under way.
        """
        settings = self._settings
        rate = learning_rate(step, settings.schedule)
        set_learning_rate(self.optimizer, rate)
        self.model.train()

        def accumulate(virtual_rank: int, vector: Tensor) -> None:
            self._accumulate(step, virtual_rank, rows, vector, announce)
            told = flags()
            raised = [told.stop, told.saving, told.saving_locally, told.save_due]
            vector[self._length + 1 : self._length + EXTRAS] = torch.tensor(raised)

        total = self._reducer.reduce(accumulate, announce)
        loss, *raised = total[self._length : self._length + EXTRAS].tolist()
        stop, saving, saving_locally, save_due = (count > 0 for count in raised)
        self._point_gradients_into(total)
        announce("update:before")
        norm = self._update(total[: self._length], before_update)
        announce("update:after")
        for parameter in self._parameters:
            parameter.grad = None
        self._reducer.release(total)
        return StepResult(
            loss=loss,
            gradient_norm=norm,
            learning_rate=rate,
            flags=Flags(stop=stop, saving=saving, saving_locally=saving_locally, save_due=save_due),
        )

    def _accumulate(
        self,
        step: int,
        virtual_rank: int,
        rows: Tensor,
        vector: Tensor,
        announce: Callable[[str], None],
    ) -> None:
        """Add the gradient and the loss of a virtual rank's share into `vector`."""
        settings, batch = self._settings, self._settings.batch
        share = batch.share(virtual_rank)
        first = batch.rows_of(settings.rank, settings.world_size).start
        tokens_in_step = batch.global_batch_size * (rows.shape[1] - 1)
        self._point_gradients_into(vector)
        starts = range(share.start, share.stop, batch.micro_batch_size)
        for micro_batch, start in enumerate(starts):
            announce("micro_batch")
            stop = min(start + batch.micro_batch_size, share.stop)
            part = rows[start - first : stop - first]
            with keyed_randomness(
                rows.device, "dropout", settings.seed, step, virtual_rank, micro_batch
            ):
                with autocast(settings.precision, rows.device):
                    logits = self.forward(part[:, :-1])
                loss = token_losses(logits, part[:, 1:]).sum() / tokens_in_step
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            vector[self._length] += loss.detach()

    def _point_gradients_into(self, vector: Tensor) -> None:
        """Make every `.grad` a view of the flat vector, in the order of the parameters."""
        offset = 0
        for parameter in self._parameters:
            size = parameter.numel()
            parameter.grad = vector[offset : offset + size].view_as(parameter)
            offset += size

    def _update(self, gradient: Tensor, before_update: Callable[[], None]) -> float:
        """Unscale, clip and apply; returns the norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.linalg.vector_norm(gradient))
        limit = self._settings.clip_norm
        if limit and math.isfinite(norm) and norm > limit:
            gradient.mul_(limit / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        before_update()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm


def gradient_length(model: nn.Module) -> int:
    """Elements of the flat gradient."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
