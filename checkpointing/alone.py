"""Checkpoints inside somebody else's training loop: one object, three calls (docs/checkpoints.md).

Covers: one process; whatever has `state_dict()` and `load_state_dict()`; random generators.
Does not cover: several processes (use `Saver` with a `Group`), and where the data stood: give your
loader a `state_dict()`.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol

import torch

from checkpointing.beats import Beats
from checkpointing.generators import generators, restore_generators
from checkpointing.group import Solo
from checkpointing.incarnation import Incarnation, claim_run
from checkpointing.load import Loaded
from checkpointing.naming import RUN_KEY, create_run, read_run
from checkpointing.restore import restore
from checkpointing.retention import RetentionConfig, retire, sweep
from checkpointing.save import Saver, TrainingState
from checkpointing.tree import put_together, take_apart
from storage.errors import ConfigurationError, StoreUnavailableError
from storage.log import Log
from storage.probe import probe
from storage.store import open_store


class Part(Protocol):
    """A model, an optimizer, a scheduler, a loader."""

    def state_dict(self) -> Any:
        """Nested dicts, lists and tuples of tensors, numbers, texts, booleans and None."""

    def load_state_dict(self, state: Any) -> Any:
        """Take the state back."""


class Checkpoints:
    """The checkpoints of one run, for one process: claimed on entry, finished on exit.

    `parts` are saved and restored together, by name. Leaving waits for the last save, and raises
    StoreUnavailableError when it failed. Raises RunBusyError when another process is
    alive on the run, ConfigurationError when the store cannot fence.
    """

    def __init__(
        self, url: str, parts: Mapping[str, Part], *, keep_last: int = 3, take_over: bool = False
    ) -> None:
        self._store = open_store(url)
        self._parts = dict(parts)
        self._policy = RetentionConfig(keep_last=keep_last)
        self._take_over = take_over
        self._step = 0
        self._begun: int | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "Checkpoints":
        with ExitStack() as stack:
            if RUN_KEY not in self._store.list(RUN_KEY):
                probe(self._store)
                create_run(self._store, identity={})
            read_run(self._store)
            owner = claim_run(self._store, Log(self._store), body={}, take_over=self._take_over)
            stack.enter_context(Beats(self._store, owner, lambda: ("step", self._step)))
            loaded = restore(self._store, owner, Solo())
            if loaded is not None:
                self._put_back(loaded)
            sweep(self._store, owner)
            self._saver = Saver(
                self._store,
                owner,
                Solo(),
                parent=loaded.checkpoint.index if loaded is not None else None,
                after_commit=lambda _: self._shorten(owner),
            )
            stack.enter_context(self._saver)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None and self._saver.finish() != self._begun:
                raise StoreUnavailableError(
                    f"step {self._begun} could not be saved, for the reason in the warning above; "
                    "what was committed before is safe"
                )
        finally:
            self._stack.__exit__(kind, error, traceback)

    @property
    def step(self) -> int:
        """The steps that the restored state has behind it, later those of the newest `save`."""
        return self._step

    def save(self, step: int, *, validation_loss: float | None = None) -> None:
        """Begin to save; the state may change after `before_update`. Call between steps.

        While one save is in flight a second one waits in memory; a third waits here for the first.
        """
        tensors: dict[str, torch.Tensor] = {}
        parts = {
            name: take_apart(part.state_dict(), name, tensors) for name, part in self._parts.items()
        }
        state = TrainingState(
            tensors=tensors,
            exact={"step": step, "parts": parts},
            extra={"generators": generators()},
        )
        self._saver.begin(state, step=step, validation_loss=validation_loss)
        self._step = self._begun = step

    def before_update(self) -> None:
        """Call before the optimizer's step: the copy of the state may be under way."""
        self._saver.wait_for_copy()

    def _shorten(self, owner: Incarnation) -> None:
        """Retire what the policy lets go, and keep the log quick to open."""
        retire(self._store, owner, self._policy)
        owner.shorten(lambda: self._store.list("checkpoints/"))

    def _put_back(self, loaded: Loaded) -> None:
        """The parts as they were; they may keep what they are given. Generators last."""
        stored = loaded.exact.get("parts", {})
        if stored.keys() != self._parts.keys():
            raise ConfigurationError(
                f"the checkpoint holds {sorted(stored)}, expected {sorted(self._parts)}: give the "
                "same parts, or another place"
            )
        tensors = {name: tensor.clone() for name, tensor in loaded.tensors.items()}
        for name, part in self._parts.items():
            part.load_state_dict(put_together(stored[name], tensors))
        restore_generators(loaded.extra["generators"])
        self._step = int(loaded.exact["step"])
