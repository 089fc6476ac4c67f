"""Matrix products whose activation cuBLAS applies before it writes, without a pass for it alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HALVES = (torch.bfloat16, torch.float16)


def expanded(x: Tensor, linear: nn.Module) -> Tensor | None:
    """Do what `transformer.expanded` does, the GELU on the product's float32 sums.

    Plain layers alone: one of a host's, or one with 8-bit weights, knows by itself how it is to be applied.
    """
    if type(linear) is not nn.Linear or linear.bias is None or x.dtype not in HALVES:
        return None
    if linear._forward_hooks or linear._forward_pre_hooks:
        return None
    if not (x.dtype == linear.weight.dtype == linear.bias.dtype and x.device == linear.weight.device):
        return None
    rows = x.reshape(-1, x.shape[-1])
    made = torch._addmm_activation(linear.bias, rows, linear.weight.t(), use_gelu=True)
    return made.view(*x.shape[:-1], made.shape[-1])
