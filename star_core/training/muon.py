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


def orthogonalise(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return matrices (..., m, n) with their singular values brought near 1, by a Newton-Schulz iteration.

    `dtype` is that of the iteration and the result, None for the matrices' own.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if tall else matrices
    x = x.div(x.norm(dim=(-2, -1), keepdim=True) + 1e-7).to(dtype or matrices.dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay. For matrices (m, n) only.

    Matrices of one shape go through the iteration together: a GPU would wait for each alone. `lr` may be a
    tensor of no axes on their device.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float | Tensor,
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
            alike: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in alike.items():
                self._step(parameters, group, RMS_OF_ADAMW * math.sqrt(max(shape)))

    def _step(self, parameters: list[Tensor], group: dict[str, Any], scale: float) -> None:
        """Update parameters of one shape."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        wanted = torch._foreach_lerp(gradients, momenta, group["momentum"])
        updates = orthogonalise(torch.stack(wanted), self.dtype).to(parameters[0].dtype)
        # A rate may be a tensor, which a recorded step reads anew: no host looks at its value.
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(parameters, list(updates * (group["lr"] * scale)))
