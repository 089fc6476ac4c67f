"""Triton kernels of the VQ-VAE's group normalisation, for pictures whose channels lie last.

PyTorch's own on CUDA takes channels first: around each one a picture is turned over and back. Here it is read
twice and written once, as it lies: moments of pieces of it, the pieces put together, then the numbers scaled.

In memory a picture is (positions, channels). Some positions count as one row, so that a power of two, up to
CHUNK, divides a row: programs then need no masks along it and read and write in the widest pieces. What a row
holds twice of a channel meets again when the pieces are put together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CHUNK = 128
"""Numbers of a row that a program takes, 256 bytes of the halves."""
LEAST_CHUNK = 4
TILE = 4096
"""Numbers that a program holds: 16 per thread at 8 warps."""
WARPS = 8
PROGRAMS = 1024
"""Programs that share the moments of a batch; of more, putting their pieces together takes longer."""
TOGETHER = 2048
"""Moments that a program puts together at a time."""


CHANGING = ("weight_function", "bias_function", "weight_lowvram_function", "bias_lowvram_function")
"""What ComfyUI's layers hold where their weights are to be changed as they compute."""


@dataclass(frozen=True)
class Cut:
    """How programs divide pictures (B, C, h, w) of (positions, C) each in memory."""

    fold: int
    """Positions of a row."""
    rows: int
    width: int
    chunk: int

    @property
    def block(self) -> int:
        """Rows that a program holds."""
        return TILE // self.chunk

    @property
    def columns(self) -> int:
        return self.width // self.chunk

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block)


def norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor | None:
    """Do what `vqvae.norm_silu` does."""
    return _normalised(x, norm, activate=True)


def normalised(x: Tensor, norm: nn.GroupNorm) -> Tensor | None:
    """Do what `vqvae.normalised` does."""
    return _normalised(x, norm, activate=False)


def _normalised(x: Tensor, norm: nn.GroupNorm, *, activate: bool) -> Tensor | None:
    fits = x.ndim == 4 and x.dtype in DTYPES and x.numel() > 0
    if not (fits and x.is_contiguous(memory_format=torch.channels_last) and _reads_its_own(norm, x)):
        return None
    batch, channels, height, width = x.shape
    cut = _cut(height * width, channels)
    if cut.chunk < LEAST_CHUNK:
        return None
    affine = _affine(x, norm, cut)
    out = torch.empty_like(x)
    _applied[cut.columns * cut.blocks, batch](
        x,
        affine,
        out,
        cut.rows,
        width=cut.width,
        channels=channels,
        chunk=cut.chunk,
        block=cut.block,
        activate=activate,
        num_warps=WARPS,
    )
    return out


def _affine(x: Tensor, norm: nn.GroupNorm, cut: Cut) -> Tensor:
    """Return the scales and shifts (B, 2, C), float32, with which x * scale + shift is norm(x)."""
    batch, channels = x.shape[:2]
    wanted = triton.cdiv(PROGRAMS, cut.columns * batch)
    turns = triton.cdiv(cut.blocks, wanted)
    pieces = triton.cdiv(cut.blocks, turns)
    moments = torch.empty(batch, pieces, 2, cut.width, dtype=torch.float32, device=x.device)
    _moments[cut.columns * pieces, batch](
        x, moments, cut.rows, turns, width=cut.width, chunk=cut.chunk, block=cut.block, num_warps=WARPS
    )
    affine = torch.empty(batch, 2, channels, dtype=torch.float32, device=x.device)
    each = channels // norm.num_groups
    lanes = triton.next_power_of_2(cut.fold * each)
    _put_together[norm.num_groups, batch](
        moments,
        norm.weight,
        norm.bias,
        affine,
        cut.rows,
        turns * cut.block,
        pieces,
        norm.eps,
        channels=channels,
        each=each,
        fold=cut.fold,
        lanes=lanes,
        own=triton.next_power_of_2(each),
        block=max(1, TOGETHER // lanes),
        num_warps=4,
    )
    return affine


def _cut(positions: int, channels: int) -> Cut:
    fold = 1
    while _power_in(channels * fold) < CHUNK and positions % (2 * fold) == 0:
        fold *= 2
    return Cut(fold, positions // fold, channels * fold, min(CHUNK, _power_in(channels * fold)))


def _power_in(number: int) -> int:
    """Return the largest power of two that divides a number."""
    return number & -number


def _reads_its_own(norm: nn.GroupNorm, x: Tensor) -> bool:
    """Whether a layer would normalise x with its weights just as they are, and nobody watches it.

    ComfyUI's layers bring weights from elsewhere, or change them by the functions named here, as they compute.
    """
    kind = type(norm)
    known = kind.forward is nn.GroupNorm.forward or hasattr(kind, "weight_function")
    if not known or norm.weight is None or norm.bias is None:
        return False
    pending = [getattr(norm, name, None) for name in CHANGING]
    if any(pending) or norm._forward_hooks or norm._forward_pre_hooks:
        return False
    return all(
        w.device == x.device
        and w.dtype in DTYPES
        and w.is_contiguous()
        and not (w.requires_grad and torch.is_grad_enabled())
        for w in (norm.weight, norm.bias)
    )


@triton.jit(do_not_specialize=["rows", "turns"])
def _moments(
    x: tl.tensor,
    moments: tl.tensor,
    rows: tl.tensor,
    turns: tl.tensor,
    width: tl.constexpr,
    chunk: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Write means and sums of squared differences (2, width) of a piece, `turns` blocks of rows.

    Grid: chunks of a row (the neighbours in memory side by side) times pieces, pictures.
    """
    columns: tl.constexpr = width // chunk
    piece = tl.program_id(0) // columns
    column = tl.program_id(0) % columns * chunk
    picture = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, block)[:, None]
    lane = tl.arange(0, chunk)
    first = piece * turns * block
    source = x + (picture * rows + first) * width + column
    at = row * width + lane[None, :]

    # Welford, each number of the tile on its own; no number waits for another until the end.
    mean = tl.zeros((block, chunk), tl.float32)
    squares = tl.zeros((block, chunk), tl.float32)
    count = tl.zeros((block, 1), tl.float32)
    turn = 0
    while turn < turns:  # as a range, older interpreters refuse it
        there = first + turn * block + row < rows
        value = tl.load(source + turn * (block * width) + at, mask=there, other=0.0).to(tl.float32)
        away = tl.where(there, value - mean, 0.0)
        mean += away * (1.0 / (turn + 1))
        squares += away * (value - mean)
        count += there.to(tl.float32)
        turn += 1

    # Chan, Golub and LeVeque: moments of parts to moments of the whole.
    total = tl.minimum(rows - first, turns * block).to(tl.float32)
    middle = tl.sum(mean * count, axis=0) / total
    apart = mean - middle[None, :]
    spread = tl.sum(squares + count * apart * apart, axis=0)
    pieces = tl.num_programs(0) // columns
    to = moments + (picture * pieces + piece) * (2 * width) + column + lane
    tl.store(to, middle)
    tl.store(to + width, spread)


@triton.jit(do_not_specialize=["rows", "span", "pieces"])
def _put_together(
    moments: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    affine: tl.tensor,
    rows: tl.tensor,
    span: tl.tensor,
    pieces: tl.tensor,
    eps: tl.tensor,
    channels: tl.constexpr,
    each: tl.constexpr,
    fold: tl.constexpr,
    lanes: tl.constexpr,
    own: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Write scale and shift of a group's `each` channels from all pieces, of `span` rows each.

    Grid: groups, pictures.
    """
    group = tl.program_id(0)
    picture = tl.program_id(1).to(tl.int64)
    width: tl.constexpr = channels * fold
    lane = tl.arange(0, lanes)[None, :]
    column = lane // each * channels + group * each + lane % each
    known = lane < fold * each

    mean = tl.zeros((block, lanes), tl.float32)
    squares = tl.zeros((block, lanes), tl.float32)
    count = tl.zeros((block, 1), tl.float32)
    start = 0
    while start < pieces:
        piece = start + tl.arange(0, block)[:, None]
        there = known & (piece < pieces)
        source = moments + (picture * pieces + piece) * (2 * width) + column
        new_mean = tl.load(source, mask=there, other=0.0)
        new_squares = tl.load(source + width, mask=there, other=0.0)
        new = tl.where(piece < pieces, tl.minimum(rows - piece * span, span), 0).to(tl.float32)
        total = count + new
        share = new / tl.maximum(total, 1.0)
        away = new_mean - mean
        squares += new_squares + away * away * (count * share)
        mean += away * share
        count = total
        start += block

    number = tl.sum(tl.sum(count, axis=0), axis=0) * (fold * each)
    middle = tl.sum(tl.sum(mean * count, axis=0), axis=0) / number
    apart = tl.where(known, mean - middle, 0.0)
    variance = tl.sum(tl.sum(squares + count * apart * apart, axis=0), axis=0) / number
    deviation = tl.rsqrt(variance + eps)

    one = tl.arange(0, own)
    channel = group * each + one
    scale = tl.load(weight + channel, mask=one < each, other=0.0).to(tl.float32) * deviation
    shift = tl.load(bias + channel, mask=one < each, other=0.0).to(tl.float32) - middle * scale
    to = affine + picture * (2 * channels) + channel
    tl.store(to, scale, mask=one < each)
    tl.store(to + channels, shift, mask=one < each)


@triton.jit(do_not_specialize=["rows"])
def _applied(
    x: tl.tensor,
    affine: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    width: tl.constexpr,
    channels: tl.constexpr,
    chunk: tl.constexpr,
    block: tl.constexpr,
    activate: tl.constexpr,
) -> None:
    """Write x * scale + shift, its silu with `activate`.

    Grid: chunks of a row (the neighbours in memory side by side) times blocks of rows, pictures.
    """
    columns: tl.constexpr = width // chunk
    first = tl.program_id(0) // columns * block
    column = tl.program_id(0) % columns * chunk
    picture = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, block)[:, None]
    lane = tl.arange(0, chunk)[None, :]
    own = affine + picture * (2 * channels) + (column + lane) % channels
    start = (picture * rows + first) * width + column
    at = row * width + lane
    there = first + row < rows
    value = tl.load(x + start + at, mask=there, other=0.0).to(tl.float32)
    value = value * tl.load(own) + tl.load(own + channels)
    if activate:
        value = value * tl.sigmoid(value)
    tl.store(out + start + at, value.to(out.dtype.element_ty), mask=there)
