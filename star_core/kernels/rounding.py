"""A Triton kernel that rounds rows to 8-bit floats, each by its own largest number, in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fp8 import FORMAT, LARGEST, SMALLEST, has_products

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_COLUMNS = 16384
"""Numbers that fit into the registers of one program."""
COLUMNS_PER_WARP = 512
"""16 per thread."""
MOST_WARPS = 16

_SMALLEST = tl.constexpr(SMALLEST)
_STEP = tl.constexpr(1 / LARGEST)


def round_rows(rows: Tensor, *, multiple: int = 1) -> tuple[Tensor, Tensor] | None:
    """Do what `fp8.round_rows` does, to the last bit."""
    count, columns = rows.shape
    fits = rows.dtype in DTYPES and rows.is_contiguous() and 0 < columns <= MOST_COLUMNS and count > 0
    # Without products there is no such format for a compiler either.
    if not fits or (rows.is_cuda and not has_products(rows.device)):
        return None
    filled = count + -count % multiple
    rounded = torch.empty(filled, columns, dtype=FORMAT, device=rows.device)
    scale = torch.empty(filled, 1, dtype=torch.float32, device=rows.device)
    block = triton.next_power_of_2(columns)
    _round_rows[(filled,)](
        rows,
        rounded,
        scale,
        count,
        columns,
        block=block,
        num_warps=min(MOST_WARPS, max(1, block // COLUMNS_PER_WARP)),
        enable_fp_fusion=False,
    )
    return rounded, scale


@triton.jit(do_not_specialize=["count"])
def _round_rows(
    rows: tl.tensor,
    rounded: tl.tensor,
    scale: tl.tensor,
    count: tl.tensor,
    columns: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Round one row; of those past `count`, zeros. Where it begins is counted in 64 bits."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    given = tl.where(row < count, columns, 0)
    exact = tl.load(rows + row * columns + column, mask=column < given, other=0.0).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(exact), axis=0), _SMALLEST) * _STEP
    tl.store(scale + row, step)
    # Not 1 / step, which a GPU is free to round as it likes.
    quotients = exact * tl.div_rn(1.0, step)
    tl.store(rounded + row * columns + column, quotients.to(tl.float8e4nv), mask=column < columns)
