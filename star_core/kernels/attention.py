"""Triton kernels that prepare attention: bias, rotation, unit length and scale in one pass over memory.

As the references in `attention` compute: biases are added in the tensors' dtype, all else in float32 without
fused multiply-adds, rounded at the end. Queries lie in memory as the reference's do, (R, L, H, head_width), and
attention lays its result out as its queries, ready for the projection. Keys and values go where they are read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import MAX_LOG_SCALE, LayerCache
from ..rope import Rotation

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE = 2048
"""Numbers of a head that a program holds of queries, keys and values each: 16 per thread at 4 warps."""
MANY_TOKENS = 1024
"""Tokens of a row from which a program serves several heads, which saves reading their rotation again."""
MOST_HEADS = 3

_MAX_LOG_SCALE = tl.constexpr(MAX_LOG_SCALE)
_EPS = tl.constexpr(1e-12)  # that of F.normalize


def self_heads(
    qkv: Tensor,
    q_bias: Tensor,
    v_bias: Tensor,
    log_scale: Tensor,
    rotation: Rotation,
    cache: LayerCache | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Do what `attention.self_heads` does. Keys and values are written into the cache where they fit."""
    rows, tokens, tripled = qkv.shape
    heads = log_scale.shape[1]
    width = tripled // 3
    if not (_fits(qkv, width // heads) and _turns(rotation, qkv) and _holds(cache, qkv)):
        return None
    shape = (rows, heads, tokens, width // heads)
    q = qkv.new_empty(rows, tokens, heads, width // heads)
    if cache is None:
        keys, values = qkv.new_empty(shape), qkv.new_empty(shape)
    else:
        keys, values = cache.room(rows, tokens)
    block = max(1, TILE // shape[-1])
    together = _heads_together(heads) if tokens >= MANY_TOKENS else 1
    _self_heads[heads // together, triton.cdiv(tokens, block), rows](
        qkv,
        q_bias.to(qkv),
        v_bias.to(qkv),
        log_scale.to(qkv.device),
        rotation.cos,
        rotation.sin,
        q,
        keys[:, :, -tokens:],
        values[:, :, -tokens:],
        tokens,
        heads,
        keys.stride(0),
        keys.stride(1),
        head_width=shape[-1],
        block=block,
        together=together,
        turns_by_row=rotation.cos.ndim == 3,
        num_warps=4,
        enable_fp_fusion=False,
    )
    if cache is not None:
        cache.advance(tokens)
    return q.transpose(1, 2), keys, values


def cross_queries(q: Tensor, q_bias: Tensor, log_scale: Tensor) -> Tensor | None:
    """Do what `attention.cross_queries` does."""
    rows, tokens, width = q.shape
    heads = log_scale.shape[1]
    if not _fits(q, width // heads):
        return None
    unit = q.new_empty(rows, tokens, heads, width // heads)
    vectors = rows * tokens * heads
    block = max(1, TILE // (width // heads))
    _cross_queries[(triton.cdiv(vectors, block),)](
        q,
        q_bias.to(q),
        log_scale.to(q.device),
        unit,
        vectors,
        heads,
        head_width=width // heads,
        block=block,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return unit.transpose(1, 2)


def _fits(x: Tensor, head_width: int) -> bool:
    """Whether x is in one piece, of a dtype and a head width (a power of two) that the kernels are made for."""
    power = 4 <= head_width <= 256 and head_width & (head_width - 1) == 0
    return power and x.dtype in DTYPES and x.is_contiguous() and x.numel() > 0


def _turns(rotation: Rotation, x: Tensor) -> bool:
    return all(
        t.is_contiguous() and t.dtype == torch.float32 and t.device == x.device and t.shape[-2] == x.shape[1]
        for t in rotation
    )


def _holds(cache: LayerCache | None, x: Tensor) -> bool:
    """Whether keys and values can go into a cache as they are."""
    if cache is None:
        return True
    keys, values = cache.keys, cache.values
    alike = keys.stride() == values.stride() and keys.stride(3) == 1 and keys.stride(2) == keys.shape[3]
    return alike and keys.dtype == values.dtype == x.dtype and keys.device == values.device == x.device


def _heads_together(heads: int) -> int:
    """Return the largest divisor of the number of heads up to MOST_HEADS."""
    return max(n for n in range(1, MOST_HEADS + 1) if heads % n == 0)


@triton.jit
def _pairs(x: tl.tensor, vectors: tl.constexpr, head_width: tl.constexpr) -> tl.tensor:
    """Return the even and the odd numbers (vectors, head_width / 2) of x (vectors, head_width) in float32."""
    return tl.split(tl.reshape(x.to(tl.float32), (vectors, head_width // 2, 2)))


@triton.jit
def _unit(even: tl.tensor, odd: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Return vectors (vectors, head_width) of length `scale`, from their even and odd numbers."""
    length = tl.maximum(tl.sqrt(tl.sum(even * even + odd * odd, axis=1)), _EPS)
    factor = (scale / length)[:, None]
    return tl.interleave(even * factor, odd * factor)


@triton.jit
def _turned(even: tl.tensor, odd: tl.tensor, cos: tl.tensor, sin: tl.tensor) -> tl.tensor:
    return even * cos - odd * sin, even * sin + odd * cos


@triton.jit
def _biased(x: tl.tensor, bias: tl.tensor) -> tl.tensor:
    """Return x + bias, rounded as PyTorch rounds it in their dtype."""
    return (x.to(tl.float32) + bias.to(tl.float32)).to(x.dtype)


@triton.jit
def _scale(log_scale: tl.tensor) -> tl.tensor:
    return tl.exp(tl.minimum(log_scale.to(tl.float32), _MAX_LOG_SCALE))


@triton.jit(do_not_specialize=["tokens"])
def _self_heads(
    qkv: tl.tensor,
    q_bias: tl.tensor,
    v_bias: tl.tensor,
    log_scale: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_out: tl.tensor,
    k_out: tl.tensor,
    v_out: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    out_row: tl.tensor,
    out_head: tl.tensor,
    head_width: tl.constexpr,
    block: tl.constexpr,
    together: tl.constexpr,
    turns_by_row: tl.constexpr,
) -> None:
    """Prepare `block` tokens of `together` heads of a row. Grid: groups of heads, blocks of tokens, rows.

    Where a program begins is counted in 64 bits, since large batches have more numbers than 32 bits count.
    """
    row = tl.program_id(2).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * block
    token = tl.arange(0, block)[:, None]
    pair = tl.arange(0, head_width // 2)[None, :]
    lane = tl.arange(0, head_width)[None, :]
    there = start + token < tokens
    width = heads * head_width

    angles = start * (head_width // 2)
    if turns_by_row:
        angles += row * tokens * (head_width // 2)
    at = token * (head_width // 2) + pair
    c = tl.load(cos + angles + at, mask=there, other=0.0)
    s = tl.load(sin + angles + at, mask=there, other=0.0)

    for n in tl.static_range(together):
        head = tl.program_id(0) * together + n
        column = head * head_width + lane
        source = qkv + (row * tokens + start) * (3 * width) + token * (3 * width) + column
        q = tl.load(source, mask=there, other=0.0)
        k = tl.load(source + width, mask=there, other=0.0)
        v = tl.load(source + 2 * width, mask=there, other=0.0)

        even, odd = _pairs(_biased(q, tl.load(q_bias + column)), block, head_width)
        even, odd = _turned(even, odd, c, s)
        q = _unit(even, odd, _scale(tl.load(log_scale + head)))
        even, odd = _pairs(k, block, head_width)
        even, odd = _turned(even, odd, c, s)
        k = _unit(even, odd, 1.0)
        v = _biased(v, tl.load(v_bias + column))

        q_at = (row * tokens + start) * width + token * width + column
        out_at = row * out_row + head.to(tl.int64) * out_head + start * head_width + token * head_width + lane
        tl.store(q_out + q_at, q.to(q_out.dtype.element_ty), mask=there)
        tl.store(k_out + out_at, k.to(k_out.dtype.element_ty), mask=there)
        tl.store(v_out + out_at, v, mask=there)


@triton.jit(do_not_specialize=["vectors"])
def _cross_queries(
    q: tl.tensor,
    q_bias: tl.tensor,
    log_scale: tl.tensor,
    q_out: tl.tensor,
    vectors: tl.tensor,
    heads: tl.tensor,
    head_width: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Prepare `block` of the queries (vectors, head_width), a token's heads one after the other."""
    start = tl.program_id(0).to(tl.int64) * block
    vector = tl.arange(0, block)
    lane = tl.arange(0, head_width)[None, :]
    head = ((start + vector) % heads).to(tl.int32)
    there = (start + vector < vectors)[:, None]
    at = start * head_width + vector[:, None] * head_width + lane
    x = tl.load(q + at, mask=there, other=0.0)
    bias = tl.load(q_bias + head[:, None] * head_width + lane)
    even, odd = _pairs(_biased(x, bias), block, head_width)
    unit = _unit(even, odd, _scale(tl.load(log_scale + head)))
    tl.store(q_out + at, unit.to(q_out.dtype.element_ty), mask=there)
