"""One optimizer step: gradients of the global batch, clipped, applied.

The bits it produces depend on the model, the batch, the configuration and the number of finished
steps; not on how many processes share the work.
"""

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields, replace

import torch
from torch import Tensor, nn

from storage.errors import ConfigurationError
from trainer.losses import learnt_tokens, mean_loss, sequence_losses, targets_of, token_losses
from trainer.model import GPT
from trainer.numerics import Precision, autocast, keyed_randomness
from trainer.optimizer import set_learning_rate
from trainer.reduction import GradientReducer, hosted_range
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
    """A save of it is in flight, or may not begin yet."""
    saving_locally: bool = False
    """A snapshot of it to the local tier is in flight, or may not begin yet."""
    save_due: bool = False
    """A save is due by the clock, or an operator asked for one."""
    edit: bool = False
    """An operator asked for an edit of the plan."""
    abandon: bool = False
    """It gives this step up: what has been added up so far is not applied, by nobody."""
    no_time: bool = False
    """The emergency save must not begin: it would not be durable by the deadline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step says of itself, the same on every process.

    `loss` is in nats a learnt token, before the update; 0 when the batch has no such token.
    """

    loss: float
    gradient_norm: float
    learning_rate: float
    flags: Flags
    losses: tuple[float, ...]
    """By sequence of the global batch: the sum over its learnt tokens, in nats."""
    learnt: tuple[int, ...]
    """By sequence of the global batch: how many tokens are learnt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Abandoned:
    """A step that a process gave up between micro-batches: no state has changed, on any process."""

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
        size, self._length = settings.batch.global_batch_size, gradient_length(model)
        self._flags = slice(self._length, self._length + len(fields(Flags)))
        self._micro_batches = sum(
            len(range(0, len(settings.batch.share(v)), settings.batch.micro_batch_size))
            for v in range(
                *hosted_range(settings.rank, settings.world_size, settings.batch.virtual_ranks)
            )
        )
        self._losses = slice(self._flags.stop, self._flags.stop + size)
        self._learnt = slice(self._losses.stop, self._losses.stop + size)

    def run(
        self,
        step: int,
        rows: Tensor | None,
        learn: Tensor | None = None,
        *,
        flags: Callable[[], Flags],
        announce: Callable[[str], None],
        before_update: Callable[[], None] = lambda: None,
        abandon: Callable[[int, int], bool] = lambda done, of: False,
    ) -> StepResult | Abandoned:
        """Make the step after `step` finished ones.

        `rows` is this process's part of the global batch, (rows, T + 1) int64 on the device, and
        `learn` (rows, T) bool: whether each target counts; None means all. A batch in which none
        does has a gradient of zero, and what the moments and the decay make of that.
        `before_update` is called before the state changes: a copy of it may be under way.

        `abandon` is asked before each micro-batch, with how many are done of how many that this
        process has. Once it says yes, or without `rows`, this process computes nothing more, and
        tells so with its flags: the exchange that every step makes is the agreement. Then nobody
        updates; dropout is keyed and the scaler is not told, so that the step can be made anew.
        """
        settings = self._settings
        rate = learning_rate(step, settings.schedule)
        set_learning_rate(self.optimizer, rate)
        self.model.train()
        done, given_up = 0, rows is None

        def goes_on() -> bool:
            nonlocal done, given_up
            given_up = given_up or abandon(done, self._micro_batches)
            done += 1
            return not given_up

        def accumulate(virtual_rank: int, vector: Tensor) -> None:
            if rows is not None and not given_up:
                self._accumulate(step, virtual_rank, rows, learn, vector, announce, goes_on)
            mine = replace(flags(), abandon=given_up)
            vector[self._flags] += torch.tensor(astuple(mine), device=vector.device)

        total = self._reducer.reduce(accumulate, announce)
        told, losses, counts = self._told(total)
        if rows is None or told.abandon:
            self._let_go(total)
            return Abandoned(flags=told)
        self._point_gradients_into(total)
        gradient = total[: self._length]
        tokens, learnt = len(counts) * (rows.shape[1] - 1), sum(counts)
        if 0 < learnt < tokens:  # a mean over all tokens becomes that over learnt ones
            gradient.mul_(tokens / learnt)
        announce("update:before")
        norm = self._update(gradient, before_update)
        announce("update:after")
        self._let_go(total)
        return StepResult(
            loss=mean_loss(losses, counts),
            gradient_norm=norm,
            learning_rate=rate,
            flags=told,
            losses=losses,
            learnt=counts,
        )

    def _accumulate(
        self,
        step: int,
        virtual_rank: int,
        rows: Tensor,
        learn: Tensor | None,
        vector: Tensor,
        announce: Callable[[str], None],
        goes_on: Callable[[], bool],
    ) -> None:
        """Add the gradient of a virtual rank's share into `vector`, and write its losses there.

        Each sequence has a place of its own, zero from all others: sums of that are exact.
        Ends early once `goes_on` says no.
        """
        settings, batch = self._settings, self._settings.batch
        share = batch.share(virtual_rank)
        first = batch.rows_of(settings.rank, settings.world_size).start
        tokens_in_step = batch.global_batch_size * (rows.shape[1] - 1)
        self._point_gradients_into(vector)
        starts = range(share.start, share.stop, batch.micro_batch_size)
        for micro_batch, start in enumerate(starts):
            announce("micro_batch")
            if not goes_on():
                return
            stop = min(start + batch.micro_batch_size, share.stop)
            own = slice(start - first, stop - first)
            targets = targets_of(rows[own], None if learn is None else learn[own])
            with keyed_randomness(
                rows.device, "dropout", settings.seed, step, virtual_rank, micro_batch
            ):
                with autocast(settings.precision, rows.device):
                    logits = self.forward(rows[own, :-1])
                losses = token_losses(logits, targets)
                loss = losses.sum() / tokens_in_step
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            vector[self._losses][start:stop] = sequence_losses(losses)
            vector[self._learnt][start:stop] = learnt_tokens(targets)

    def _told(self, total: Tensor) -> tuple[Flags, tuple[float, ...], tuple[int, ...]]:
        """What rides behind the gradient: flags, and by sequence its loss and learnt tokens."""
        parts = (self._flags, self._losses, self._learnt)
        counts, losses, learnt = (total[part].tolist() for part in parts)
        raised = {field.name: count > 0 for field, count in zip(fields(Flags), counts, strict=True)}
        return Flags(**raised), tuple(losses), tuple(map(int, learnt))

    def _let_go(self, total: Tensor) -> None:
        """The end of a step, whether it was applied or not."""
        for parameter in self._parameters:
            parameter.grad = None
        self._reducer.release(total)

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


def reduced_length(model: nn.Module, batch: BatchConfig) -> int:
    """Elements of what the processes add up: the gradient, flags, and two for each sequence."""
    return gradient_length(model) + len(fields(Flags)) + 2 * batch.global_batch_size
