"""Trains a GPT, or goes on with a run that was interrupted: there is one way in, resume.

Read it top to bottom: install the notice, parse, join the world, claim the run, open the data,
build, restore, train, leave with an exit code (`launch/exit_codes.py`).
"""

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # torchrun runs this file, with `launch/` in front of the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.exit_codes import COMPLETE, START_AGAIN, exit_code, last_words
from launch.minded import die_with_parent, show_stacks_when_asked
from launch.notice import Notice
from launch.phase import Phase
from launch.reporting import Reporter, deadline_file, reporter, started_by_torchrun
from launch.time_ledger import TimeLedger, reached_before
from storage.ending import end_process

if TYPE_CHECKING:
    from checkpointing.save import TrainingState
    from launch.config import RunConfig

logger = logging.getLogger(__name__)

Listener = Callable[[str, int], None]


def main(arguments: Sequence[str] | None = None, listener: Listener | None = None) -> int:
    """Train to the end, or as far as it goes; returns the exit code.

    `listener` hears each phase that is entered, with the number of finished steps.
    """
    minded = started_by_torchrun()
    if minded:
        die_with_parent()
        show_stacks_when_asked()
    # Before torch is imported: that takes seconds.
    with Notice(second_ends=not minded) as notice, reporter() as report:
        if report.abandoned:  # it ended before this process could ask to die with its parent
            sys.stderr.write("error: the supervisor of this rank is gone; so it leaves as well\n")
            return START_AGAIN
        try:
            from launch.config import command_line, parse_config

            config = parse_config(command_line() if arguments is None else arguments)
            if config is None:  # --help
                return COMPLETE
            ledger = TimeLedger()

            def entered(phase: str, step: int) -> None:
                ledger(phase, step)
                report.place(phase, step)

            phase = Phase(listener, notice.requested, entered)
            return report.ended(train(config, notice, phase, report, ledger))
        except Exception as error:
            return report.ended(exit_code(error), error)


def train(
    config: "RunConfig", notice: Notice, phase: Phase, report: Reporter, ledger: TimeLedger
) -> int:
    """One incarnation: from the claim to the exit code."""
    from checkpointing.beats import Beats, told_error
    from checkpointing.history import history
    from checkpointing.restore import restore
    from checkpointing.retention import sweep
    from launch.build import build_training, settled
    from launch.caching import RemoteData
    from launch.data import open_batches
    from launch.editing import Editor, LiveData
    from launch.grace import Grace
    from launch.logs import set_up_logging
    from launch.opening import open_run
    from launch.running import (
        Keeper,
        finish,
        loop_config,
        open_metrics,
        open_tier,
        resume_proof,
        surroundings,
    )
    from launch.world import joined_world
    from storage.errors import StopRequestedError
    from storage.store import open_store
    from trainer.loop import Loop
    from trainer.state import capture, restore_state, resume_position, unsaid

    with ExitStack() as stack:
        grace = Grace(notice, phase, seconds=config.grace_seconds, deadline_file=deadline_file())
        stack.enter_context(grace)
        with grace.at_once():  # the others may never come
            phase("rendezvous")
            world = stack.enter_context(joined_world(report.ended))
        set_up_logging(world.rank, phase)
        config = settled(config, world)
        store = open_store(config.run)

        run = open_run(store, config, world, phase)
        if run.complete:
            return COMPLETE
        owner = run.incarnation  # None on every rank but 0
        report.run(config.run, run.generation)
        beats = Beats(store, owner, phase.place) if owner else None
        if owner is not None and beats is not None:
            ledger.reached = reached_before(store, history(owner.records), owner.generation)
            beats.more = lambda: {"time": ledger.told(), **grace.beat()}
            beats.last_words = last_words
            stack.enter_context(beats)
            grace.leave = beats.leave
            stack.callback(grace.settle)
        else:
            stack.enter_context(told_error(store, run.generation, world.rank, last_words))

        # A snapshot may be newer than any checkpoint.
        tier = open_tier(config, world, store, owner, run.generation)
        remote = stack.enter_context(RemoteData(config))
        editor = Editor(config, world, store, owner, phase, remote)
        batches = editor.answer_waiting(open_batches(config, world, owner, phase, remote))
        training = build_training(config, world, batches)

        step, position, parent, committed_by, row = 0, 0, None, 0, None
        loaded = restore(store, owner, world, announce=phase, before_object=grace.check)
        if loaded is not None:
            step = restore_state(training, loaded, batches=batches, seed=config.seed)
            position = resume_position(batches, loaded.exact)
            parent, committed_by = loaded.checkpoint.index, loaded.checkpoint.generation
            row = unsaid(loaded)
            phase.step = step
            logger.info(
                "going on from step %d, saved by generation %d", step, loaded.checkpoint.generation
            )
            del loaded  # its tensors hold memory, or the files of a checkpoint to be retired
        if owner is not None:
            sweep(store, owner)

        proof = resume_proof(config, world, store, owner, step, committed_by)
        said = step if row is None else step - 1
        metrics = open_metrics(config, store, owner, said, stack) if owner else None
        data = LiveData(config, world, batches, editor, remote, position, grace.check)
        stack.enter_context(data)

        def now(step: int) -> "TrainingState":
            return capture(training, step, batches=data.batches, seed=config.seed)

        keeper = Keeper(config, world, store, owner, metrics, now, phase, parent, tier)
        stack.enter_context(keeper)
        grace.save_seconds = keeper.save_seconds
        grace.saved_step = lambda: step if keeper.saved_step is None else keeper.saved_step
        if beats is not None:
            beats.afterwards = keeper.beat
            beats.more = lambda: {
                "time": ledger.told(),
                **keeper.told(),
                **remote.beat(),
                **proof.beat(),
                **grace.beat(),
            }
        stack.callback(remote.close)  # before the loader, which may be waiting for it
        remote.waited_seconds = ledger.waited_seconds = lambda: data.waited_seconds
        ledger.stalled_seconds = lambda: keeper.stalled_seconds

        loop = Loop(
            training,
            batches,
            data,
            surroundings(
                world, keeper, data, grace, phase, beats, proof, remote.measured, report.row
            ),
            loop_config(config),
            seed=config.seed,
            max_steps=config.schedule.max_steps,
        )
        if any(world.gather(grace.requested())):
            raise StopRequestedError(f"asked to stop before step {step + 1} was begun")
        if not loop.run(step, position, row):
            if not world.on_rank_0(keeper.stopped):
                return START_AGAIN
            logger.info("stopped at step %d, as an operator asked", phase.step)
            report.stopped()
            return COMPLETE
        if owner is not None:
            keeper.completed()
            finish(owner)
        keeper.forget_tier()
        return COMPLETE


if __name__ == "__main__":
    end_process(main())
