"""Half precision on a CPU that multiplies none: halves in memory, float32 in every product.

PyTorch's own products of halves take five to ten times as long as those of float32 there, which is any x86
processor without AVX-512's or AMX's instructions for them (NOTES.md). A layer of this module keeps its weights
as they are, makes them and its input wide for one product, and rounds the result, which is what a processor
with such products does inside. Weights may also be halves where activations are float32, on any device: the
same numbers as those of weights made wide once and for all, in half the memory, later.

The module is an `operations` namespace for layers that are built; `upcast_linears` is for those that are there.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALVES = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
"""Half precisions, and what PyTorch calls the question whether oneDNN multiplies them on this processor."""

# They add and look up, which halves do everywhere.
Embedding, GroupNorm = nn.Embedding, nn.GroupNorm


@functools.cache
def multiplies(half: torch.dtype) -> bool:
    """Whether oneDNN is built in, and multiplies a half precision on this processor."""
    asked = getattr(torch.ops.mkldnn, HALVES[half], None)
    return torch.backends.mkldnn.is_available() and asked is not None and bool(asked())


def needs_upcast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this dtype, on this device, are better made in float32."""
    return device.type == "cpu" and dtype in HALVES and not multiplies(dtype)


def halves_to_upcast() -> frozenset[torch.dtype]:
    """Return the half precisions that a CPU had better make wide: for layers to ask while they are built."""
    return frozenset(half for half in HALVES if not multiplies(half))


def _takes_as_it_is(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch multiplies an input and a weight. What the processor can do was asked when layers were
    built: asked here, it would break a compiled graph."""
    return x.dtype == weight.dtype and (x.dtype not in HALVES or x.device.type != "cpu")


class Linear(nn.Linear):
    """A linear layer that makes halves wide for its product: its input's on a CPU, its weights' beside a wide
    input anywhere."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out) in the dtype of the input."""
        if _takes_as_it_is(input, self.weight):
            return super().forward(input)
        return self._wide(input).to(input.dtype)

    def expanded(self, input: Tensor) -> Tensor:
        """Map (..., in) to the tanh-approximated GELU of (..., out), read from the float32 sums."""
        return F.gelu(self._wide(input), approximate="tanh").to(input.dtype)

    def _wide(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class Conv2d(nn.Conv2d):
    """A convolution that makes halves wide likewise."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not _takes_as_it_is(input, weight):
            wide = None if bias is None else bias.float()
            made: Tensor = super()._conv_forward(input.float(), weight.float(), wide)
        else:
            made = super()._conv_forward(input, weight, bias)
        return made.to(input.dtype)


def reads_halves(layer: nn.Module) -> bool:
    """Whether a layer's weight may be in half precision whatever its input is."""
    return isinstance(layer, Linear | Conv2d | Embedding)


def upcast_linears(module: nn.Module) -> None:
    """Make the plain linear layers of a module that somebody else built into this module's."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear  # with its weights, hooks and flags: a `Linear` adds none
