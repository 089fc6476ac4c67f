"""Cosine attention over token maps and over text, and the key-value cache of one picture (paper 4.1).

Queries and keys have unit length; a learned scale per head, at most 100, stands in for 1 / sqrt(d).
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .kernels import fused
from .rope import Rotation, rotate

MAX_LOG_SCALE = math.log(100)
INITIAL_LOG_SCALE = math.log(4)


class LayerCache:
    """Keys and values (R, H, capacity, head_width) of the scales that one block has seen."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        self.filled = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return all keys and values, those of the given scale included."""
        rows, tokens = keys.shape[0], keys.shape[2]
        all_keys, all_values = self.room(rows, tokens)
        all_keys[:, :, self.filled :] = keys
        all_values[:, :, self.filled :] = values
        self.advance(tokens)
        return all_keys, all_values

    def room(self, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Return keys and values (rows, H, filled + tokens, head_width), whose last `tokens` are to be written.

        A scale that no longer fits is not stored: nothing reads the last one (40 % of the cache). Fewer rows
        than the cache has are its first ones.
        """
        stop = self.filled + tokens
        if stop <= self.keys.shape[2]:
            return self.keys[:rows, :, :stop], self.values[:rows, :, :stop]
        return self._copied(self.keys[:rows], stop), self._copied(self.values[:rows], stop)

    def _copied(self, seen: Tensor, stop: int) -> Tensor:
        rows, heads, _, head_width = seen.shape
        fresh = seen.new_empty(rows, heads, stop, head_width)
        _wide(fresh)[:, :, : self.filled] = _wide(seen)[:, :, : self.filled]
        return fresh

    def advance(self, tokens: int) -> None:
        """Count a scale's tokens in, now that they are written; one that did not fit is forgotten."""
        if self.filled + tokens <= self.keys.shape[2]:
            self.filled += tokens


def _wide(x: Tensor) -> Tensor:
    """Return the same memory as numbers of 8 bytes: a GPU copies strided tensors number by number."""
    return x.view(torch.int64) if x.shape[-1] * x.element_size() % 8 == 0 else x


class KVCache:
    """One LayerCache per block, made for one batch of pictures and gone with it."""

    def __init__(
        self,
        depth: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # One piece: allocators give a large one back as a whole, small ones stay in their pools.
        whole = torch.empty((depth, 2, *shape), dtype=dtype, device=device)
        self.layers = tuple(LayerCache(keys, values) for keys, values in whole)

    def seek(self, tokens: int) -> None:
        """Go on behind the first `tokens` tokens, which are there."""
        for layer in self.layers:
            layer.filled = tokens


class TextKeys(NamedTuple):
    """What one block's cross-attention reads of the text: keys and values (B, H, T, head_width).

    `mask` (B, 1, 1, T) is what a score has added: 0 at real tokens, -inf at padding, which is masked in
    training and inference. None: no padding.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None

    def rows(self, count: int) -> TextKeys:
        """Return the first `count` rows."""
        if count >= len(self.keys):
            return self
        mask = self.mask[:count] if self.mask is not None else None
        return TextKeys(self.keys[:count], self.values[:count], mask)

    def overwrite(self, fresh: TextKeys) -> None:
        """Take over the first rows from another text of the same length."""
        for held, new in zip(self, fresh, strict=True):
            if held is not None and new is not None:
                held[: len(new)].copy_(new)


def scale_of(log_scale: Tensor, device: torch.device) -> Tensor:
    """Return what queries are multiplied by, in float32, in the shape of its stored logarithm."""
    # A bfloat16 logarithm would move a scale of 100 by a percent.
    return log_scale.to(device, torch.float32).clamp_max(MAX_LOG_SCALE).exp()


def _queries(x: Tensor, log_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (F.normalize(x.float(), dim=-1) * scale_of(log_scale, x.device)).to(dtype)


@fused("attention.self_heads", on_cpu="cpu.self_heads")
def self_heads(
    qkv: Tensor,
    q_bias: Tensor,
    v_bias: Tensor,
    log_scale: Tensor,
    rotation: Rotation,
    cache: LayerCache | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (R, H, L, head_width), keys and values of qkv (R, L, 3C), fused where possible.

    The keys and values are those of all scales that the cache has seen, and of this one. qkv may be used up.
    """
    q, k, v = qkv.chunk(3, dim=-1)
    q, v = q + q_bias.to(q), v + v_bias.to(v)
    q, k, v = (rearrange(t, "r l (h d) -> r h l d", h=log_scale.shape[1]) for t in (q, k, v))
    # The rotation keeps lengths, so that rotating first, as the official code does, is equal.
    q = _queries(rotate(q, rotation), log_scale, v.dtype)
    k = F.normalize(rotate(k, rotation), dim=-1).to(v.dtype)
    if cache is not None:
        k, v = cache.extend(k, v)
    return q, k, v


@fused("attention.cross_queries", on_cpu="cpu.cross_queries")
def cross_queries(q: Tensor, q_bias: Tensor, log_scale: Tensor) -> Tensor:
    """Return the queries (B, H, L, head_width) of q (B, L, C), which may be used up, fused where possible."""
    q = rearrange(q + q_bias.to(q), "b l (h d) -> b h l d", h=log_scale.shape[1])
    return _queries(q, log_scale, q.dtype)


@fused(on_cpu="cpu.attended")
def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return what queries (R, H, L, head_width) see of keys and values (R, H, N, head_width), like them."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


class SelfAttention(nn.Module):
    """Attention over the tokens of a picture, rotated by their place in the token map.

    On a CPU what `qkv` makes is used up: a forward hook on it that keeps its output has to copy it.
    """

    def __init__(self, width: int, heads: int, *, operations: ModuleType = nn) -> None:
        super().__init__()
        self.qkv = operations.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((1, heads, 1, 1), INITIAL_LOG_SCALE))
        self.proj = operations.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        *,
        cache: LayerCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Map (R, L, C) to (R, L, C). `mask` (L, L) is True where a row's token may look."""
        qkv: Tensor = self.qkv(x)
        q, k, v = self_heads(qkv, self.q_bias, self.v_bias, self.log_scale, rotation, cache)
        mixed = attended(q, k, v, mask)
        projected: Tensor = self.proj(rearrange(mixed, "r h l d -> r l (h d)"))
        return projected


class CrossAttention(nn.Module):
    """Attention from the tokens of a picture to the tokens of its text. No rotation."""

    def __init__(self, width: int, heads: int, text_width: int, *, operations: ModuleType = nn) -> None:
        super().__init__()
        self.heads = heads
        self.q = operations.Linear(width, width, bias=False)
        self.kv = operations.Linear(text_width, 2 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((1, heads, 1, 1), INITIAL_LOG_SCALE))
        self.proj = operations.Linear(width, width)

    def text_keys(self, hidden: Tensor, mask: Tensor | None) -> TextKeys:
        """Return the keys and values of text states (B, T, D) with mask (B, T), True at real tokens."""
        k, v = self.kv(hidden).chunk(2, dim=-1)
        v = v + self.v_bias.to(v)
        k, v = (rearrange(t, "b t (h d) -> b h t d", h=self.heads) for t in (k, v))
        spread: Tensor | None = None
        if mask is not None:
            # Made once for all scales: of a mask of truth values attention makes the same at every call.
            closed = torch.zeros_like(mask, dtype=k.dtype).masked_fill(~mask, -math.inf)
            spread = rearrange(closed, "b t -> b 1 1 t")
        # In float32: padding has keys of length 0, and the floor under a length is 0 in float16.
        return TextKeys(F.normalize(k.float(), dim=-1).to(k.dtype), v, spread)

    def forward(self, x: Tensor, text: TextKeys) -> Tensor:
        """Map (B, L, C) to (B, L, C)."""
        q = cross_queries(self.q(x), self.q_bias, self.log_scale)
        mixed = attended(q, text.keys, text.values, text.mask)
        projected: Tensor = self.proj(rearrange(mixed, "b h l d -> b l (h d)"))
        return projected
