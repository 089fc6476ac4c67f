"""Attention of heads wider than PyTorch's fused kernels are made for, as the VQ-VAE's is.

For those PyTorch computes in float32, whatever it is given. Here halves are multiplied as they are and summed
in float32, and scores stay float32 until they are weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FUSED_WIDTH = 256
"""Widest head of PyTorch's fused kernels."""
LONGEST_ROW = 16384
"""Scores that fit into the registers of one program."""
SCORES = 1 << 24
"""Scores that are held at a time: of longer maps only some queries'."""
SCORES_PER_WARP = 512


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """Do what `vqvae.attended` does, softmax(q k^T / sqrt(C)) v."""
    rows, heads, _, width = q.shape
    keys = k.shape[2]
    alike = q.dtype == k.dtype == v.dtype and q.dtype in DTYPES and q.numel() > 0
    if not (alike and width > FUSED_WIDTH and 0 < keys <= LONGEST_ROW and _can_multiply(q)):
        return None
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    together = max(1, SCORES // (rows * heads * keys))
    mixed = [_mixed(part, k, v) for part in q.split(together, dim=1)]
    whole = torch.cat(mixed, dim=1) if len(mixed) > 1 else mixed.pop()
    return whole.view(rows, heads, *whole.shape[1:])


def _can_multiply(q: Tensor) -> bool:
    """Whether products of this dtype can be had in float32 (PyTorch 2.8), and nothing else casts."""
    widens = q.dtype == torch.float32 or "dtype" in torch.ops.aten.bmm.overloads()
    return widens and not torch.is_autocast_enabled(q.device.type)


def _mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the values that queries (B, n, C) see of keys and values (B, N, C)."""
    turned = k.transpose(1, 2)
    if q.dtype == torch.float32:
        scores = weights = torch.bmm(q, turned)  # a program reads its row before it writes it
    else:
        scores = torch.bmm(q, turned, out_dtype=torch.float32)
        weights = torch.empty_like(scores, dtype=q.dtype)
    size = scores.shape[-1]
    block = triton.next_power_of_2(size)
    _softmax[(scores.numel() // size,)](
        scores,
        weights,
        q.shape[-1] ** -0.5,
        size,
        block=block,
        num_warps=min(16, max(1, block // SCORES_PER_WARP)),
    )
    return torch.bmm(weights, v)


@triton.jit
def _softmax(
    scores: tl.tensor, weights: tl.tensor, scale: tl.tensor, size: tl.tensor, block: tl.constexpr
) -> None:
    """Write softmax(scale * scores) of one row. Grid: rows."""
    row = tl.program_id(0).to(tl.int64) * size
    index = tl.arange(0, block)
    x = tl.load(scores + row + index, mask=index < size, other=-float("inf")) * scale
    x = tl.exp(x - tl.max(x, axis=0))
    x = x / tl.sum(x, axis=0)
    tl.store(weights + row + index, x.to(weights.dtype.element_ty), mask=index < size)
