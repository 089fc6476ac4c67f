"""Muon (Jordan et al., 2024): momentum whose update matrices are made nearly orthogonal.

torch.optim.Muon runs its iteration in bfloat16, which a CPU without bfloat16 instructions emulates: it took
four fifths of a training step here. This one works in the precision it is told and is otherwise the same,
with updates scaled to AdamW's size (Moonlight, arXiv 2502.16982).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
RMS_OF_ADAMW = 0.2


def orthogonalise(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a matrix (m, n) with its singular values brought near 1, by a Newton-Schulz iteration.

    `dtype` is that of the iteration and the result, None for the matrix's own.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x.div(x.norm() + 1e-7).to(dtype or matrix.dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay. For matrices (m, n) only."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # it takes none
        """Update every parameter that has a gradient."""
        assert closure is None, "this optimizer takes no closure"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalise(parameter.grad.lerp(momentum, group["momentum"]), self.dtype)
                scale = RMS_OF_ADAMW * math.sqrt(max(parameter.shape))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)
