"""Generators go on where they were."""

import json
import random

import numpy as np
import torch

from checkpointing.generators import generators, restore_generators


def drawn() -> list[float]:
    return [random.gauss(0, 1), float(np.random.standard_normal()), float(torch.rand(()))]


def test_every_generator_goes_on_where_it_was() -> None:
    before = generators()
    try:
        drawn()  # a second Gaussian number waits in Python's and numpy's
        states = json.loads(json.dumps(generators()))
        expected = [drawn() for _ in range(3)]
        restore_generators(states)
        assert [drawn() for _ in range(3)] == expected
    finally:
        restore_generators(before)
