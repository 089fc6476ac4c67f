"""Weights in bytes: linear layers with an 8-bit integer per weight, a fast mode that the loader switches on.

Every output channel has its own scale, so that its largest weight becomes 127. On a CPU with instructions for
it activations are rounded to 8 bits token by token while they are multiplied (W8A8): it multiplies bytes faster
than halves. Elsewhere the weights are made whole again for each product, which saves memory and takes time: on
an H200 byte products took 2.4 times as long as those of bfloat16, on a CPU without such instructions 24 times
as long as those of float32 (NOTES.md).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTE_DEVICES = ("cpu",)
"""Types of devices that multiply bytes faster than halves."""
MULTIPLE = 8
"""Sides of a matrix that the byte kernels take."""
INSTRUCTIONS = ("_is_vnni_supported", "_is_cpu_support_vnni")
"""What versions of PyTorch call the question whether a CPU has AVX-512 VNNI."""


@functools.cache
def has_byte_products() -> bool:
    """Whether PyTorch multiplies bytes on this processor by instructions for it, and not one by one."""
    asked = (getattr(torch.cpu, name, None) for name in INSTRUCTIONS)
    return hasattr(torch, "_int_mm") and any(ask() for ask in asked if ask is not None)


class Int8Linear(nn.Module):
    """A linear layer with weights (out, in) in int8 and a float32 scale per output channel."""

    weight: Tensor
    scale: Tensor

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = whole.in_features, whole.out_features
        # Asked while it is built: asked at a product, it would break a compiled graph.
        self._has_bytes = _has_sides(whole) and has_byte_products()
        exact = whole.weight.detach().float()
        scale = exact.abs().amax(dim=1).clamp_min(1e-12) / 127
        rounded = (exact / scale.unsqueeze(1)).round().to(torch.int8)
        self.register_buffer("weight", rounded)
        self.register_buffer("scale", scale)
        self.bias = whole.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out) in the dtype of x."""
        rows = x.reshape(-1, self.in_features)
        # A host that is short of memory may have left the layer behind, and knows nothing of its buffers.
        weight, scale = self.weight.to(x.device), self.scale.to(x.device)
        made = _by_bytes(rows, weight, scale) if self._takes(rows) else _by_whole(rows, weight, scale)
        if self.bias is not None:
            made += self.bias.to(x.device)
        return made.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _takes(self, rows: Tensor) -> bool:
        return self._has_bytes and rows.device.type in BYTE_DEVICES


def _has_sides(linear: nn.Linear) -> bool:
    return linear.in_features % MULTIPLE == 0 and linear.out_features % MULTIPLE == 0


def _by_bytes(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return rows (m, in) times weights (out, in), every row rounded to 8 bits, as float32 (m, out)."""
    exact = rows.float()
    step = exact.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
    rounded = (exact / step).round_().to(torch.int8)
    sums: Tensor = torch._int_mm(rounded, weight.t())
    return sums.float().mul_(step).mul_(scale)


def _by_whole(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return the same from rows as they are, multiplied in their dtype."""
    if rows.device.type == "cpu":  # exact, and where it multiplies no bytes the fastest of its products
        rows = rows.float()
    if rows.dtype == torch.float16:  # a sum of bytes would pass its largest number
        whole = weight.float().mul_(scale.unsqueeze(1)).half()
        return F.linear(rows, whole).float()
    return F.linear(rows, weight.to(rows.dtype)).float().mul_(scale)
