"""A training loop with the state of GPT-2 and Adam, to stand around a save.

The state has GPT-2's own names and shapes. A step computes forward and backward through the twelve
feed-forward layers with these weights, and the update is torch's fused AdamW, which reads and
writes every byte of the state. Attention is left out: what a save disturbs is arithmetic, memory
and the update.
"""

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import gelu

SIZES = {
    "gpt2-124m": {"n_layer": 12, "n_embd": 768, "vocab_size": 50257, "block_size": 1024},
    "small": {"n_layer": 2, "n_embd": 64, "vocab_size": 512, "block_size": 64},
}
TOKENS = 64
"""Rows in a step's batch: 0.3 to 0.5 s of arithmetic a step on one core."""


def shapes(n_layer: int, n_embd: int, vocab_size: int, block_size: int) -> dict[str, list[int]]:
    """Names and shapes of GPT-2's parameters: 124,439,808 of them with 12 layers, 768 wide."""
    C = n_embd
    found = {"wte.weight": [vocab_size, C], "wpe.weight": [block_size, C]}
    for layer in range(n_layer):
        found |= {
            f"h.{layer}.{name}": shape
            for name, shape in {
                "ln_1.weight": [C],
                "ln_1.bias": [C],
                "attn.c_attn.weight": [C, 3 * C],
                "attn.c_attn.bias": [3 * C],
                "attn.c_proj.weight": [C, C],
                "attn.c_proj.bias": [C],
                "ln_2.weight": [C],
                "ln_2.bias": [C],
                "mlp.c_fc.weight": [C, 4 * C],
                "mlp.c_fc.bias": [4 * C],
                "mlp.c_proj.weight": [4 * C, C],
                "mlp.c_proj.bias": [C],
            }.items()
        }
    return {**found, "ln_f.weight": [C], "ln_f.bias": [C]}


class Training:
    """The state, and what a step does to it; all on the calling thread."""

    def __init__(self, size: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self._n_layer = SIZES[size]["n_layer"]
        self._parameters = {
            name: Parameter(torch.randn(shape, generator=generator) * 0.02)
            for name, shape in shapes(**SIZES[size]).items()
        }
        self._input = torch.randn(TOKENS, SIZES[size]["n_embd"], generator=generator)
        for parameter in self._parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=1e-5, fused=True)
        self.forward_backward()
        self.update()
        self.tensors: dict[str, Tensor] = {}
        """All that a checkpoint holds: parameters and both moments, 12 bytes a parameter."""
        for name, parameter in self._parameters.items():
            self.tensors[f"model.{name}"] = parameter.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                self.tensors[f"{moment}.{name}"] = self._optimizer.state[parameter][moment]

    @property
    def size_bytes(self) -> int:
        """Bytes of the state."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def forward_backward(self) -> None:
        """Gradients for the feed-forward layers; reads the state, and does not change it."""
        self._optimizer.zero_grad(set_to_none=False)
        x = self._input  # (TOKENS, C)
        for layer in range(self._n_layer):
            part = {
                name: self._parameters[f"h.{layer}.mlp.{name}"]
                for name in ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias")
            }
            hidden = gelu(x @ part["c_fc.weight"] + part["c_fc.bias"])
            x = x + hidden @ part["c_proj.weight"] + part["c_proj.bias"]
        x.square().mean().backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """One step of Adam: writes every byte of the state."""
        self._optimizer.step()
