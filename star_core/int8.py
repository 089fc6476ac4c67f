"""Weights in bytes: linear layers with an 8-bit integer per weight, a fast mode that the loader switches on.

Every output channel has its own scale, so that its largest weight becomes 127; activations are rounded to 8
bits token by token while they are multiplied (W8A8), where the processor multiplies bytes faster than halves.
Where it does not, the weights are made whole again for each product. What it gains and costs is measured in
NOTES.md: on a GPU memory, not time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = {"cpu": (1, 1), "cuda": (24, 8)}
"""How many tokens a device's byte product takes: at least, and a multiple of what. They are filled up with
zeros, so that a token's result does not depend on how many there are."""
MULTIPLE = 8
"""Sides of a matrix that the byte kernels take."""


class Int8Linear(nn.Module):
    """A linear layer with weights (out, in) in int8 and a float32 scale per output channel."""

    weight: Tensor
    scale: Tensor

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = whole.in_features, whole.out_features
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
        made = _by_bytes(rows, weight) if self._has_bytes(rows) else F.linear(rows.float(), weight.float())
        made = made.mul_(scale)
        if self.bias is not None:
            made += self.bias.to(x.device)
        return made.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _has_bytes(self, rows: Tensor) -> bool:
        fits = self.in_features % MULTIPLE == 0 and self.out_features % MULTIPLE == 0
        return fits and rows.device.type in ROWS and hasattr(torch, "_int_mm")


def _by_bytes(rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows (m, in) times int8 weights (out, in), every row rounded to 8 bits, as float32 (m, out)."""
    exact = rows.float()
    step = exact.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
    rounded = (exact / step).round_().to(torch.int8)
    least, multiple = ROWS[rows.device.type]
    lacking = max(least - len(rows), -len(rows) % multiple)
    if lacking:
        rounded = F.pad(rounded, (0, 0, 0, lacking))
    sums: Tensor = torch._int_mm(rounded, weight.t())
    return sums[: len(rows)].float().mul_(step)
