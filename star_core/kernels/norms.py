"""Triton kernels of the VQ-VAE's group normalisation, for pictures whose channels lie last.

PyTorch's own on CUDA takes channels first: around each one a picture is turned over and back. Here it is read
twice and written once, as it lies: moments of pieces of it, the pieces put together, then the numbers scaled.
What a row holds twice of a channel (`channels.Cut`) meets again when the pieces are put together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from .channels import DTYPES, WARPS, Cut, channels_last, cut_of, reads_its_own

PROGRAMS = 1024
"""Programs that share the moments of a batch; of more, putting their pieces together takes longer."""
TOGETHER = 2048
"""Moments that a program puts together at a time."""


def norm_silu(x: Tensor, norm: nn.GroupNorm, bias: Tensor | None = None) -> Tensor | None:
    """Do what `vqvae.norm_silu` does. A bias takes no pass over memory: it moves means, and nothing else."""
    if bias is not None and (bias.device != x.device or not bias.is_contiguous() or bias.dtype not in DTYPES):
        return None
    return _normalised(x, norm, bias, activate=True)


def normalised(x: Tensor, norm: nn.GroupNorm) -> Tensor | None:
    """Do what `vqvae.normalised` does."""
    return _normalised(x, norm, None, activate=False)


def _normalised(x: Tensor, norm: nn.GroupNorm, bias: Tensor | None, *, activate: bool) -> Tensor | None:
    """Return norm(x + bias) of x (B, C, h, w), its silu with `activate`; with a bias where x stood.

    None where it is not made for x.
    """
    if x.ndim != 4 or not channels_last(x) or not reads_its_own(norm, nn.GroupNorm, x):
        return None
    batch, channels, height, width = x.shape
    cut = cut_of(height * width, channels)
    if cut is None:
        return None
    affine = _affine(x, norm, bias, cut)
    out = torch.empty_like(x) if bias is None else x
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


def _affine(x: Tensor, norm: nn.GroupNorm, bias: Tensor | None, cut: Cut) -> Tensor:
    """Return the scales and shifts (B, 2, C), float32, with which x * scale + shift is norm(x + bias)."""
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
        norm.bias if bias is None else bias,
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
        biased=bias is not None,
        num_warps=4,
    )
    return affine


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
    before: tl.tensor,
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
    biased: tl.constexpr,
) -> None:
    """Write scale and shift of a group's `each` channels from all pieces, of `span` rows each.

    biased: the numbers are to have `before` (C,) added first. Grid: groups, pictures.
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
        if biased:
            new_mean += tl.load(before + group * each + lane % each, mask=known, other=0.0).to(tl.float32)
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
    if biased:  # before the scale: two large numbers that are nearly the same
        middle = middle - tl.load(before + channel, mask=one < each, other=0.0).to(tl.float32)
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
