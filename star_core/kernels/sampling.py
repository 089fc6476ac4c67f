"""Triton kernels for guidance and for drawing tokens: a row of logits is read once and never sorted.

Products are rounded before they are added (no fused multiply-adds), as the references' are.
Thresholds are found by halving: float32 numbers compare as integers once the negative ones' bits are turned
around, so at most 32 questions of how many logits, or how much probability, lie on one side find any of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sampling import Draw

LONGEST_ROW = 16384
"""Logits that fit into the registers of one program."""
LOGITS_PER_WARP = 512
"""16 per thread: of more, the registers leave few warps to a processor."""
MOST_WARPS = 16
TILE = 2048


def draw(logits: Tensor, uniform: Tensor, *, top_k: int, top_p: float, temperature: float = 1.0) -> Draw | None:
    """Do what `sampling.draw` does."""
    size = logits.shape[-1]
    plain = logits.dtype == uniform.dtype == torch.float32 and logits.device == uniform.device
    if not (plain and logits.is_contiguous() and logits.numel() > 0 and size <= LONGEST_ROW):
        return None
    block = triton.next_power_of_2(size)
    tokens = torch.empty(uniform.shape, dtype=torch.int64, device=logits.device)
    confidence = torch.empty_like(tokens, dtype=torch.float32)
    _draw[(tokens.numel(),)](
        logits,
        uniform.contiguous(),
        tokens,
        confidence,
        1.0 / temperature,
        top_k,
        1.0 - top_p,
        size,
        block=block,
        by_count=0 < top_k < size,
        by_mass=0 < top_p < 1,
        num_warps=min(MOST_WARPS, max(1, block // LOGITS_PER_WARP)),
        enable_fp_fusion=False,
    )
    return Draw(tokens, confidence)


def guide(conditional: Tensor, unconditional: Tensor, strength: float) -> Tensor | None:
    """Do what `sampling.guide` does, to the last bit."""
    alike = conditional.dtype == unconditional.dtype == torch.float32
    alike = alike and conditional.shape == unconditional.shape and conditional.device == unconditional.device
    whole = conditional.is_contiguous() and unconditional.is_contiguous() and conditional.numel() > 0
    if not (alike and whole):
        return None
    guided = torch.empty_like(conditional)
    count = guided.numel()
    _guide[(triton.cdiv(count, TILE),)](
        conditional,
        unconditional,
        guided,
        1.0 + strength,
        float(strength),
        count,
        block=TILE,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return guided


@triton.jit
def _order(x: tl.tensor) -> tl.tensor:
    """Return int32 numbers that compare as x (float32) do; the two zeros become one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _kth_largest(order: tl.tensor, k: tl.tensor) -> tl.tensor:
    """Return a bound that the k largest of a row, and what ties with the last of them, reach."""
    low = tl.min(order, axis=0)
    high = tl.max(order, axis=0)
    while low < high:
        # The mean rounded up, without the sum, which 32 bits may not hold.
        middle = (low | high) - ((low ^ high) >> 1)
        count = tl.sum((order >= middle).to(tl.int32), axis=0)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count > k, high, tl.where(count < k, middle - 1, middle))
    return low


@triton.jit
def _least_kept(order: tl.tensor, weight: tl.tensor, low: tl.tensor, least: tl.tensor) -> tl.tensor:
    """Return the least number from `low` on up to which a row has more than `least` of its weight.

    It is the largest of the row where rounding leaves no other.
    """
    high = tl.max(order, axis=0)
    while low < high:
        # The mean rounded down.
        middle = (low & high) + ((low ^ high) >> 1)
        enough = tl.sum(tl.where(order <= middle, weight, 0.0), axis=0) > least
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return high


@triton.jit(do_not_specialize=["top_k"])
def _draw(
    logits: tl.tensor,
    uniform: tl.tensor,
    drawn: tl.tensor,
    confidence: tl.tensor,
    sharpness: tl.tensor,
    top_k: tl.tensor,
    dropped: tl.tensor,
    size: tl.tensor,
    block: tl.constexpr,
    by_count: tl.constexpr,
    by_mass: tl.constexpr,
) -> None:
    """Draw the token of one row. `sharpness` is 1 / temperature, `dropped` 1 - p. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, block)
    x = tl.load(logits + row * size + index, mask=index < size, other=-float("inf")) * sharpness
    order = _order(x)
    best = tl.max(order, axis=0)
    low = tl.min(order, axis=0)
    weight = tl.exp(x - tl.max(x, axis=0))
    if by_count:
        low = _kth_largest(order, top_k)
        weight = tl.where(order >= low, weight, 0.0)
    if by_mass:
        least = dropped * tl.sum(weight, axis=0)
        low = _least_kept(order, weight, low, least)
        below = tl.sum(tl.where(order < low, weight, 0.0), axis=0)
        tied = order == low
        ties = tl.sum(tied.to(tl.int32), axis=0)
        weight = tl.where(order >= low, weight, 0.0)
        if ties > 1:  # the first ones go first, as in a stable sort; the last one stays
            each = tl.max(tl.where(tied, weight, 0.0), axis=0)
            number = tl.cumsum(tied.to(tl.int32), axis=0)
            goes = tied & (below + number.to(tl.float32) * each <= least) & (number < ties)
            weight = tl.where(goes, 0.0, weight)

    cumulative = tl.cumsum(weight, axis=0)
    total = tl.sum(tl.where(index == size - 1, cumulative, 0.0), axis=0)
    target = tl.load(uniform + row) * total
    # Sums of a parallel scan may fall by a rounding: only a token of some weight is taken.
    passed = (cumulative > target) & (weight > 0.0)
    token = tl.min(tl.where(passed, index, block), axis=0)
    likeliest = tl.min(tl.where(order == best, index, block), axis=0)
    token = tl.minimum(tl.where(token < size, token, likeliest), size - 1)
    share = tl.sum(tl.where(index == token, weight, 0.0), axis=0) / tl.sum(weight, axis=0)
    tl.store(drawn + row, token.to(tl.int64))
    tl.store(confidence + row, share)


@triton.jit
def _guide(
    conditional: tl.tensor,
    unconditional: tl.tensor,
    guided: tl.tensor,
    towards: tl.tensor,
    away: tl.tensor,
    count: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Write towards * conditional - away * unconditional, `block` numbers per program."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = at < count
    c = tl.load(conditional + at, mask=there)
    u = tl.load(unconditional + at, mask=there)
    tl.store(guided + at, towards * c - away * u, mask=there)
