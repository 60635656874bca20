"""States of the random generators that a process has, as JSON."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def generators() -> dict[str, Any]:
    """States of the generators of torch (CPU and GPU), numpy and Python, as JSON.

    No bit of a run depends on them; they are kept for what users add.
    """
    numpy: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, cached = numpy
    version, internal, gauss = random.getstate()
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states += torch.cuda.get_rng_state_all()
    return {
        "torch": [state.numpy().tobytes().hex() for state in states],
        "numpy": [keys.tobytes().hex(), int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }


def restore_generators(states: Mapping[str, Any]) -> None:
    """Put back what `generators` gave; states of GPUs that are not here are left out."""
    cpu, *gpus = [_bytes_tensor(text) for text in states["torch"]]
    torch.set_rng_state(cpu)
    if torch.cuda.is_available():
        for device, state in enumerate(gpus[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)
    keys, position, has_gauss, cached = states["numpy"]
    words = np.frombuffer(bytes.fromhex(keys), dtype=np.uint32)
    np.random.set_state(("MT19937", words, position, has_gauss, cached))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))


def _bytes_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
