"""Builds what trains: the model, its optimizer, and the step, from a settled configuration."""

import logging
from dataclasses import replace

import torch

from data_service.batches import Batches
from launch.config import RunConfig, of_the_world
from launch.world import World, fingerprint
from storage.errors import ConfigurationError, UnlikeHostsError
from trainer.model import GPT, initial_model, padded_vocabulary, parameter_count
from trainer.numerics import (
    Precision,
    autocast,
    keyed_randomness,
    make_scaler,
    resolve_precision,
    set_up_numerics,
)
from trainer.optimizer import make_optimizer
from trainer.reduction import GradientReducer, hosted_range
from trainer.step import StepSettings, TrainStep, reduced_length

logger = logging.getLogger(__name__)


def settled(config: RunConfig, world: World) -> RunConfig:
    """The configuration with `auto` values resolved for this world.

    Refuses a world that is too large, and one of unlike devices or unlike configurations, whose
    bits would differ.
    """
    told = world.gather([fingerprint(world.device), of_the_world(config)])
    first, asked = told[0]
    for rank, (kind, wanted) in enumerate(told):
        if kind != first:
            raise UnlikeHostsError(
                f"all processes need the same device and torch, or their bits differ: rank {rank} "
                f"has {kind}, rank 0 has {first}"
            )
        for name in sorted(asked.keys() | wanted.keys()):
            if wanted.get(name) != asked.get(name):
                raise UnlikeHostsError(
                    f"all processes need the same configuration: rank {rank} was started with "
                    f"{name} {wanted.get(name)!r}, rank 0 with {asked.get(name)!r}. Start every "
                    "host with the same command"
                )
    if world.size > config.batch.virtual_ranks:
        raise UnlikeHostsError(
            f"{world.size} processes cannot share {config.batch.virtual_ranks} virtual ranks: "
            f"start at most {config.batch.virtual_ranks}, or a new run with more --virtual_ranks"
        )
    precision = resolve_precision(config.numerics.precision, world.device)
    return replace(config, numerics=replace(config.numerics, precision=precision))


def build_training(config: RunConfig, world: World, batches: Batches) -> TrainStep:
    """The step, with the model as a run begins, compiled if so configured."""
    set_up_numerics(config.numerics, world.device)
    model = initial_model(config.model, batches.vocab_size, config.seed).to(world.device)
    precision = resolve_precision(config.numerics.precision, world.device)
    if config.model.attention != "auto":
        _refuse_attention(model, precision, world.device)
    forward = torch.compile(model) if config.numerics.compile else model
    reducer = GradientReducer(
        reduced_length(model, config.batch),
        virtual_ranks=config.batch.virtual_ranks,
        rank=world.rank,
        size=world.size,
        device=world.device,
        exact=config.numerics.reduction == "exact",
    )
    settings = StepSettings(
        batch=config.batch,
        schedule=config.schedule,
        precision=precision,
        clip_norm=config.optimizer.clip_norm,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
    )
    logger.info(
        "%s parameters, vocabulary %d (padded to %d), %s, %d of %d virtual ranks here, on %s",
        f"{parameter_count(config.model, batches.vocab_size):,}",
        batches.vocab_size,
        padded_vocabulary(batches.vocab_size),
        precision,
        len(range(*hosted_range(world.rank, world.size, config.batch.virtual_ranks))),
        config.batch.virtual_ranks,
        world.device,
    )
    optimizer = make_optimizer(model, config.optimizer)
    scaler = make_scaler(precision, world.device)
    return TrainStep(model, forward, optimizer, scaler, reducer, settings)


def _refuse_attention(model: GPT, precision: Precision, device: torch.device) -> None:
    """Try the chosen attention once: device, precision and dropout decide what kernels there are.

    Raises ConfigurationError when there is none.
    """
    tokens = torch.zeros(1, model.config.context, dtype=torch.int64, device=device)
    try:
        with keyed_randomness(device, "attention"), autocast(precision, device):
            model.train()(tokens)
    except RuntimeError as error:
        if not str(error).startswith(("No available kernel", "No viable backend")):
            raise
        raise ConfigurationError(
            f"attention {model.config.attention!r} does not work here: torch has no such kernel "
            f"for {device.type}, {precision} and dropout {model.config.dropout}. Choose auto or "
            "math"
        ) from error
