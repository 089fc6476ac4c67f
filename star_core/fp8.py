"""FP8 weights: linear layers in 8-bit floats (e4m3), a fast mode for GPUs that multiply them (Hopper, Ada).

Every output channel has its own scale, and so has every token's activation, both so that the largest magnitude
becomes the format's: what `int8` does with bytes, at twice the rate of bfloat16 products. Where a device has no
such products the weights are made whole again for each. What it gains and costs is measured in NOTES.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FORMAT = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest magnitude that e4m3 holds."""
MULTIPLE = 16
"""Sides of a matrix that the FP8 kernels take."""
LEAST_CAPABILITY = (8, 9)
"""CUDA's, of the first GPUs with FP8 products."""


class Float8Linear(nn.Module):
    """A linear layer with weights (out, in) in e4m3 and a float32 scale per output channel."""

    weight: Tensor
    scale: Tensor

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = whole.in_features, whole.out_features
        rounded, scale = round_rows(whole.weight.detach())
        self.register_buffer("weight", rounded)
        self.register_buffer("scale", scale)
        self.bias = whole.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out) in the dtype of x."""
        rows = x.reshape(-1, self.in_features)
        # A host that is short of memory may have left the layer behind, and knows nothing of its buffers.
        weight, scale = self.weight.to(x.device), self.scale.to(x.device)
        bias = self.bias.to(x.device) if self.bias is not None else None
        if self._has_products(rows):
            made = _by_fp8(rows, weight, scale, bias)
        else:
            whole = weight.float().mul_(scale).to(x.dtype)
            made = F.linear(rows, whole, bias.to(x.dtype) if bias is not None else None)
        return made.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _has_products(self, rows: Tensor) -> bool:
        fits = self.in_features % MULTIPLE == 0 and self.out_features % MULTIPLE == 0
        return fits and rows.is_cuda and torch.cuda.get_device_capability(rows.device) >= LEAST_CAPABILITY


def round_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (m, n) in e4m3 and their scales (m, 1) in float32: rows = rounded * scale, nearly."""
    exact = rows.float()
    scale = exact.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / LARGEST
    return (exact / scale).to(FORMAT), scale


def _by_fp8(rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return rows (m, in) times weights (out, in) with scales (out, 1), as bfloat16 (m, out)."""
    rounded, step = round_rows(rows)
    half = bias.to(torch.bfloat16) if bias is not None else None
    product: Tensor = torch._scaled_mm(
        rounded, weight.t(), step, scale.t(), bias=half, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return product
