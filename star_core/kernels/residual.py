"""A Triton kernel for residual sums: x + addend and its layer normalisation in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..transformer import NORM_EPS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_COLUMNS = 8192
COLUMNS_PER_WARP = 512

_EPS = tl.constexpr(NORM_EPS)


def add_then_norm(x: Tensor, addend: Tensor, rows: int) -> tuple[Tensor, Tensor] | None:
    """Do what `transformer.add_then_norm` does."""
    _, tokens, columns = x.shape
    alike = x.dtype == addend.dtype and x.dtype in DTYPES and x.is_contiguous() and addend.is_contiguous()
    if not alike or columns > MOST_COLUMNS or not x.numel():
        return None
    total, normed = torch.empty_like(x), x.new_empty(rows, tokens, columns)
    padded = triton.next_power_of_2(columns)
    _add_then_norm[(x.shape[0] * tokens,)](
        x,
        addend,
        total,
        normed,
        addend.shape[0] * tokens,
        rows * tokens,
        columns,
        padded=padded,
        num_warps=min(8, max(1, padded // COLUMNS_PER_WARP)),
        enable_fp_fusion=False,
    )
    return total, normed


@triton.jit(do_not_specialize=["addends", "wanted"])
def _add_then_norm(
    x: tl.tensor,
    addend: tl.tensor,
    total: tl.tensor,
    normed: tl.tensor,
    addends: tl.tensor,
    wanted: tl.tensor,
    columns: tl.tensor,
    padded: tl.constexpr,
) -> None:
    """Add a token's row, and normalise it where it is wanted. Grid: tokens of all rows."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, padded)
    there = column < columns
    own = tl.load(x + token * columns + column, mask=there, other=0.0).to(tl.float32)
    other = tl.load(addend + (token % addends) * columns + column, mask=there, other=0.0).to(tl.float32)
    # What is normalised is what is kept: rounded, as PyTorch rounds sums.
    rounded = (own + other).to(total.dtype.element_ty)
    tl.store(total + token * columns + column, rounded, mask=there)
    if token < wanted:
        value = rounded.to(tl.float32)
        mean = tl.sum(value, axis=0) / columns
        away = tl.where(there, value - mean, 0.0)
        deviation = tl.sqrt(tl.sum(away * away, axis=0) / columns + _EPS)
        tl.store(normed + token * columns + column, (away / deviation).to(normed.dtype.element_ty), mask=there)
